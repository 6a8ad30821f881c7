"""adamw: one AdamW update in place, with moments in fp32 or in 8 bits, each in one pass over memory.

    m = m + (1 - beta1) (g - m)            v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr wd)                      decoupled decay, before the update
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

In 8 bits a moment is read as in dequantize_blockwise (256 levels, blocks of 256), updated in fp32, applied from fp32, and only then
rounded as in quantize_blockwise; a second moment above zero is never stored as zero, for the update divides by its root.  t is the
number of this step, from 1.  The gradient may be bfloat16; it is widened in registers.

Source: https://arxiv.org/abs/1711.05101, https://arxiv.org/abs/2110.02861
Shapes: p, grad, m, v any one shape; indices (n,) uint8, absmax (ceil(n/256),) fp32, codebooks (256,) fp32
"""

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.library import LIBRARY

OP = "adamw"
BLOCKSIZE = 256
_NUMBERS = "float lr, float beta1, float beta2, float eps, float weight_decay, int step"
LIBRARY.define(f"adamw_(Tensor(a!) p, Tensor grad, Tensor(b!) m, Tensor(c!) v, {_NUMBERS}) -> ()")
LIBRARY.define(
    "adamw_int8_(Tensor(a!) p, Tensor grad, Tensor(b!) m_indices, Tensor(c!) m_absmax, Tensor(d!) v_indices, Tensor(e!) v_absmax, "
    f"Tensor m_codebook, Tensor v_codebook, {_NUMBERS}) -> ()"
)


def _check(p: Tensor, grad: Tensor, step: int) -> None:
    if grad.shape != p.shape or p.dtype not in (torch.float32, torch.float64) or not grad.is_floating_point():
        raise ValueError(f"a gradient {grad.dtype} {tuple(grad.shape)} does not fit a parameter {p.dtype} {tuple(p.shape)}")
    if step < 1:
        raise ValueError(f"steps are counted from 1, found {step}")


def _serve(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> None:
    _check(p, grad, step)
    if m.shape != p.shape or v.shape != p.shape or m.dtype != p.dtype or v.dtype != p.dtype:
        raise ValueError(f"moments {m.dtype} {tuple(m.shape)}, {v.dtype} {tuple(v.shape)} do not fit {p.dtype} {tuple(p.shape)}")
    listing.implementation(OP, p).adamw_(p, grad, m, v, lr, beta1, beta2, eps, weight_decay, step)


def _serve_int8(
    p: Tensor, grad: Tensor, m_indices: Tensor, m_absmax: Tensor, v_indices: Tensor, v_absmax: Tensor, m_codebook: Tensor,
    v_codebook: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    _check(p, grad, step)
    for indices, absmax, codebook in ((m_indices, m_absmax, m_codebook), (v_indices, v_absmax, v_codebook)):
        fits = indices.numel() == p.numel() and absmax.numel() == -(-p.numel() // BLOCKSIZE) and codebook.numel() == 256
        if not fits or indices.dtype != torch.uint8 or absmax.dtype != torch.float32 or codebook.dtype != torch.float32:
            raise ValueError(f"a moment of {indices.numel()} indices and {absmax.numel()} scales does not fit {p.numel()} parameters")
    listing.implementation(OP, p).adamw_int8_(
        p, grad, m_indices, m_absmax, v_indices, v_absmax, m_codebook, v_codebook, lr, beta1, beta2, eps, weight_decay, step
    )


LIBRARY.impl("adamw_", _serve, "CompositeExplicitAutograd")
LIBRARY.impl("adamw_int8_", _serve_int8, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::adamw_", lambda *arguments: None, lib=LIBRARY)
torch.library.register_fake("halfbyte::adamw_int8_", lambda *arguments: None, lib=LIBRARY)


def adamw_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> None:
    """One update of p, m and v in place; see the module.  Raises ValueError on arguments that do not fit each other."""
    torch.ops.halfbyte.adamw_(p, grad, m, v, lr, beta1, beta2, eps, weight_decay, step)


def adamw_int8_(
    p: Tensor, grad: Tensor, m_indices: Tensor, m_absmax: Tensor, v_indices: Tensor, v_absmax: Tensor, m_codebook: Tensor,
    v_codebook: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    """One update of p and of both 8-bit moments in place; see the module.  Raises ValueError on arguments that do not fit each other."""
    torch.ops.halfbyte.adamw_int8_(
        p, grad, m_indices, m_absmax, v_indices, v_absmax, m_codebook, v_codebook, lr, beta1, beta2, eps, weight_decay, step
    )
