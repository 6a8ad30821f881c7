"""linear_cross_entropy as an autograd function, chunk by chunk through one buffer of logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.kernels.scratch import borrowed

IGNORED = -100
ROWS = 64
CHUNK_BYTES = 96 << 20
"""Logits of one chunk in fp32; in bfloat16 the same rows take half of it."""


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


def _whole(x_nH: Tensor, unit: int) -> Tensor:
    """The rows, and on a CPU rows of zeros up to a multiple of `unit`: every new shape costs the products' library memory for good."""
    missing = -len(x_nH) % unit
    return torch.nn.functional.pad(x_nH, (0, 0, 0, missing)) if missing else x_nH


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, scale: float
    ) -> Tensor:
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        exact, vocabulary = torch.promote_types(hidden.dtype, torch.float32), weight.shape[0]
        rows, kept = _trained(labels, vocabulary)
        x_nH = hidden if rows is None else hidden[rows]
        loss = hidden.new_zeros((), dtype=exact)
        # the large sums are kept in fp32 whatever the dtype of the weights
        d_x = torch.empty_like(x_nH) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        d_bias = hidden.new_zeros(vocabulary, dtype=exact) if needs_bias else None
        most = max(1, CHUNK_BYTES // (4 * vocabulary))
        unit = ROWS if hidden.device.type == "cpu" and most >= ROWS else 1
        step = min(most // unit, -(-max(1, len(kept)) // unit)) * unit
        gradient = any(ctx.needs_input_grad)
        with torch.autocast(hidden.device.type, enabled=False), borrowed((step, vocabulary), hidden.dtype, hidden.device) as buffer:
            for start in range(0, len(kept), step):
                piece = slice(start, min(start + step, len(kept)))
                x = _whole(x_nH[piece], unit)
                z = buffer[: len(x)]
                torch.mm(x, weight.t(), out=z) if bias is None else torch.addmm(bias, x, weight.t(), out=z)
                loss += torch.ops.halfbyte.cross_entropy_(z[: piece.stop - start], kept[piece], softcap, scale, gradient)
                z[piece.stop - start :] = 0
                if d_x is not None and len(x) == piece.stop - start:
                    torch.mm(z, weight, out=d_x[piece])
                elif d_x is not None:
                    d_x[piece] = (z @ weight)[: piece.stop - start]
                if d_weight is not None:
                    d_weight += z.t() @ x
                if d_bias is not None:
                    d_bias += z.sum(dim=0, dtype=exact)
        if rows is not None and d_x is not None:
            d_x = torch.zeros_like(hidden).index_copy_(0, rows, d_x)
        ctx.save_for_backward(d_x, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @once_differentiable  # a second derivative would be wrong, not missing
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


def _trained(labels: Tensor, vocabulary: int) -> tuple[Tensor | None, Tensor]:
    """(numbers of the rows with a label, None where all have one; their labels).  Raises ValueError on a label outside 0..V-1.

    The host reads the device once: how many labels there are, the lowest and the highest.
    """
    if not labels.numel():
        return None, labels.long()
    there, top = labels != IGNORED, labels.max()
    count, low, high = torch.stack([there.sum(), torch.where(there, labels, top).min(), top]).tolist()
    if count and (low < 0 or high >= vocabulary):
        raise ValueError(f"labels must be -100 or within 0..{vocabulary - 1}, found {low}..{high}")
    if count == labels.numel():
        return None, labels.long()
    rows = there.nonzero_static(size=count).reshape(-1)
    return rows, labels[rows].long()
