"""What is needed, beside the packed bytes, to read a quantized tensor back.  Frozen: a state never changes after it is made."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from halfbyte.quant.storage_cost import NESTED_BLOCKSIZE

FORMATS = ("nf4", "fp4", "int8")


@dataclass(frozen=True)
class Nested:
    """Scales stored in 8 bits: absmax_i = codebook[indices_i] * absmax2_{i // blocksize} + offset, all in fp32.

    absmax2 (ceil(N/256),), codebook (256,), offset () fp32: the mean that was taken off before.
    """

    absmax2: Tensor
    codebook: Tensor
    offset: Tensor
    blocksize: int = NESTED_BLOCKSIZE

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the kernels take it."""
        return self.absmax2, self.codebook, self.offset


@dataclass(frozen=True)
class QuantState:
    """How the bytes of one tensor are read.

    format     "nf4", "fp4" or "int8"
    codebook   (16,) fp32; empty for int8
    absmax     (N,) fp32, or (N,) uint8 indices when nested; for int8 the largest |w| of each row (O,)
    blocksize  elements per scale; for int8 the row length
    shape      of the dense tensor
    dtype      the dense tensor had before, and gets back
    """

    format: str
    codebook: Tensor
    absmax: Tensor
    blocksize: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nested: Nested | None = None

    @property
    def numel(self) -> int:
        """Elements of the dense tensor."""
        return prod(self.shape)
