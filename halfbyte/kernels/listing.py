"""Which implementation of which op serves which kind of device, and why the others do not.

An implementation is named by three words: the op, the implementation (reference, cpu, triton) and the device type.  A predicate
per implementation returns the reason why it does not serve; an empty reason means that it does.  Among those that serve, the
fastest is taken.  HALFBYTE_KERNELS forces one kind where an op has it for the device; ops without it are left as they are, and
`halfbyte doctor` says which.  A forced one whose package is missing raises instead of falling back.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halfbyte import env
from halfbyte.errors import UnsupportedError, nearest

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class OpRow:
    """One line of the listing; `reason` says why it serves or why not."""

    op: str
    implementation: str
    device: str
    serves: bool
    reason: str


@cache
def _numba_missing() -> str:
    return "" if importlib.util.find_spec("numba") else "the package numba is not installed"


@cache
def _triton_missing() -> str:
    return "" if importlib.util.find_spec("triton") else "the package triton is not installed"


@dataclass(frozen=True)
class _Kind:
    """Where a kind of implementation runs, what is said of it elsewhere, and what it lacks where it should run."""

    devices: tuple[str, ...]
    elsewhere: str
    lacks: Callable[[], str]


_KINDS = {
    "cpu": _Kind(("cpu",), "written for the CPU", lambda: _numba_missing()),
    "triton": _Kind(("cuda",), "written for CUDA", lambda: _triton_missing()),
    "torch": _Kind(("cuda",), "PyTorch's own attention is for GPUs", str),
    "reference": _Kind(DEVICES, "", str),
}

_EVERYWHERE = ("cpu", "triton", "reference")
# op -> implementations, fastest first
_IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "quantize_blockwise": _EVERYWHERE,
    "search_scales": ("cpu", "reference"),
    "dequantize_blockwise": _EVERYWHERE,
    "matmul_4bit": _EVERYWHERE,
    "linear_cross_entropy": _EVERYWHERE,
    "rms_norm": _EVERYWHERE,
    "rope": _EVERYWHERE,
    "adamw": _EVERYWHERE,
    "gated_mlp": _EVERYWHERE,
    "packed_attention": ("cpu", "torch", "reference"),
    "gemv": ("cpu", "reference"),
    "cached_attention": ("cpu", "reference"),
}


def _why_not(name: str, device: str) -> str:
    """Why an implementation does not serve on a device; empty when it can."""
    kind = _KINDS[name]
    return kind.lacks() if device in kind.devices else kind.elsewhere


def chosen(op: str, device: str) -> str:
    """Name of the implementation that serves `op` on `device` ("cpu", "cuda").

    HALFBYTE_KERNELS decides where the op has such an implementation for the device; elsewhere the choice is that of `auto`.  Raises
    UnsupportedError when it names no kind, or one whose package is not installed.
    """
    return _chosen(op, device, env.kernels())


@cache
def _chosen(op: str, device: str, forced: str) -> str:
    known = _IMPLEMENTATIONS[op]
    if forced != "auto" and forced not in env.KERNEL_CHOICES:
        raise UnsupportedError(
            "HALFBYTE_KERNELS names no kind of kernel", code="E-UNSUP-001", found=forced, expected=", ".join(env.KERNEL_CHOICES),
            remedy=nearest(forced, env.KERNEL_CHOICES),
        )
    serving = [name for name in known if not _why_not(name, device)]
    if forced not in known or device not in _KINDS[forced].devices:
        return serving[0]
    if forced not in serving:
        raise UnsupportedError(
            "the kernel that HALFBYTE_KERNELS forces cannot serve here", code="E-UNSUP-002", place=f"op {op} on {device}",
            found=f"{forced}: {_why_not(forced, device)}", expected=", ".join(serving), remedy="set HALFBYTE_KERNELS=auto",
        )
    return forced


_FILES = {"reference": "reference", "cpu": "cpu", "triton": "triton_gpu"}


@cache
def _module(op: str, name: str) -> Any:
    return importlib.import_module(f"halfbyte.kernels.{op}.{_FILES[name]}")


def implementation(op: str, like: Tensor, dtype: torch.dtype | None = None) -> Any:
    """The module that serves `op` where `like` is: its `cpu`, `triton_gpu` or `reference`, imported on first use.

    float64 (of `like`, or of the result where `dtype` is given) is there to check gradients with and always takes the reference.
    Raises what `chosen` raises.
    """
    name = chosen(op, like.device.type)
    return _module(op, "reference" if (dtype or like.dtype) == torch.float64 else name)


def table() -> list[OpRow]:
    """Every op x implementation x device with the reason, in a fixed order; reads HALFBYTE_KERNELS but raises nothing."""
    return [
        OpRow(op, name, device, name == serving, _reason(name, device, serving))
        for op, known in _IMPLEMENTATIONS.items()
        for device in DEVICES
        for serving in (_serving(op, device),)
        for name in known
    ]


def _serving(op: str, device: str) -> str:
    """What `chosen` says; empty where it raises."""
    try:
        return chosen(op, device)
    except UnsupportedError:
        return ""


def _reason(name: str, device: str, serving: str) -> str:
    forced = env.kernels()
    if name != serving:
        return _why_not(name, device) or (f"{serving} serves instead" if serving else f"HALFBYTE_KERNELS={forced} is asked for")
    if forced == "auto":
        return "serves"
    return f"serves, HALFBYTE_KERNELS={forced}" if name == forced else f"serves: there is no {forced} for this op on {device}"
