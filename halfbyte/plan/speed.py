"""Work of a training step in products and bytes, from shapes alone, and time where this machine has been calibrated.

    forward    2 n P for matrices of P elements and n tokens; head 2 m V H for the m labelled tokens; attention 2 T^2 HqD a row, causal
    backward   the same again for the gradient of the input; once more for that of the weight, where it is trained; attention 2.5 times
    adapters   6 n P
    recompute  what a policy computes twice; down_proj, whose result is only added to the residual stream, never is
    reading    a packed matrix is read back to the compute type once each time it is multiplied with

Model work counts what the mathematics needs; total work also what a policy repeats.  Seconds come from measured rates only:
the file `calibration.json` in the cache folder, written by a calibration on this machine.  Without it there is no time, and the text
says "not calibrated".

Source of the counts: https://arxiv.org/abs/2204.02311, appendix B (model FLOPs); 2.5 for attention: https://arxiv.org/abs/2205.14135
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path

from halfbyte import env
from halfbyte.errors import EnvironmentFault
from halfbyte.plan.activations import POLICIES, fused
from halfbyte.plan.memory import packed, packed_bytes
from halfbyte.plan.setting import Setting, adapted, adapter_params, trained_params
from halfbyte.quant.storage_cost import WIDTHS
from halfbyte.shape import ModelShape

VERSION = 1


@dataclass(frozen=True)
class Work:
    """Of one micro-batch: operations (a product with its addition counts 2), and bytes of packed matrices read back and written.

    linear, head, attention, adapters: what the mathematics needs, forward and backward
    again         operations that the policy repeats
    unpacked      elements of packed matrices that are read back
    updated       parameters that the optimizer updates, once for the whole step
    """

    linear: float
    head: float
    attention: float
    adapters: float
    again: float
    unpacked: float
    updated: int

    @property
    def model(self) -> float:
        """Operations without what is repeated: what MFU counts."""
        return self.linear + self.head + self.attention + self.adapters

    @property
    def total(self) -> float:
        """All operations."""
        return self.model + self.again


def matrix_params(shape: ModelShape) -> float:
    """Elements of the matrices that one token is multiplied with: linear layers, routers, and of experts those it visits."""
    used = shape.sizes.get("experts_per_token", 0)
    active = {"linear": 1.0, "router": 1.0, "experts": used / shape.sizes["experts"] if used else 0.0}
    return sum(prod(weight.size) * active.get(weight.kind, 0.0) for weight in shape.weights)


def repeated_params(shape: ModelShape, setting: Setting) -> float:
    """Elements of the matrices that the policy multiplies with a second time."""
    keeps = POLICIES[setting.policy].keeps
    if "inner" in keeps:
        return 0.0
    ends = ("gate_proj", "up_proj", "gate_up_proj")
    down = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
    if "stream" in keeps:
        chosen = [w for w in shape.weights if w.name.endswith(ends) and w.kind == "linear"] if fused(shape, setting) else []
        return float(sum(prod(w.size) for w in chosen))
    last = sum(prod(w.size) for w in shape.weights if w.name.endswith(down) and ".mlp" in w.name and w.kind == "linear")
    return matrix_params(shape) - last


def work_of(shape: ModelShape, setting: Setting) -> Work:
    """The work of one micro-batch under a setting."""
    tokens, full = setting.batch_tokens, setting.method == "full"
    labelled = max(1, round(tokens * setting.trained_share))
    matrices, again = matrix_params(shape), repeated_params(shape, setting)
    forward = 2.0 * shape.layers * setting.micro_batch_size * setting.tokens**2 * shape.sizes["queries"]
    attention_again = forward if "attention" not in POLICIES[setting.policy].keeps else 0.0
    inside = sum(adapter_params(weight, rank, setting) for weight, rank in adapted(shape, setting))
    quantized = float(sum(prod(weight.size) for weight in packed(shape, setting)))
    share = again / matrices if matrices else 0.0
    return Work(
        linear=(6.0 if full else 4.0) * tokens * matrices, head=(6.0 if full else 4.0) * labelled * shape.vocab * shape.hidden,
        attention=3.5 * forward, adapters=6.0 * tokens * inside, again=2.0 * tokens * again + attention_again,
        unpacked=quantized * (2.0 + share), updated=trained_params(shape, setting),
    )  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """Rates measured on one device; per second.

    matmul        operations in products of matrices in the compute type
    attention     operations in attention
    unpack        elements of packed matrices read back
    update        parameters updated
    overhead      seconds of a step that depend on nothing of the model
    """

    device: str
    date: str
    dtype: str
    matmul: float
    attention: float
    unpack: float
    update: float
    overhead: float


def calibration_path() -> Path:
    """Where this machine's rates are kept."""
    return env.cache_dir() / "calibration.json"


def read_calibration(path: Path | None = None) -> Calibration | None:
    """The rates of this machine; None where it has not been calibrated.  Raises EnvironmentFault for a file that cannot be used."""
    path = calibration_path() if path is None else path
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as fault:
        raise _unusable(path, str(fault)[:120]) from None
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise _unusable(path, f"version {values.get('version') if isinstance(values, dict) else None}, this program reads {VERSION}")
    return _checked(path, values)


def _checked(path: Path, values: Mapping[str, object]) -> Calibration:
    read: dict[str, str | float] = {}
    for field in fields(Calibration):
        value = values.get(field.name)
        if field.type is str:
            good = isinstance(value, str) and bool(value)
        else:
            least = 0.0 if field.name == "overhead" else 1.0
            good = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < 1e18
        if not good or not isinstance(value, str | int | float):
            raise _unusable(path, f"{field.name}: {str(value)[:40]}")
        read[field.name] = value
    return Calibration(**read)  # type: ignore[arg-type]


def _unusable(path: Path, found: str) -> EnvironmentFault:
    return EnvironmentFault(
        "the calibration of this machine must be readable", code="E-ENV-401", place=str(path), found=found,
        remedy="remove the file; the next calibration writes a new one", nothing_done="Nothing was planned.",
    )  # fmt: skip


def step_seconds(work: Work, micro_batches: int, rates: Calibration) -> float:
    """Estimate of one optimizer step of so many micro-batches: the sum of the parts, for on one device they follow each other."""
    products = (work.total - work.attention) / rates.matmul
    one = products + work.attention / rates.attention + work.unpacked / rates.unpack
    return micro_batches * one + work.updated / rates.update + rates.overhead


def unpacked_bytes(work: Work, shape: ModelShape, setting: Setting) -> float:
    """Bytes moved to read packed matrices back: what is stored is read, w bytes an element are written."""
    count = sum(prod(weight.size) for weight in packed(shape, setting))
    return work.unpacked * (packed_bytes(shape, setting) / count + WIDTHS[setting.dtype]) if count else 0.0
