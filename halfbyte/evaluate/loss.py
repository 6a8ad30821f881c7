"""Held-out loss: the sum over all trained tokens divided by their number.

    loss = sum_batches sum_tokens nll / sum_batches tokens            never the mean of batch means

so it does not depend on how rows were put into batches, nor on padding.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.data.batches import Batch
from halfbyte.errors import DataError
from halfbyte.models.heads import Head, head_of
from halfbyte.models.modes import evaluating
from halfbyte.models.token_loss import token_loss_sum


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
            if here.trained_tokens == 0:
                continue
            head = head if head is not None else Head("logits") if here.labels.ndim == 1 else head_of(model)
            summed, tokens = token_loss_sum(model, head, here)
            total, count = total + float(summed), count + tokens
    if count == 0:
        raise DataError(
            "held-out rows must have tokens to score", code="E-DATA-090", found="0 trained tokens", remedy="check the labels of the rows"
        )
    loss = total / count
    return EvalLoss(loss, math.exp(min(loss, 700.0)), count)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
