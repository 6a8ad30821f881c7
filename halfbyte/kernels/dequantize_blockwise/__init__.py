"""dequantize_blockwise: indices, scales and a codebook back to numbers.

    w_i = codebook[index_i] * absmax_{i // blocksize}       in fp32, then one round-to-nearest-even to `dtype`

The inverse of quantize_blockwise as to layout; the same bits on every device.

Source: https://arxiv.org/abs/2305.14314 (QLoRA, equation 6)
Shapes: stored (ceil(n/2),) for 16 levels or (n,) for 256, uint8; absmax (ceil(n/blocksize),) fp32; codebook fp32 -> (n,) of `dtype`
"""

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.dequantize_blockwise import reference
from halfbyte.kernels.library import LIBRARY

LIBRARY.define(
    "dequantize_blockwise(Tensor stored, Tensor absmax, Tensor codebook, int blocksize, SymInt numel, ScalarType dtype) -> Tensor"
)


def check(stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int) -> None:
    """Raise ValueError where the arguments do not fit each other."""
    if codebook.dtype != torch.float32 or codebook.dim() != 1 or codebook.shape[0] not in (16, 256):
        raise ValueError(f"codebook must be float32 of 16 or 256 levels, found {codebook.dtype} of shape {tuple(codebook.shape)}")
    wanted = (numel + 1) // 2 if codebook.shape[0] == 16 else numel
    if stored.dtype != torch.uint8 or stored.numel() != wanted:
        raise ValueError(f"{numel} elements are stored in {wanted} bytes of uint8, found {stored.numel()} of {stored.dtype}")
    if absmax.dtype != torch.float32 or absmax.numel() != -(-numel // blocksize):
        raise ValueError(f"{numel} elements have {-(-numel // blocksize)} float32 scales, found {absmax.numel()} of {absmax.dtype}")


def _cpu(stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype) -> Tensor:
    check(stored, absmax, codebook, blocksize, numel)
    if listing.chosen("dequantize_blockwise", "cpu") == "reference" or dtype == torch.float64:
        return reference.dequantize_blockwise(stored, absmax, codebook, blocksize, numel, dtype)
    from halfbyte.kernels.dequantize_blockwise import cpu  # compiles on first use

    return cpu.dequantize_blockwise(stored, absmax, codebook, blocksize, numel, dtype)


def _any_device(stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype) -> Tensor:
    check(stored, absmax, codebook, blocksize, numel)
    listing.chosen("dequantize_blockwise", stored.device.type)
    return reference.dequantize_blockwise(stored, absmax, codebook, blocksize, numel, dtype)


def _fake(stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype) -> Tensor:
    return stored.new_empty((numel,), dtype=dtype)


LIBRARY.impl("dequantize_blockwise", _cpu, "CPU")
LIBRARY.impl("dequantize_blockwise", _any_device, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::dequantize_blockwise", _fake, lib=LIBRARY)


def dequantize_blockwise(stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype) -> Tensor:
    """(numel,) of `dtype`; see the module for formula and shapes.  Raises ValueError on arguments that do not fit each other."""
    return torch.ops.halfbyte.dequantize_blockwise(stored, absmax, codebook, blocksize, numel, dtype)
