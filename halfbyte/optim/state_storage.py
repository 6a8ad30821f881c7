"""How AdamW's two moments are kept: 32-bit floats, or 8 bits a value with one scale per 256.

A state is a flat dict of tensors, so it goes to safetensors as it is:

    float32   m, v                                     as the parameter
    int8      m_indices, v_indices  uint8 (n,)         m_absmax, v_absmax  float32 (ceil(n / 256),)

m uses the signed dynamic codebook, v the unsigned one (https://arxiv.org/abs/2110.02861).  A second moment above zero is never stored as
zero: the update divides by its root, and a lost v under a kept m would be a step of 1/eps.  Parameters with fewer than 4096 elements stay
in 32 bits, where the saving is nothing and the error shows.
"""

import torch
from torch import Tensor

from halfbyte.kernels.dequantize_blockwise import dequantize_blockwise
from halfbyte.kernels.quantize_blockwise import quantize_blockwise
from halfbyte.quant.codebooks import CODEBOOKS

BLOCKSIZE = 256
SMALLEST_INT8 = 4096
CODEBOOK_OF = {"m": "dynamic-signed", "v": "dynamic-unsigned"}


def new_moments(parameter: Tensor, kind: str) -> dict[str, Tensor]:
    """Moments at zero for `parameter`; `kind` is "float32" or "int8"."""
    if kind == "float32" or parameter.numel() < SMALLEST_INT8:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return {moment: torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format) for moment in ("m", "v")}
    count = parameter.numel()
    moments = {}
    for moment in ("m", "v"):
        moments[f"{moment}_indices"] = torch.zeros(count, dtype=torch.uint8, device=parameter.device)
        moments[f"{moment}_absmax"] = torch.zeros(-(-count // BLOCKSIZE), dtype=torch.float32, device=parameter.device)
    return moments


def is_int8(state: dict[str, Tensor]) -> bool:
    """True when the state's moments are kept in 8 bits."""
    return "m_indices" in state


def read(state: dict[str, Tensor], moment: str, start: int, stop: int) -> Tensor:
    """Elements start .. stop of an 8-bit moment as float32; `start` must be a multiple of 256."""
    indices = state[f"{moment}_indices"][start:stop]
    absmax = state[f"{moment}_absmax"][start // BLOCKSIZE : -(-stop // BLOCKSIZE)]
    codebook = CODEBOOKS[CODEBOOK_OF[moment]].to(indices.device)
    return dequantize_blockwise(indices, absmax, codebook, BLOCKSIZE, stop - start, torch.float32)


def write(state: dict[str, Tensor], moment: str, start: int, values: Tensor) -> None:
    """Store float32 `values` (n,) as elements start .. start + n of an 8-bit moment; `start` must be a multiple of 256."""
    stop = start + values.numel()
    codebook = CODEBOOKS[CODEBOOK_OF[moment]].to(values.device)
    indices, absmax = quantize_blockwise(values, codebook, BLOCKSIZE)
    if moment == "v":
        indices = torch.where((indices == 0) & (values > 0), 1, indices)
    state[f"{moment}_indices"][start:stop] = indices
    state[f"{moment}_absmax"][start // BLOCKSIZE : -(-stop // BLOCKSIZE)] = absmax
