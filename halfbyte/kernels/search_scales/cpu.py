"""search_scales on the CPU: 16 weights at a time are scaled, ranked, looked up and their error summed, nothing is stored on the way.

A block's columns are read from an importance that is repeated past the row's end, so that a block may run over it.  Block sizes that are
no multiple of 16 take the reference; so does, filled up with zeros, a shorter last block.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.kernels.native import native
from halfbyte.kernels.quantize_blockwise.reference import thresholds_of
from halfbyte.kernels.search_scales import reference

_ONE, _ZERO = np.float32(1), np.float32(0)


@native(
    "w: T*, importance: f32*, thresholds: f32*, levels: f32*, multiples: f32*, count: i64, columns: i64, blocksize: i64, scales: f32*",
    T=("bf16", "f32"), lazy=True,
)  # fmt: skip
def search() -> Any:
    """Blocks first..last of `count` multiples."""
    from halfbyte.kernels.vectors import fused, larger, largest, load16, look_up, magnitude_bits, rank16, splat, times, total

    def kernel(  # type: ignore[no-untyped-def]
        w, importance, thresholds, levels, multiples, count, columns, blocksize, scales, first, last
    ):
        steps, codes = load16(thresholds, 0), load16(levels, 0)
        for block in range(first, last):
            start = block * blocksize
            column = start % columns
            top = magnitude_bits(load16(w, start))
            for i in range(16, blocksize, 16):
                top = larger(top, magnitude_bits(load16(w, start + i)))
            absmax = largest(top)
            best, least = absmax, np.float32(np.inf)
            for which in range(count):
                scale = absmax * multiples[which]
                inverse = splat(_ONE / scale if scale > _ZERO else _ZERO)
                away = splat(-scale)
                error = splat(_ZERO)
                for i in range(0, blocksize, 16):
                    value = load16(w, start + i)
                    gap = fused(look_up(codes, rank16(times(value, inverse), steps)), away, value)
                    error = fused(times(gap, gap), load16(importance, column + i), error)
                found = total(error)
                if found < least:
                    best, least = scale, found
            scales[block] = best

    return kernel


def search_scales(weight: Tensor, importance: Tensor, codebook: Tensor, multiples: Tensor, blocksize: int) -> Tensor:
    """weight (O, I), importance (I,), codebook (16,), multiples (M,) -> scales (N,) fp32."""
    if blocksize % 16:
        return reference.search_scales(weight, importance, codebook, multiples, blocksize)
    flat, columns = weight.detach().contiguous().reshape(-1), weight.shape[1]
    if flat.dtype == torch.float16:
        flat = flat.float()
    whole, rest = divmod(flat.numel(), blocksize)
    scales = torch.empty(whole + bool(rest), dtype=torch.float32)
    around = importance.repeat(2 + blocksize // columns)
    thresholds = F.pad(thresholds_of(codebook)[0], (0, 1), value=torch.inf)
    tables = (around, thresholds, codebook.sort().values, multiples)
    if whole:
        search(whole, flat, *tables, len(multiples), columns, blocksize, scales, work=flat.numel())
    if rest:
        start = whole * blocksize
        last = F.pad(flat[start:].float(), (0, blocksize - rest))
        turned = around[start % columns :][:blocksize].contiguous()
        scales[whole:] = reference.search_scales(last[None], turned, codebook, multiples, blocksize)
    return scales
