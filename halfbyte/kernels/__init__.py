"""Operations on tensors: no modules, no settings, no file formats.

Every op is a folder:

    <op>/__init__.py    the op: signature, formula, shapes, checks, fake, backward, registration with PyTorch
    <op>/reference.py   the specification: plain PyTorch; serves every device
    <op>/cpu.py         numba, the same bits as the reference

PyTorch dispatches by device; `listing` says which implementation serves and why; HALFBYTE_KERNELS=reference is the first
debugging step.  Importing this package compiles nothing and starts no thread: numba is imported by the first call that needs it.
"""
