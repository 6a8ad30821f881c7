"""Quantize a weight tensor and read it back.

nf4, fp4   blocks over the row-major flattening, two indices per byte, one fp32 scale per block; with double quantization the
           scales less their mean are themselves quantized to 8 bits in blocks of 256
int8       the row format of LLM.int8(): w (O, I) -> round(w * 127 / rowmax), rowmax (O,)

The kernels need no temporaries; the reference works through a tensor in row blocks, so that its own stay under 32 MiB.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.kernels import listing
from halfbyte.kernels.dequantize_blockwise import dequantize_blockwise
from halfbyte.kernels.quantize_blockwise import quantize_blockwise
from halfbyte.kernels.quantize_blockwise.reference import thresholds_of
from halfbyte.quant.codebooks import CODEBOOKS
from halfbyte.quant.int8_matmul import dense_rows
from halfbyte.quant.quant_state import FORMATS, NESTED_BLOCKSIZE, Nested, QuantState

PIECE = 1 << 22  # elements worked on at a time: 16 MiB as float32
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def quantize(
    weight: Tensor, format: str = "nf4", blocksize: int = 64, double_quant: bool = True, name: str = ""
) -> tuple[Tensor, QuantState]:
    """(stored, state) of a floating-point weight of any shape and memory layout; `name` only serves the message.

    stored: uint8 (ceil(n/2),) for nf4 and fp4, int8 (O, I) for int8, which takes 2-D weights only and ignores blocksize.
    Raises WeightError where an element is not finite, ValueError on an unknown format or block size.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, found {format}")
    if weight.numel() == 0:
        raise WeightError("an empty tensor cannot be quantized", code="E-WEIGHT-001", place=name, found=f"shape {tuple(weight.shape)}")
    weight = weight.detach()
    if format == "int8":
        return _quantize_rows(weight, name)
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, found {blocksize}")
    flat = weight.contiguous().reshape(-1)
    codebook = CODEBOOKS[format].to(weight.device)
    packed, absmax = _in_row_blocks(flat, codebook, blocksize)
    _refuse_non_finite(absmax, weight, name)
    stored_absmax, nested = _nest(absmax) if double_quant else (absmax, None)
    return packed, QuantState(format, codebook.clone(), stored_absmax, blocksize, tuple(weight.shape), weight.dtype, nested)


def pack_with_scales(
    weight: Tensor, absmax: Tensor, format: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> tuple[Tensor, QuantState]:
    """As `quantize`, with these scales (N,) fp32 in the place of the largest magnitudes; nf4 and fp4.

    With double quantization each element gets the level nearest to it at the scale as it reads back from 8 bits.
    """
    codebook = CODEBOOKS[format].to(weight.device)
    thresholds, order = thresholds_of(codebook)
    stored_absmax, nested = _nest(absmax) if double_quant else (absmax, None)
    state = QuantState(format, codebook.clone(), stored_absmax, blocksize, tuple(weight.shape), weight.dtype, nested)
    scales = plain_absmax(state)
    divisors = torch.where(scales == 0, 1.0, scales)
    flat, packed = weight.detach().contiguous().reshape(-1), []
    step = max(1, PIECE // blocksize) * blocksize
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].float()
        fill = -piece.numel() % blocksize
        scaled = F.pad(piece, (0, fill)).view(-1, blocksize) / divisors[start // blocksize : -(-(start + len(piece)) // blocksize), None]
        indices = order[torch.bucketize(scaled.reshape(-1)[: len(piece) + len(piece) % 2], thresholds)].to(torch.uint8)
        packed.append((indices[::2] << 4) | indices[1::2])
    return torch.cat(packed), state


def refuse_non_finite(weight: Tensor, name: str = "") -> None:
    """Raise WeightError where an element is NaN or infinite, with their number."""
    _refuse_non_finite(weight.detach().abs().amax(), weight, name)


def quantize_stack(
    weights: Tensor, format: str, blocksize: int = 64, double_quant: bool = True, names: Sequence[str] = ()
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(packed (E, bytes), absmax (E, N), absmax2 (E, M), offset (E,)) of E weights in one tensor, the bytes of `quantize` on each.

    A weight must be whole blocks.  The last two are None without double quantization.  Raises as `quantize` does, naming the weight.
    """
    count, size = weights.shape[0], weights[0].numel()
    if size % blocksize:
        raise ValueError(f"each weight must be whole blocks of {blocksize}, found {size} elements")
    packed, absmax = _in_row_blocks(weights.detach().contiguous().reshape(-1), CODEBOOKS[format].to(weights.device), blocksize)
    packed, absmax = packed.view(count, -1), absmax.view(count, -1)
    if not _all_finite(absmax):
        for one, weight, name in zip(absmax, weights, names, strict=True):
            _refuse_non_finite(one, weight, name)
    if not double_quant:
        return packed, absmax, None, None
    indices, nested = zip(*(_nest(one) for one in absmax), strict=True)
    return packed, torch.stack(indices), torch.stack([one.absmax2 for one in nested]), torch.stack([one.offset for one in nested])


def _in_row_blocks(flat: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """quantize_blockwise in pieces where it is the reference that serves, which widens what it is given."""
    if flat.numel() <= PIECE or listing.chosen("quantize_blockwise", flat.device.type) != "reference":
        return quantize_blockwise(flat, codebook, blocksize)
    parts = [quantize_blockwise(piece, codebook, blocksize) for piece in flat.split(PIECE)]
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])


def dequantize(stored: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """The dense tensor of `state.shape` in `dtype` (default: the dtype it had before)."""
    dtype = dtype or state.dtype
    if state.format == "int8":
        return dense_rows(stored, state.absmax, dtype)
    nested = None if state.nested is None else state.nested.tensors
    flat = dequantize_blockwise(stored.reshape(-1), state.absmax, state.codebook, state.blocksize, state.numel, dtype, nested)
    return flat.view(state.shape)


def plain_absmax(state: QuantState) -> Tensor:
    """(N,) fp32: the scales, read back where they are stored in 8 bits; the kernels do this on the way."""
    nested = state.nested
    if nested is None:
        return state.absmax
    count = state.absmax.numel()
    scales = dequantize_blockwise(state.absmax, nested.absmax2, nested.codebook, nested.blocksize, count, torch.float32)
    return scales + nested.offset


def _nest(absmax: Tensor) -> tuple[Tensor, Nested]:
    """Scales (N,) fp32 -> (indices (N,) uint8, Nested)."""
    codebook = CODEBOOKS["dynamic-signed"].to(absmax.device)
    offset = absmax.mean()
    indices, absmax2 = quantize_blockwise(absmax - offset, codebook, NESTED_BLOCKSIZE)
    return indices, Nested(absmax2, codebook.clone(), offset)


def _quantize_rows(weight: Tensor, name: str) -> tuple[Tensor, QuantState]:
    """LLM.int8(): weights go through float16 first, as in bitsandbytes, so that the bytes agree."""
    if weight.dim() != 2:
        raise ValueError(f"int8 holds weights of shape (out, in), found {tuple(weight.shape)}")
    rows, columns = weight.shape
    stored = torch.empty((rows, columns), dtype=torch.int8, device=weight.device)
    absmax = torch.empty(rows, dtype=torch.float32, device=weight.device)
    step = max(1, PIECE // columns)
    for start in range(0, rows, step):
        half = weight[start : start + step].to(torch.float16)
        absmax[start : start + step] = half.abs().amax(dim=1)
        top = absmax[start : start + step, None]
        scaled = half * torch.where(top > 0, 127.0 / top, torch.zeros_like(top))
        stored[start : start + step] = scaled.nan_to_num_(0, 0, 0).round_().to(torch.int8)
    _refuse_non_finite(absmax, weight, name)
    empty = torch.empty(0, dtype=torch.float32, device=weight.device)
    return stored, QuantState("int8", empty, absmax, columns, (rows, columns), weight.dtype)


def _all_finite(absmax: Tensor) -> bool:
    """One pass and no copy: the largest is NaN where any is."""
    return math.isfinite(absmax.amax().item())


def _refuse_non_finite(absmax: Tensor, weight: Tensor, name: str) -> None:
    """A scale is finite exactly when all elements of its block are."""
    if _all_finite(absmax):
        return
    count = sum(int((~torch.isfinite(part)).sum()) for part in weight.reshape(-1).split(PIECE))
    what = f"{count} of {weight.numel()} elements are NaN or infinite" if count else "values beyond float16's range (65504)"
    raise WeightError(
        "only finite weights can be quantized", code="E-WEIGHT-002", place=f"tensor {name}" if name else "",
        found=what, expected="finite numbers" if count else "numbers that float16 can hold",
        remedy="check the file for damage, or load it without quantization" if count else "use nf4, which takes any finite number",
    )
