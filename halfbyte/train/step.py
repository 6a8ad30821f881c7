"""One optimizer step over a window of micro-batches.

    accumulate the gradient of all micro-batches (loss.py), clip once, check once that it is finite, update once, clear

Gradients are never cleared between micro-batches and never clipped before the last one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.data.batches import Batch
from halfbyte.errors import DoesNotFitError
from halfbyte.models.heads import Head
from halfbyte.train.loss import accumulate


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    loss           per trained token, of the whole window
    trained_tokens labels it was computed on; tokens: all tokens that went through the model, padding not counted
    grad_norm      before clipping; clipped_norm after it
    updated        False when nothing was trained or something was not finite, and the weights are as they were
    rows           data row numbers of the window
    """

    loss: float
    trained_tokens: int
    tokens: int
    grad_norm: float
    clipped_norm: float
    updated: bool
    rows: list[int]

    @property
    def finite(self) -> bool:
        """Loss and gradient are numbers."""
        return self.grad_norm - self.grad_norm == 0.0 and self.loss - self.loss == 0.0


def clip(parameters: Sequence[nn.Parameter], max_norm: float | None) -> tuple[float, float]:
    """Scale all gradients together so that their norm is at most `max_norm`; (norm before, norm after)."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    before = float(norm)
    if max_norm is None or not before > max_norm:
        return before, before
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return before, before * min(max_norm / (before + 1e-6), 1.0)


def train_step(
    model: nn.Module, head: Head, window: Sequence[Batch], optimizer: torch.optim.Optimizer, *, clip_norm: float | None = None,
    poll: Callable[[], None] = lambda: None, before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """One update from all micro-batches of `window`; a loss or gradient that is not finite leaves weights and optimizer untouched.

    poll           called before each micro-batch; may raise to leave the step
    before_update  called with the finished, unclipped gradients in place

    Gradients are cleared on every way out.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rows = [row for batch in window for row in batch.rows]
    tokens = sum(real_tokens(batch) for batch in window)
    try:
        loss, total = accumulate(model, head, window, poll=poll)
        if loss is None:
            return StepResult(0.0, 0, tokens, 0.0, 0.0, False, rows)
        before_update()
        before, after = clip(parameters, clip_norm)
        result = StepResult(float(loss), total, tokens, before, after, True, rows)
        if not result.finite:
            return StepResult(result.loss, total, tokens, before, after, False, rows)
        _update(optimizer)
        return result
    finally:
        optimizer.zero_grad(set_to_none=True)


def _update(optimizer: torch.optim.Optimizer) -> None:
    """The update.  Running out of memory in its middle leaves some weights new and some old, so such a step is not tried again."""
    try:
        optimizer.step()
        return
    except (torch.OutOfMemoryError, MemoryError) as error:
        found = str(error).splitlines()[0] if str(error) else "no memory"
    raise DoesNotFitError(
        "the optimizer's update must fit into memory", code="E-FIT-302", found=found, expected="room for one parameter's update",
        remedy="set optim.state: int8, a lower lora.rank, or method: qlora, and resume from the last checkpoint",
    )


def real_tokens(batch: Batch) -> int:
    """Tokens of a batch that are not padding."""
    if batch.segment_ids is not None:
        return int((batch.segment_ids >= 0).sum())
    return batch.input_ids.numel() if batch.attention_mask is None else int(batch.attention_mask.sum())
