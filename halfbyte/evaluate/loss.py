"""Held-out loss: the sum over all trained tokens divided by their number.

    loss = sum_batches sum_tokens nll / sum_batches tokens            never the mean of batch means

so it does not depend on how rows were put into batches, nor on padding.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.data.batches import Batch, model_inputs
from halfbyte.errors import DataError
from halfbyte.kernels.linear_cross_entropy import linear_cross_entropy
from halfbyte.models.heads import Head, head_of, hidden_of, logits_of
from halfbyte.models.modes import evaluating

IGNORED = -100


@dataclass(frozen=True)
class EvalLoss:
    """loss in nats per token, perplexity = exp(loss), tokens that were summed over (rows, for classification)."""

    loss: float
    perplexity: float
    tokens: int


def evaluate_loss(model: nn.Module, batches: Iterable[Batch], *, head: Head | None = None) -> EvalLoss:
    """Loss over `batches` without dropout and gradients; every module's mode is put back, also after an exception.

    Raises DataError where no token is trained on.
    """
    total, count = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            here = batch.to(_device_of(model))
            if head is None and here.labels.ndim == 2:
                head = head_of(model)
            summed, tokens = batch_loss_sum(model, head, here)
            total, count = total + float(summed), count + tokens
    if count == 0:
        raise DataError("held-out rows must have tokens to score", code="E-DATA-090", found="0 trained tokens", remedy="check the labels of the rows")
    loss = total / count
    return EvalLoss(loss, math.exp(min(loss, 700.0)), count)


def batch_loss_sum(model: nn.Module, head: Head | None, batch: Batch) -> tuple[Tensor, int]:
    """(sum of the losses, how many): labels (B, T) of tokens stand on their own tokens; labels (B,) are classes."""
    if batch.labels.ndim == 1:
        wanted_B = batch.labels
        logits_BC = model(**model_inputs(batch)).logits.float()
        summed = nn.functional.cross_entropy(logits_BC, wanted_B, ignore_index=IGNORED, reduction="sum")
        return summed, int((wanted_B != IGNORED).sum())
    assert head is not None
    targets_BT = torch.cat([batch.labels[:, 1:], batch.labels.new_full((batch.labels.shape[0], 1), IGNORED)], dim=1)
    trained_BT = targets_BT != IGNORED
    labels_N = targets_BT[trained_BT]
    if labels_N.numel() == 0:
        return torch.zeros((), device=batch.labels.device), 0
    if head.kind == "logits":
        logits_NV = logits_of(model, batch)[trained_BT].float()
        return nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum"), labels_N.numel()
    hidden_NH = hidden_of(model, batch)[trained_BT]
    summed = linear_cross_entropy(hidden_NH, head.weight, labels_N, bias=head.bias, softcap=head.softcap, scale=head.scale)
    return summed, labels_N.numel()


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
