"""Object code of CPU kernels, in memory and in the cache folder.

One file per kernel and type, under a folder named after the sources, the versions of the compilers and the processor.  Object code is
code: the folder is used only where it belongs to this user and nobody else can write to it, and a file only with its checksum
(docs/threat-model.md).
"""

import ctypes
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from halfbyte import env

KEPT_VERSIONS = 8  # of the object code, the newest: each change of a source, version or processor makes another


@cache
def processor() -> tuple[str, str]:
    """(name, features) that code is made for: this machine's, or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say instead."""
    from llvmlite import binding

    name, features = env.numba_processor()
    return name or binding.get_host_cpu_name(), features if features or name else binding.get_host_cpu_features().flatten()


@cache
def _engine() -> tuple[Any, Any]:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, features = processor()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=name, features=features, opt=3, jit=True, codemodel="jitdefault")
    return binding, machine


_kept: list[Any] = []
_lock = threading.Lock()


def load_object(name: str, assembly: Callable[[], str]) -> tuple[int, Any]:
    """(address of `share`, callable `range`) of a kernel, from the cache folder or compiled now."""
    with _lock:
        binding, machine = _engine()
        folder = _folder()
        path = None if folder is None else folder / f"{name}.o"
        code = _read(path)
        if code is None:
            module = binding.parse_assembly(assembly())
            module.verify()
            code = machine.emit_object(module)
            _write(path, code)
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _kept.append(engine)
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        return engine.get_function_address("halfbyte_share"), kind(engine.get_function_address("halfbyte_range"))


@cache
def _folder() -> Path | None:
    """Where object code is kept; None where the folder cannot be made or is not this user's alone."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    for package in ("numba", "llvmlite"):
        digest.update(metadata.version(package).encode())
    digest.update("|".join(processor()).encode())
    folder = env.cache_dir() / "kernels" / digest.hexdigest()[:16]
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
            others = sorted((path for path in folder.parent.iterdir() if path != folder), key=lambda path: path.stat().st_mtime)
            for old in others[: 1 - KEPT_VERSIONS]:
                shutil.rmtree(old, ignore_errors=True)
        for place in (folder, folder.parent):
            seen = place.stat()
            if hasattr(os, "getuid") and (seen.st_uid != os.getuid() or seen.st_mode & 0o022):
                return None
    except OSError:
        return None
    return folder


def _read(path: Path | None) -> bytes | None:
    """The object code behind its checksum; None where there is none or it was changed."""
    try:
        content = b"" if path is None else path.read_bytes()
    except OSError:  # none yet, or another process has just removed the folder
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def _write(path: Path | None, code: bytes) -> None:
    """Whole or not at all; a full disk or a folder that is gone only means that the next process compiles again."""
    if path is None:
        return
    fresh = path.with_suffix(f".{os.getpid()}")
    try:
        fresh.write_bytes(hashlib.sha256(code).digest() + code)
        os.replace(fresh, path)
    except OSError:
        with suppress(OSError):  # a file system that nobody can write to refuses this too
            fresh.unlink(missing_ok=True)
