"""Triton's interpreter made fit for checking kernels, in a process where TRITON_INTERPRET was set before Triton was imported.

The interpreter cuts fp32 off when it makes bf16 of it, where the compiler's code rounds to nearest even (cvt.rn): here it rounds too.
"""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"
_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_rounded(builder: Any, source: Any, kind: Any) -> Any:
    given, wanted = source.dtype.scalar, kind.scalar
    if (given, wanted) == (tl.float32, tl.bfloat16):
        value = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        return interpreter.TensorHandle(value.view(torch.uint16).numpy(), wanted)
    if (given, wanted) == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), wanted)
    return _cast(builder, source, kind)


@pytest.fixture(autouse=True)
def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", _cast_rounded)


def only_the_last(monkeypatch: pytest.MonkeyPatch, module: ModuleType, kept: int = 2) -> None:
    """From now on this `triton_gpu` module runs only the last programs of a launch: of tensors too large to be walked through."""
    launch, number = module.launch, interpreter.InterpreterBuilder.create_get_program_id
    first = 0

    def shifted(builder: Any, axis: int) -> Any:
        handle = number(builder, axis)
        return interpreter.TensorHandle(handle.data + np.int32(first), handle.dtype)

    def launch_last(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        nonlocal first
        first = max(0, programs - kept)
        launch(kernel, programs - first, *arguments, **options)
        first = 0

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", shifted)
    monkeypatch.setattr(module, "launch", launch_last)
    leave_pages_alone(monkeypatch)


def leave_pages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter copies every storage back onto itself after a launch, which would touch all pages of a huge one."""
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *rest: None)
