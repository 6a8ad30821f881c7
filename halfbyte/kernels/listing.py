"""Which implementation of which op serves which kind of device, and why the others do not.

An implementation is named by three words: the op, the implementation (reference, cpu, triton) and the device type.  A predicate
per implementation returns the reason why it does not serve; an empty reason means that it does.  Among those that serve, the
fastest is taken; HALFBYTE_KERNELS forces one, and a forced one that cannot serve raises instead of falling back.
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


def _reference(device: str) -> str:
    return ""


def _cpu(device: str) -> str:
    return _numba_missing() if device == "cpu" else "written for the CPU"


@cache
def _triton_missing() -> str:
    return "" if importlib.util.find_spec("triton") else "the package triton is not installed"


def _triton(device: str) -> str:
    return _triton_missing() if device == "cuda" else "written for CUDA"


def _torch(device: str) -> str:
    return "" if device == "cuda" else "PyTorch's own attention is for GPUs"


# op -> implementations, fastest first
_IMPLEMENTATIONS: dict[str, dict[str, Callable[[str], str]]] = {
    "quantize_blockwise": {"cpu": _cpu, "triton": _triton, "reference": _reference},
    "search_scales": {"cpu": _cpu, "reference": _reference},
    "dequantize_blockwise": {"cpu": _cpu, "triton": _triton, "reference": _reference},
    "matmul_4bit": {"cpu": _cpu, "triton": _triton, "reference": _reference},
    "linear_cross_entropy": {"cpu": _cpu, "triton": _triton, "reference": _reference},
    "rms_norm": {"cpu": _cpu, "triton": _triton, "reference": _reference},
    "rope": {"cpu": _cpu, "triton": _triton, "reference": _reference},
    "adamw": {"cpu": _cpu, "triton": _triton, "reference": _reference},
    "gated_mlp": {"cpu": _cpu, "triton": _triton, "reference": _reference},
    "packed_attention": {"cpu": _cpu, "torch": _torch, "reference": _reference},
    "gemv": {"cpu": _cpu, "reference": _reference},
    "cached_attention": {"cpu": _cpu, "reference": _reference},
}


def chosen(op: str, device: str) -> str:
    """Name of the implementation that serves `op` on `device` ("cpu", "cuda").

    Raises UnsupportedError when HALFBYTE_KERNELS names one that cannot serve; an op that has only its reference is not
    concerned by a forced "cpu", for the reference is what the CPU runs.
    """
    return _chosen(op, device, env.kernels())


@cache
def _chosen(op: str, device: str, forced: str) -> str:
    known = _IMPLEMENTATIONS[op]
    if forced == "auto":
        return next(name for name, why_not in known.items() if not why_not(device))
    if forced not in env.KERNEL_CHOICES:
        raise UnsupportedError(
            "HALFBYTE_KERNELS names no kind of kernel", code="E-UNSUP-001", found=forced, expected=", ".join(env.KERNEL_CHOICES),
            remedy=nearest(forced, env.KERNEL_CHOICES),
        )
    if forced == "cpu" and set(known) == {"reference"}:
        return "reference"
    reason = known[forced](device) if forced in known else "not written yet"
    if reason:
        raise UnsupportedError(
            "the kernel that HALFBYTE_KERNELS forces cannot serve here", code="E-UNSUP-002", place=f"op {op} on {device}",
            found=f"{forced}: {reason}", expected=", ".join(name for name, why_not in known.items() if not why_not(device)),
            remedy="set HALFBYTE_KERNELS=auto",
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
    rows = []
    for op, known in _IMPLEMENTATIONS.items():
        for device in DEVICES:
            open_ones = [name for name, why_not in known.items() if not why_not(device)]
            forced = env.kernels()
            serving = forced if forced in open_ones else open_ones[0] if forced == "auto" or (forced == "cpu" and len(known) == 1) else ""
            for name, why_not in known.items():
                if name == serving:
                    reason = "serves" if forced == "auto" else f"serves, HALFBYTE_KERNELS={forced}"
                else:
                    reason = why_not(device) or (f"{serving} serves instead" if serving else f"HALFBYTE_KERNELS={forced} is asked for")
                rows.append(OpRow(op, name, device, name == serving, reason))
    return rows
