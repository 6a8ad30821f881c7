"""linear_cross_entropy as an autograd function in plain PyTorch, chunk by chunk; and its specification `plain`."""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
CHUNK_BYTES = 64 << 20  # fp32 logits of one chunk


def plain(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, *, bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """The specification: all logits at once, gradients by autograd."""
    logits = torch.nn.functional.linear(hidden_NH, weight_VH, bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, labels_N, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, *, bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """() sum of the token losses; differentiable in hidden, and in weight and bias where they require a gradient.

    No label at all gives 0 with zero gradients.  Raises ValueError on shapes that do not fit or a label outside 0..V-1.
    """
    if hidden_NH.dim() != 2 or labels_N.shape != hidden_NH.shape[:1] or weight_VH.shape[1] != hidden_NH.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_NH.shape)}, weight {tuple(weight_VH.shape)}, labels {tuple(labels_N.shape)} do not fit")
    if torch.is_autocast_enabled(hidden_NH.device.type):
        dtype = torch.get_autocast_dtype(hidden_NH.device.type)
        hidden_NH, weight_VH, bias = hidden_NH.to(dtype), weight_VH.to(dtype), None if bias is None else bias.to(dtype)
    return _LinearCrossEntropy.apply(hidden_NH, weight_VH, labels_N, bias, softcap, float(scale))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, scale: float
    ) -> Tensor:
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = (labels != IGNORED).nonzero().reshape(-1)
        kept = labels[rows]
        vocabulary = weight.shape[0]
        if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= vocabulary):
            raise ValueError(f"labels must be -100 or within 0..{vocabulary - 1}, found {int(kept.min())}..{int(kept.max())}")
        loss = hidden.new_zeros((), dtype=exact)
        # the large sums are kept in fp32 whatever the dtype of the weights
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        d_bias = hidden.new_zeros(vocabulary, dtype=exact) if needs_bias else None
        for part in range(0, rows.numel(), max(1, CHUNK_BYTES // (4 * vocabulary))):
            piece = slice(part, part + max(1, CHUNK_BYTES // (4 * vocabulary)))
            x = hidden[rows[piece]]
            z = torch.nn.functional.linear(x, weight, bias).to(exact)
            loss += _loss_and_gradient(z, kept[piece], softcap, scale, any(ctx.needs_input_grad))
            if not any(ctx.needs_input_grad):
                continue
            dz = z.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows[piece]] = dz @ weight
            if d_weight is not None:
                d_weight += dz.T @ x
            if d_bias is not None:
                d_bias += z.sum(dim=0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scalar,) = upstream
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if d_hidden is None else (d_hidden * scalar).to(d_hidden.dtype),
            None if d_weight is None else (d_weight * scalar).to(weight_dtype),
            None,
            None if d_bias is None else (d_bias * scalar).to(bias_dtype),
            None,
            None,
        )


def _loss_and_gradient(z: Tensor, labels: Tensor, softcap: float | None, scale: float, gradient: bool) -> Tensor:
    """Summed loss of one chunk; z (n, V) raw logits become dloss/dz in place where `gradient`."""
    z *= scale
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = 1 - z * z
        z *= softcap
    true = z.gather(1, labels[:, None])
    log_total = torch.logsumexp(z, dim=1, keepdim=True)
    loss = (log_total - true).sum()
    if gradient:
        z.sub_(log_total).exp_()
        z.scatter_add_(1, labels[:, None], z.new_full((len(labels), 1), -1.0))
        if softcap is not None:
            z *= slope
        z *= scale
    return loss
