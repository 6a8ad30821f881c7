"""The specification of rope in plain PyTorch; see the package for the formula."""

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """x (T, H, D), cos and sin (T, R) -> (T, H, D)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[1] // 2
    a, b = x[..., :half].to(exact), x[..., half : 2 * half].to(exact)
    ca, cb = cos.to(exact)[:, None].split(half, dim=-1) if half else (cos, cos)
    sa, sb = sin.to(exact)[:, None].split(half, dim=-1) if half else (sin, sin)
    turned = (a * ca + b * sb, b * cb - a * sa) if inverse else (a * ca - b * sa, b * cb + a * sb)
    return torch.cat([*(part.to(x.dtype) for part in turned), x[..., 2 * half :]], dim=-1) if half else x.clone()


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """The same in place."""
    x.copy_(rope(x, cos, sin, inverse))
