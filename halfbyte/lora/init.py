"""How A and B begin: a dict of named functions, each filling one adapter layer in place from a seeded generator.

| name | A | B | first forward |
|---|---|---|---|
| default  | Kaiming uniform, a = sqrt(5): U(-1/sqrt(I), 1/sqrt(I)) | 0 | equals the base's |
| gaussian | N(0, 1/R), standard deviation 1/R | 0 | equals the base's |
| pissa    | sqrt(S_R / s) V_R^T of W = U S V^T | U_R sqrt(S_R / s) | equals the base's: the start is taken off again as two constants |
| loftq    | factors of W - dequantize(Q), s divided out | | nearer to the unquantized model than the quantized base is |
| calibrated | as they were written beside a calibrated base (calibrate/low_rank.py) | | the same, nearest on the calibration rows |

An embedding begins with A = 0 and B ~ N(0, 1) for default and gaussian.  All draws happen in float32 on the CPU, so a seed means the same
start on every device.  LoftQ quantizes the layer itself and therefore wants a dense base; the others never change the base.

Sources: PiSSA https://arxiv.org/abs/2404.02948, LoftQ https://arxiv.org/abs/2310.08659 (which assumes s = 1; here Q + s B A is fitted).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.config.quant import QuantConfig
from halfbyte.errors import AdapterError, UnsupportedError
from halfbyte.lora.embedding import LoraEmbedding
from halfbyte.lora.experts import ExpertUpdate
from halfbyte.lora.layer import LoraLinear
from halfbyte.lora.trained import TrainedParts
from halfbyte.quant.dense import dense_weight
from halfbyte.quant.linear import QuantLinear
from halfbyte.surgery import replace

AdapterLayer = LoraLinear | LoraEmbedding | ExpertUpdate


@dataclass(frozen=True)
class Start:
    """What a start may use: the layer's name, the seeded draws, how LoftQ quantizes, in how many rounds, and factors made beforehand."""

    name: str
    generator: torch.Generator
    quant: QuantConfig
    rounds: int = 1
    begun: Mapping[str, tuple[Tensor, Tensor]] | None = None


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a float32 CPU value into a parameter of any type and place."""
    with torch.no_grad():
        parameter.copy_(value)


def default(layer: AdapterLayer, start: Start) -> None:
    """A small and uniform, B zero; the other way round for an embedding."""
    if isinstance(layer, LoraEmbedding):
        fill(layer.lora_b, torch.randn(layer.lora_b.shape, generator=start.generator))
        return
    drawn = torch.empty(layer.lora_a.shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=start.generator)
    fill(layer.lora_a, drawn)


def gaussian(layer: AdapterLayer, start: Start) -> None:
    """A normal with standard deviation 1 / rank, B zero."""
    if isinstance(layer, LoraEmbedding):
        default(layer, start)
        return
    fill(layer.lora_a, torch.randn(layer.lora_a.shape, generator=start.generator) / layer.rank)


def leading_factors(weight_OI: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """(B (O, R), A (R, I)): the best approximation of rank R, its singular values shared evenly between the two."""
    if rank > min(weight_OI.shape):
        raise AdapterError(
            "an initialisation by singular vectors needs a rank no larger than the layer", code="E-ADAPT-002", place=name,
            found=f"rank {rank}", expected=f"at most {min(weight_OI.shape)}", remedy="lower lora.rank, or set lora.init=default",
        )  # fmt: skip
    u, s, vh = torch.linalg.svd(weight_OI.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def only_linear(layer: AdapterLayer, start: Start, what: str) -> LoraLinear:
    """The layer, if it is a LoraLinear."""
    if not isinstance(layer, LoraLinear):
        raise UnsupportedError(
            f"init {what} serves linear layers", code="E-UNSUP-040", place=start.name, found=type(layer).__name__,
            expected="default or gaussian", remedy=f"take {start.name} out of the targets, or set lora.init=default",
        )  # fmt: skip
    return layer


def pissa(layer: AdapterLayer, start: Start) -> None:
    """Begin at the largest singular directions of the base; the same product is subtracted as a constant."""
    layer = only_linear(layer, start, "pissa")
    lora_b, lora_a = leading_factors(dense_weight(layer.frozen_base), layer.rank, start.name)
    root = math.sqrt(layer.scaling)
    fill(layer.lora_a, lora_a / root)
    fill(layer.lora_b, lora_b / root)
    layer.start_a, layer.start_b = layer.lora_a.detach().clone(), layer.lora_b.detach().clone()


def loftq(layer: AdapterLayer, start: Start) -> None:
    """Quantize the base so that, together with the factors, it is near the dense weight: Q = quant(W - LR), LR = svd_R(W - Q), in turns."""
    layer = only_linear(layer, start, "loftq")
    base = layer.frozen_base
    if isinstance(base, QuantLinear) or start.quant.format in ("none", "int8"):
        raise UnsupportedError(
            "init loftq quantizes the dense layer itself, into 4 bits", code="E-UNSUP-045", place=start.name,
            found=f"{type(base).__name__}, format {start.quant.format}", expected="a dense base and format nf4 or fp4",
            remedy="load the model without quantization, or set lora.init=pissa",
        )  # fmt: skip
    weight = dense_weight(base)
    wide, low_rank = weight.float(), torch.zeros(())
    format_name = "fp4" if start.quant.format == "fp4" else "nf4"
    for _ in range(start.rounds):
        part = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        part.weight = nn.Parameter((wide - low_rank).to(weight.dtype), requires_grad=False)
        bias = getattr(base, "bias", None)
        part.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        packed = QuantLinear.from_linear(part, format_name, start.quant.blocksize, start.quant.double_quant, start.name)
        lora_b, lora_a = leading_factors(wide - dense_weight(packed).float(), layer.rank, start.name)
        low_rank = lora_b @ lora_a
    root = math.sqrt(layer.scaling)
    fill(layer.lora_a, lora_a / root)
    fill(layer.lora_b, lora_b / root)
    replace(layer.base if isinstance(layer.base, TrainedParts) else layer, "base", packed)


def calibrated(layer: AdapterLayer, start: Start) -> None:
    """The factors that were made for this layer when its base was calibrated; the default start for a layer without."""
    if start.begun is None:
        raise UnsupportedError(
            "init calibrated needs the start that was written beside a calibrated base", code="E-UNSUP-049", place=start.name,
            found="a model without one", expected="halfbyte train with quant.calibrate=true or with a base that has a start",
            remedy="set lora.init=default, or load the adapter in the folder start with load_adapter",
        )  # fmt: skip
    if start.name not in start.begun:
        default(layer, start)
        return
    lora_a, lora_b = start.begun[start.name]
    fill(layer.lora_a, lora_a)
    fill(layer.lora_b, lora_b)


INITS: dict[str, Callable[[AdapterLayer, Start], None]] = {
    "default": default, "gaussian": gaussian, "pissa": pissa, "loftq": loftq, "calibrated": calibrated,
}  # fmt: skip
