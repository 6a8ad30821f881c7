"""One layer: searched scales where the checking rows say they are better, and the low-rank start on what is left over.

Nothing is taken on trust.  Searched scales are kept only if the output error falls on rows that were not fitted (and does not rise on
those that were); otherwise the layer gets the plain bytes.  The start is kept on the same terms; otherwise the layer begins as usual.
"""

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.calibrate.low_rank import factors_on
from halfbyte.calibrate.moments import Seen
from halfbyte.calibrate.quality import LayerQuality
from halfbyte.calibrate.scales import importance_of, quantize_weighted
from halfbyte.config.quant import QuantConfig
from halfbyte.errors import NumericError
from halfbyte.quant import blockwise
from halfbyte.quant.quant_state import QuantState


@dataclass(frozen=True)
class Update:
    """The adapter that a layer is going to carry."""

    rank: int
    scaling: float


@dataclass(frozen=True)
class CalibratedLayer:
    """The packed weight with its state, the factors (A, B) the adapter begins with, and how good all that is."""

    packed: Tensor
    state: QuantState
    factors: tuple[Tensor, Tensor] | None
    quality: LayerQuality


@torch.no_grad()
def calibrate_layer(
    name: str, weight_OI: Tensor, seen: Seen, quant: QuantConfig, update: Update | None = None, seed: int = 0
) -> CalibratedLayer:
    """Quantize the weight of a layer for the inputs it has seen; `update` asks for a start of that rank too.

    Raises WeightError where the weight is not finite, NumericError where squares of weights or inputs are beyond float32.
    """
    plain = blockwise.quantize(weight_OI, quant.format, quant.blocksize, quant.double_quant, name)
    wide = weight_OI.float()
    energy = max(seen.check.error(wide), 1e-30)
    if not (math.isfinite(energy) and bool(seen.fit.diagonal.isfinite().all())):
        raise NumericError(
            "a layer is calibrated on outputs whose squares are finite numbers", code="E-NUM-031", place=name,
            found=f"largest weight {float(wide.abs().max()):.3g}, sum of squares of the inputs {float(seen.fit.diagonal.sum()):.3g}",
            remedy="check the model's weights, or leave the calibration out",
        )  # fmt: skip
    searched = quantize_weighted(
        weight_OI, importance_of(seen.fit.diagonal), quant.format, quant.blocksize, quant.double_quant, name
    )  # fmt: skip
    plain_gap, gap = (wide - blockwise.dequantize(*made, torch.float32) for made in (plain, searched))
    plain_error, error = seen.check.error(plain_gap) / energy, seen.check.error(gap) / energy
    plain_weight_error = relative(plain_gap, wide)
    kind = "calibrated"
    if error >= plain_error or seen.fit.error(gap) > seen.fit.error(plain_gap):
        searched, gap, error, kind = plain, plain_gap, plain_error, "plain"
    factors, with_start = None, None
    if update is not None:
        factors, with_start = start_on(gap, seen, update, torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode())))
        with_start = error if factors is None else with_start / energy
    quality = LayerQuality(
        name, kind, wide.numel(), bits_of(*searched), plain_weight_error, relative(gap, wide), plain_error, error, with_start
    )  # fmt: skip
    return CalibratedLayer(*searched, factors, quality)


def start_on(gap_OI: Tensor, seen: Seen, update: Update, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor] | None, float]:
    """(factors, output error left on the checking rows); None where they make it no smaller."""
    lora_a, lora_b = factors_on(gap_OI, seen.fit, update.rank, update.scaling, generator)
    left = seen.check.error(gap_OI - update.scaling * (lora_b @ lora_a))
    before = seen.check.error(gap_OI)
    return ((lora_a, lora_b), left) if left < before else (None, before)


def relative(gap_OI: Tensor, weight_OI: Tensor) -> float:
    """|gap|^2 / |weight|^2."""
    return float(gap_OI.square().sum() / weight_OI.float().square().sum().clamp_min(1e-30))


def bits_of(packed: Tensor, state: QuantState) -> float:
    """Bits of storage for each element, scales and tables included."""
    nested = () if state.nested is None else state.nested.tensors
    held = sum(tensor.nbytes for tensor in (packed, state.absmax, state.codebook, *nested))
    return 8 * held / state.numel
