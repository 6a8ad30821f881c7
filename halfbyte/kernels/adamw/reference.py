"""The specification of adamw in plain PyTorch; see the package for the formula."""

import torch
from torch import Tensor

from halfbyte.kernels.dequantize_blockwise import dequantize_blockwise
from halfbyte.kernels.quantize_blockwise import quantize_blockwise

BLOCKSIZE = 256
CHUNK = 4 * 2**20
"""Elements updated at once with 8-bit state: bounds the float32 temporaries at about 64 MiB."""


def adamw_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> None:
    """p, m, v in place."""
    g = grad.to(m.dtype)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.mul_(1 - lr * weight_decay)
    p.addcdiv_(m, v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps), value=-lr / (1 - beta1**step))


def adamw_int8_(
    p: Tensor, grad: Tensor, m_indices: Tensor, m_absmax: Tensor, v_indices: Tensor, v_absmax: Tensor, m_codebook: Tensor,
    v_codebook: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    """p and the moments in place, chunk by chunk."""
    flat, gradients = p.reshape(-1), grad.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        piece = slice(start, min(start + CHUNK, flat.numel()))
        blocks = slice(start // BLOCKSIZE, -(-piece.stop // BLOCKSIZE))
        size = piece.stop - start
        m = dequantize_blockwise(m_indices[piece], m_absmax[blocks], m_codebook, BLOCKSIZE, size, torch.float32)
        v = dequantize_blockwise(v_indices[piece], v_absmax[blocks], v_codebook, BLOCKSIZE, size, torch.float32)
        adamw_(flat[piece], gradients[piece], m, v, lr, beta1, beta2, eps, weight_decay, step)
        m_indices[piece], m_absmax[blocks] = quantize_blockwise(m, m_codebook, BLOCKSIZE)
        indices, v_absmax[blocks] = quantize_blockwise(v, v_codebook, BLOCKSIZE)
        v_indices[piece] = torch.where((indices == 0) & (v > 0), 1, indices)
    if not p.is_contiguous():  # then reshape gave a copy
        p.copy_(flat.view_as(p))
