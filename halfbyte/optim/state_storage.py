"""How AdamW's two moments are kept: 32-bit floats, or 8 bits a value with one scale per 256.

A state is a flat dict of tensors, so it goes to safetensors as it is:

    float32   m, v                                     as the parameter
    int8      m_indices, v_indices  uint8 (n,)         m_absmax, v_absmax  float32 (ceil(n / 256),)

m uses the signed dynamic codebook, v the unsigned one (https://arxiv.org/abs/2110.02861).  A second moment above zero is never stored as
zero: the update divides by its root, and a lost v under a kept m would be a step of 1/eps.  Parameters with fewer than 4096 elements stay
in 32 bits, where the saving is nothing and the error shows.
"""

from functools import lru_cache

import torch
from torch import Tensor

from halfbyte.kernels.adamw import BLOCKSIZE
from halfbyte.quant.codebooks import CODEBOOKS

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


@lru_cache(maxsize=16)
def _codebooks_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """Both codebooks on a device, copied there once: such a copy waits for all that the device has to do."""
    first, second = (CODEBOOKS[CODEBOOK_OF[moment]].to(device) for moment in ("m", "v"))
    return first, second


def int8_moments(state: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both 8-bit moments as `kernels.adamw.adamw_int8_` takes them: indices and scales of m, of v, then the two codebooks."""
    books = _codebooks_on(state["m_indices"].device)
    return state["m_indices"], state["m_absmax"], state["v_indices"], state["v_absmax"], *books
