"""Setting: everything about a run that moves memory or time, as plain values; and the weights it adapts.

A plan asks many settings of one model, so this is a small frozen record and not a RunConfig; `Setting.of` makes one from a RunConfig.
Layers are chosen from the names in a ModelShape by the same patterns as in training (config/patterns.py).
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from halfbyte.config.patterns import ALL_LINEAR, first_match, in_layers, matches
from halfbyte.errors import TargetError, nearest
from halfbyte.shape import ModelShape, Weight

if TYPE_CHECKING:
    from halfbyte.config.run import RunConfig

METHODS = ("qlora", "lora", "full")
ADAPTABLE = ("linear", "experts", "embedding", "head")


@dataclass(frozen=True)
class Setting:
    """One way to train.

    format            storage of the frozen base: none, nf4, fp4, int8
    dtype             of weights that are not packed, of activations and of arithmetic; also of all weights for method full
    lora_dtype        of adapters and of what is trained whole
    tokens            of one row, padding included; micro_batch_size rows go through at once
    global_batch_size rows of an optimizer step; 0: not known, more than go through at once
    skip              patterns of layers that stay dense (quant.skip)
    init              how the factors begin (lora.init)
    train_bias        which biases of the base are trained: none, lora_only, all
    trained_share     share of the tokens that carry a label
    policy            which activations are kept (activations.py)
    device            "cpu" or "gpu": where paging and offloading lead somewhere else
    """

    method: str = "qlora"
    format: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    quantize_head: bool = False
    dtype: str = "bfloat16"
    rank: int = 16
    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    dropout: float = 0.0
    dora: bool = False
    lora_bias: bool = False
    lora_dtype: str = "float32"
    fully_trained: tuple[str, ...] = ()
    state: str = "float32"
    paged: bool = False
    policy: str = "keep"
    tokens: int = 1024
    micro_batch_size: int = 1
    trained_share: float = 1.0
    device: str = "cpu"
    global_batch_size: int = 0
    skip: tuple[str, ...] = ()
    init: str = "default"
    train_bias: str = "none"

    @classmethod
    def of(
        cls, run: "RunConfig", *, dtype: str, tokens: int, micro_batch_size: int, policy: str, device: str, trained_share: float = 1.0
    ) -> "Setting":
        """The setting of a run whose `auto` values are decided."""
        lora = run.lora
        return cls(
            run.method, run.quant_format, run.quant.blocksize, run.quant.double_quant, run.quant.quantize_head, dtype, lora.rank,
            lora.targets, lora.exclude, lora.layers, tuple(lora.ranks.items()), lora.dropout, lora.dora, lora.lora_bias, lora.dtype,
            lora.fully_trained, run.optim.state, run.optim.paged, policy, tokens, micro_batch_size, trained_share, device,
            run.train.global_batch_size, run.quant.skip, lora.init, lora.train_bias,
        )  # fmt: skip

    def with_method(self, method: str) -> "Setting":
        """The same with another method and the storage that goes with it.

        >>> Setting().with_method("lora").format, Setting(format="fp4").with_method("qlora").format
        ('none', 'fp4')
        """
        packed = self.format if self.format != "none" else "nf4"
        return replace(self, method=method, format=packed if method == "qlora" else "none")

    @property
    def of_weights(self) -> "Setting":
        """What decides about weights, with the rest at rest: the key under which their sums are remembered."""
        return replace(
            self, policy="keep", state="float32", paged=False, tokens=1, micro_batch_size=1, trained_share=1.0, device="cpu",
            global_batch_size=0,
        )  # fmt: skip

    @property
    def accumulates(self) -> bool:
        """Gradients of earlier micro-batches lie there while the next one goes through."""
        return self.global_batch_size == 0 or self.global_batch_size > self.micro_batch_size

    @property
    def batch_tokens(self) -> int:
        """Tokens that go through the model at once."""
        return self.tokens * self.micro_batch_size

    @property
    def head_dense(self) -> bool:
        """Whether the output head goes through the chunked loss: dense and without an adapter."""
        adapted = self.method != "full" and self.targets != ALL_LINEAR and "lm_head" in _as_tuple(self.targets)
        return not adapted and not (self.quantize_head and self.format != "none")


def _as_tuple(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else targets


def adapted(shape: ModelShape, setting: Setting) -> tuple[tuple[Weight, int], ...]:
    """(weight, rank) of all that carries an adapter, none for method full; TargetError for a pattern that matches nothing."""
    return () if setting.method == "full" else _adapted(shape, setting.of_weights)


@lru_cache(maxsize=64)
def _adapted(shape: ModelShape, setting: Setting) -> tuple[tuple[Weight, int], ...]:
    able = [weight for weight in shape.weights if weight.kind in ADAPTABLE]
    chosen: set[str] = set()
    for pattern in _as_tuple(setting.targets):
        if pattern == ALL_LINEAR:
            found = [weight.name for weight in able if weight.kind in ("linear", "experts")]
        else:
            found = [weight.name for weight in able if matches(pattern, weight.name)]
        if not found:
            endings = list(dict.fromkeys(weight.name.rpartition(".")[2] for weight in able))
            raise TargetError(
                "every pattern must match a module of the model", code="E-TARGET-001", place="lora.targets", found=pattern,
                expected=", ".join(endings[:12]), remedy=nearest(pattern, endings), nothing_done="Nothing was trained.",
            )  # fmt: skip
        chosen.update(found)
    return tuple(
        (weight, rank_of(setting, weight.name)) for weight in able
        if weight.name in chosen and in_layers(weight.name, setting.layers)
        and not any(matches(pattern, weight.name) for pattern in (*setting.exclude, *setting.fully_trained))
    )  # fmt: skip


def rank_of(setting: Setting, name: str) -> int:
    """The rank of this module's adapter."""
    ranks = dict(setting.ranks)
    found = first_match(ranks, name)
    return setting.rank if found is None else ranks[found]


def adapter_params(weight: Weight, rank: int, setting: Setting) -> int:
    """rank (in + out) of a matrix, for each expert of a fused one; DoRA and lora_bias add one number a row.

    >>> adapter_params(Weight("q_proj", "linear", (4096, 4096), False), 8, Setting())
    65536
    """
    count, (rows, columns) = prod(weight.size[:-2]), weight.size[-2:]
    return count * (rank * (rows + columns) + rows * (setting.dora + setting.lora_bias))


def whole(shape: ModelShape, setting: Setting) -> list[Weight]:
    """The weights that are trained whole beside an adapter (PEFT's modules_to_save); none for method full."""
    if setting.method == "full":
        return []
    return [w for w in shape.weights if any(matches(pattern, w.name) for pattern in setting.fully_trained)]


def trained_biases(shape: ModelShape, setting: Setting) -> list[Weight]:
    """The weights whose bias alone is trained beside an adapter."""
    if setting.method == "full" or setting.train_bias == "none":
        return []
    names = {weight.name for weight, _ in adapted(shape, setting)}
    entire = {weight.name for weight in whole(shape, setting)}
    return [w for w in shape.weights if w.bias and w.name not in entire and (setting.train_bias == "all" or w.name in names)]


def trained_tensors(shape: ModelShape, setting: Setting) -> tuple[int, ...]:
    """Elements of every tensor that is trained, in definition order."""
    return _trained_tensors(shape, setting.of_weights)


@lru_cache(maxsize=64)
def _trained_tensors(shape: ModelShape, setting: Setting) -> tuple[int, ...]:
    if setting.method == "full":
        return tuple(size for weight in shape.weights for size in _tensors(weight) if not weight.tied)
    sizes = []
    for weight, rank in adapted(shape, setting):
        count, (rows, columns) = prod(weight.size[:-2]), weight.size[-2:]
        sizes += [count * rank * columns, count * rows * rank] + [rows] * (setting.dora + setting.lora_bias)
    sizes += [weight.size[-2] if len(weight.size) > 1 else weight.size[0] for weight in trained_biases(shape, setting)]
    return tuple(sizes + [size for weight in whole(shape, setting) for size in _tensors(weight)])


def _tensors(weight: Weight) -> list[int]:
    size = prod(weight.size)
    bias = (weight.size[-2] if len(weight.size) > 1 else weight.size[0]) if weight.bias else 0
    return [size, bias] if bias else [size]


def trained_params(shape: ModelShape, setting: Setting) -> int:
    """Parameters that are trained."""
    return sum(trained_tensors(shape, setting))
