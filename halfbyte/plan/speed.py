"""Work of a training step in operations, from shapes alone, and its time where this machine's rates are known.

    forward    2 n P for matrices of P elements and n tokens; head 2 m V H for the m labelled tokens; attention 2 T^2 HqD a row, causal
    backward   the same again for the gradient of the input; once more for that of the weight, where it is trained; attention 2.5 times
    adapters   6 n P, of experts those that a token visits
    recompute  what a policy computes twice; down_proj, whose result is only added to the residual stream, never is
    reading    a packed matrix is read back to the compute type once each time it is multiplied with

Model work counts what the mathematics needs; total work also what a policy repeats.  Rows differ in length, and padding is not computed
(models/rows.py), so the time of an epoch is made of the mean length and the mean of its square (`Rows`).  The parts follow each other on
one device, so their seconds add up; each has its own measured rate (rates.py), which holds the element-wise work around the products.

Source of the counts: https://arxiv.org/abs/2204.02311, appendix B (model FLOPs); 2.5 for attention: https://arxiv.org/abs/2205.14135
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from halfbyte.plan.activations import POLICIES, fused
from halfbyte.plan.memory import packed, trained_dtype
from halfbyte.plan.rates import Rates
from halfbyte.plan.setting import Setting, adapted, adapter_params, trained_params
from halfbyte.shape import ModelShape

RANK = 16  # of the adapters in a calibrated layer
ROUNDED_TO = 64  # tokens of a micro-batch on a CPU (models/heads.py)


@dataclass(frozen=True)
class Rows:
    """Rows as they go through a model: how many there are, their mean length, and the mean of its square; in tokens."""

    count: int
    mean: float
    mean_square: float

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Rows":
        """
        >>> Rows.of([2, 4])
        Rows(count=2, mean=3.0, mean_square=10.0)
        """
        count = len(lengths)
        return cls(count, sum(lengths) / count, sum(length**2 for length in lengths) / count)

    @classmethod
    def packed(cls, lengths: Sequence[int], tokens: int) -> "Rows":
        """Samples in rows of this many tokens; the rows are taken as full, their samples apart in attention.

        >>> Rows.packed([2, 4, 2], 4)
        Rows(count=2, mean=4.0, mean_square=12.0)
        """
        count = max(1, -(-sum(lengths) // tokens))
        return cls(count, sum(lengths) / count, sum(length**2 for length in lengths) / count)


@dataclass(frozen=True)
class Work:
    """Of one micro-batch: operations (a product with its addition counts 2), and elements of packed matrices that are read back.

    tokens        that go through the layers
    segment       tokens of a sample that attention sees, by its cost
    labelled      tokens that go through the head
    linear, head, attention, adapters: what the mathematics needs, forward and backward
    beyond        of the adapters' operations, those above what rank RANK needs (negative below it)
    again         operations that the policy repeats
    attention_again   the part of it that is attention
    unpacked      elements of packed matrices that are read back
    updated       parameters that the optimizer updates, once for the whole step
    """

    tokens: float
    segment: float
    labelled: float
    linear: float
    head: float
    attention: float
    adapters: float
    beyond: float
    again: float
    attention_again: float
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


def visited(shape: ModelShape) -> float:
    """Share of the experts that one token visits."""
    used = shape.sizes.get("experts_per_token", 0)
    return used / shape.sizes["experts"] if used else 0.0


def matrix_params(shape: ModelShape) -> float:
    """Elements of the matrices that one token is multiplied with: linear layers, routers, and of experts those it visits."""
    active = {"linear": 1.0, "router": 1.0, "experts": visited(shape)}
    return sum(prod(weight.size) * active.get(weight.kind, 0.0) for weight in shape.weights)


def active_adapter_params(shape: ModelShape, setting: Setting, rank: int | None = None) -> float:
    """Elements of the adapters that one token is multiplied with, of experts those it visits; with `rank`, as if all had that one."""
    return sum(
        adapter_params(weight, own if rank is None else rank, setting) * (visited(shape) if weight.kind == "experts" else 1.0)
        for weight, own in adapted(shape, setting)
    )


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


def work_of(shape: ModelShape, setting: Setting, rows: Rows | None = None) -> Work:
    """The work of one micro-batch under a setting; with `rows`, of their mean length, else of the setting's."""
    size, full = setting.micro_batch_size, setting.method == "full"
    mean, square = (float(setting.tokens), float(setting.tokens) ** 2) if rows is None else (rows.mean, rows.mean_square)
    tokens = size * mean
    if rows is not None and setting.device == "cpu":
        tokens = ceil(tokens / ROUNDED_TO) * ROUNDED_TO
    labelled = max(1.0, size * mean * setting.trained_share)
    matrices, again = matrix_params(shape), repeated_params(shape, setting)
    forward = 2.0 * shape.layers * size * square * shape.sizes["queries"]
    attention_again = forward if "attention" not in POLICIES[setting.policy].keeps else 0.0
    inside = active_adapter_params(shape, setting)
    usual = active_adapter_params(shape, replace(setting, targets="all-linear"), RANK)
    quantized = float(sum(prod(weight.size) for weight in packed(shape, setting)))
    share = again / matrices if matrices else 0.0
    return Work(
        tokens=tokens, segment=square / mean, labelled=labelled,
        linear=(6.0 if full else 4.0) * tokens * matrices, head=(6.0 if full else 4.0) * labelled * shape.vocab * shape.hidden,
        attention=3.5 * forward, adapters=6.0 * tokens * inside, beyond=6.0 * tokens * (inside - usual),
        again=2.0 * tokens * again + attention_again, attention_again=attention_again,
        unpacked=quantized * (2.0 + share), updated=trained_params(shape, setting),
    )  # fmt: skip


def update_kind(setting: Setting) -> str:
    """Which of the measured updates this setting's optimizer makes."""
    if setting.state == "int8":
        return "int8"
    return "float32" if trained_dtype(setting) == "float32" else "master"


def step_seconds(work: Work, micro_batches: float, rates: Rates, setting: Setting) -> float:
    """Estimate of one optimizer step of so many micro-batches: the sum of its parts."""
    layers = (rates.trained if setting.method == "full" else rates.layer).at(work.tokens)
    usual = work.linear + work.adapters - work.beyond + work.again - work.attention_again
    attention = (work.attention + work.attention_again) / rates.attention.at(work.segment)
    products = usual / layers + work.beyond / rates.adapter + work.head / rates.head.at(work.labelled)
    one = max(products, work.linear / layers) + attention + work.unpacked / rates.unpack
    return micro_batches * one + work.updated / rates.update[update_kind(setting)]


def seconds_of_step(shape: ModelShape, setting: Setting, rates: Rates, global_batch_size: int, rows: Rows | None = None) -> float:
    """Estimate of the mean optimizer step over these rows."""
    return step_seconds(work_of(shape, setting, rows), global_batch_size / setting.micro_batch_size, rates, setting)
