"""quantize_blockwise: a tensor to indices into a codebook, one scale per block.

    absmax_b = max |x_i| over block b                       (fp32; 16-bit inputs are widened first)
    s_i      = x_i * (1 / max(absmax_b, 1e-38))             full blocks: reciprocal, then multiply
    s_i      = x_i / max(absmax_b, 1e-38)                   the last, shorter block: divide; of 16 levels it also stores that maximum
    index_i  = number of thresholds t_j with s_i > t_j,  t_j = fp32 midpoints of the sorted codebook

A codebook of 16 levels packs two indices per byte, high nibble first; an odd last element is paired with the index of 0.
A codebook of 256 levels gives one index per byte.  A codebook need not be sorted (FP4 is not): ranks are mapped back to its order.
Blocks run over the row-major flattening.  Non-finite input gives an absmax that is not finite and indices without meaning; the
caller refuses it (`quant.blockwise`).  The rule, down to which side divides, is the one whose bytes bitsandbytes writes on a CPU.

Source: https://arxiv.org/abs/2305.14314 (QLoRA, section 3), https://arxiv.org/abs/2110.02861 (blockwise quantization)
Shapes: x any, n elements; codebook (16,) or (256,) fp32 -> packed (ceil(n/2),) or indices (n,) uint8, absmax (ceil(n/blocksize),) fp32
"""

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.library import LIBRARY

OP = "quantize_blockwise"
LIBRARY.define("quantize_blockwise(Tensor x, Tensor codebook, int blocksize) -> (Tensor, Tensor)")


def check(x: Tensor, codebook: Tensor, blocksize: int) -> None:
    """Raise ValueError where the arguments are not of the shapes and dtypes above."""
    if codebook.dtype != torch.float32 or codebook.dim() != 1 or codebook.numel() not in (16, 256):
        raise ValueError(f"codebook must be float32 of 16 or 256 levels, found {codebook.dtype} of shape {tuple(codebook.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"only floating-point tensors are quantized, found {x.dtype}")
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize must be even and positive, found {blocksize}")


def _serve(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    check(x, codebook, blocksize)
    return listing.implementation(OP, x).quantize_blockwise(x, codebook, blocksize)


def _fake(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    check(x, codebook, blocksize)
    count = x.numel()
    stored = (count + 1) // 2 if codebook.shape[0] == 16 else count
    return x.new_empty((stored,), dtype=torch.uint8), x.new_empty((-(-count // blocksize),), dtype=torch.float32)


LIBRARY.impl("quantize_blockwise", _serve, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::quantize_blockwise", _fake, lib=LIBRARY)


def quantize_blockwise(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """(stored uint8, absmax fp32) of `x`; see the module for formula and shapes.  Raises ValueError on wrong arguments."""
    return torch.ops.halfbyte.quantize_blockwise(x, codebook, blocksize)
