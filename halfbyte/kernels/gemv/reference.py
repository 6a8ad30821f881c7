"""gemv in plain PyTorch: float32 inside, float64 stays."""

import torch
from torch import Tensor


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    y = x.to(exact) @ weight.to(exact).T
    return (y if bias is None else y + bias.to(exact)).to(x.dtype)
