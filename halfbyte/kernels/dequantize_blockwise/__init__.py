"""dequantize_blockwise: indices, scales and a codebook back to numbers.

    w_i      = codebook[index_i] * absmax_{i // blocksize}       in fp32, then one round-to-nearest-even to `dtype`
    absmax_b = nested_codebook[absmax_index_b] * absmax2_{b // 256} + offset      where the scales are stored in 8 bits (`nested`)

The inverse of quantize_blockwise as to layout; double quantization is undone in the same pass, a product and a sum per block with two
roundings.  The same bits on every device.

Source: https://arxiv.org/abs/2305.14314 (QLoRA, equation 6)
Shapes: stored (ceil(n/2),) for 16 levels or (n,) for 256, uint8; absmax (N,) fp32, N = ceil(n/blocksize); codebook fp32 -> (n,) of `dtype`
        nested: absmax (N,) uint8; absmax2 (ceil(N/256),), nested_codebook (256,), offset () fp32
"""

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.library import LIBRARY

OP = "dequantize_blockwise"
NESTED_BLOCKSIZE = 256
Nested = tuple[Tensor, Tensor, Tensor]  # absmax2, nested_codebook, offset
LIBRARY.define(
    "dequantize_blockwise(Tensor stored, Tensor absmax, Tensor codebook, int blocksize, SymInt numel, ScalarType dtype,"
    " Tensor? absmax2=None, Tensor? nested_codebook=None, Tensor? offset=None) -> Tensor"
)


def check(stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, nested: Nested | None = None) -> None:
    """Raise ValueError where the arguments do not fit each other."""
    if codebook.dtype != torch.float32 or codebook.dim() != 1 or codebook.shape[0] not in (16, 256):
        raise ValueError(f"codebook must be float32 of 16 or 256 levels, found {codebook.dtype} of shape {tuple(codebook.shape)}")
    wanted = (numel + 1) // 2 if codebook.shape[0] == 16 else numel
    if stored.dtype != torch.uint8 or stored.numel() != wanted:
        raise ValueError(f"{numel} elements are stored in {wanted} bytes of uint8, found {stored.numel()} of {stored.dtype}")
    blocks = -(-numel // blocksize)
    kind = torch.float32 if nested is None else torch.uint8
    if absmax.dtype != kind or absmax.numel() != blocks:
        raise ValueError(f"{numel} elements have {blocks} scales of {kind}, found {absmax.numel()} of {absmax.dtype}")
    if nested is not None:
        sizes = (-(-blocks // NESTED_BLOCKSIZE), 256, 1)
        for name, part, size in zip(("absmax2", "nested_codebook", "offset"), nested, sizes, strict=True):
            if part.dtype != torch.float32 or part.numel() != size:
                raise ValueError(f"{name} of {blocks} nested scales must be {size} float32, found {part.numel()} of {part.dtype}")


def _serve(
    stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype,
    absmax2: Tensor | None = None, nested_codebook: Tensor | None = None, offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    nested = nested_of(absmax2, nested_codebook, offset)
    check(stored, absmax, codebook, blocksize, numel, nested)
    serving = listing.implementation(OP, stored, dtype)
    return serving.dequantize_blockwise(stored, absmax, codebook, blocksize, numel, dtype, nested)


def nested_of(absmax2: Tensor | None, nested_codebook: Tensor | None, offset: Tensor | None) -> Nested | None:
    """The three parts together, or None where there are none.  Raises ValueError where only some are given."""
    if absmax2 is not None and nested_codebook is not None and offset is not None:
        return absmax2, nested_codebook, offset
    if absmax2 is not None or nested_codebook is not None or offset is not None:
        raise ValueError("absmax2, nested_codebook and offset belong together")
    return None


def _fake(
    stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype,
    absmax2: Tensor | None = None, nested_codebook: Tensor | None = None, offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return stored.new_empty((numel,), dtype=dtype)


LIBRARY.impl("dequantize_blockwise", _serve, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::dequantize_blockwise", _fake, lib=LIBRARY)


def dequantize_blockwise(
    stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype, nested: Nested | None = None
) -> Tensor:
    """(numel,) of `dtype`; see the module for formula and shapes.  Raises ValueError on arguments that do not fit each other."""
    return torch.ops.halfbyte.dequantize_blockwise(stored, absmax, codebook, blocksize, numel, dtype, *(nested or ()))


def dequantize_into(out: Tensor, stored: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, nested: Nested | None = None) -> Tensor:
    """The same into a contiguous tensor that is there already, which is returned: a caller that reuses it asks for no fresh pages."""
    check(stored, absmax, codebook, blocksize, out.numel(), nested)
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, found strides {out.stride()}")
    listing.implementation(OP, out).dequantize_into(out, stored, absmax, codebook, blocksize, nested)
    return out
