"""search_scales: for each block of a weight the multiple of its largest magnitude with the least weighted error in 16 levels.

    a_b = max |w| over block b        s_b = m a_b,  m in multiples, the first with the least  sum_j h_j (w_j - s_b level(w_j / s_b))^2
    level(v) = the level at the rank of v among the midpoints of the sorted levels

Blocks run over the row-major flattening and may begin in the middle of a row; h belongs to a weight's column.  A block of zeros gets 0.
The error is summed in float32 in no given order: of two multiples whose errors differ by rounding alone either may be taken.

Source: https://arxiv.org/abs/2306.00978 (activation-weighted error), https://arxiv.org/abs/2305.14314 (NF4)
Shapes: weight (O, I); importance h (I,) fp32; codebook (16,) fp32; multiples m (M,) fp32 -> scales (ceil(O I / blocksize),) fp32
"""

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.library import LIBRARY

OP = "search_scales"
LIBRARY.define("search_scales(Tensor weight, Tensor importance, Tensor codebook, Tensor multiples, int blocksize) -> Tensor")


def check(weight: Tensor, importance: Tensor, codebook: Tensor, multiples: Tensor, blocksize: int) -> None:
    """Raise ValueError where the arguments are not of the shapes and dtypes above."""
    if weight.dim() != 2 or importance.shape != weight.shape[1:]:
        raise ValueError(f"a weight (O, I) and an importance (I,) are needed, found {tuple(weight.shape)} and {tuple(importance.shape)}")
    if codebook.shape != (16,) or multiples.dim() != 1 or multiples.numel() == 0:
        raise ValueError(f"16 levels and some multiples are needed, found {tuple(codebook.shape)} and {tuple(multiples.shape)}")
    if not weight.is_floating_point() or any(one.dtype != torch.float32 for one in (importance, codebook, multiples)):
        raise ValueError(f"a floating-point weight with float32 tables, found {weight.dtype} and "
                         f"{importance.dtype}, {codebook.dtype}, {multiples.dtype}")
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize must be even and positive, found {blocksize}")


def _serve(weight: Tensor, importance: Tensor, codebook: Tensor, multiples: Tensor, blocksize: int) -> Tensor:
    check(weight, importance, codebook, multiples, blocksize)
    return listing.implementation(OP, weight).search_scales(weight, importance, codebook, multiples, blocksize)


def _fake(weight: Tensor, importance: Tensor, codebook: Tensor, multiples: Tensor, blocksize: int) -> Tensor:
    return weight.new_empty((-(-weight.numel() // blocksize),), dtype=torch.float32)


LIBRARY.impl("search_scales", _serve, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::search_scales", _fake, lib=LIBRARY)


def search_scales(weight: Tensor, importance: Tensor, codebook: Tensor, multiples: Tensor, blocksize: int) -> Tensor:
    """(N,) fp32; see the module for formula and shapes.  Raises ValueError on wrong arguments."""
    return torch.ops.halfbyte.search_scales(weight, importance, codebook, multiples, blocksize)
