"""The loss and the gradient of one optimizer step, whatever its micro-batches.

    N = trained tokens of the whole window, counted before the first backward
    loss = sum over micro-batches of (sum of token losses) / N

A mean of the means of micro-batches would weigh tokens of short rows more; a division by the configured window would shrink the last,
smaller one.  What a token's loss is stands in `halfbyte.models.token_loss`.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from halfbyte.data.batches import Batch
from halfbyte.models.heads import Head
from halfbyte.models.token_loss import token_loss_sum
from halfbyte.train import faults


def accumulate(
    model: nn.Module, head: Head, window: Sequence[Batch], *, poll: Callable[[], None] = lambda: None
) -> tuple[Tensor | None, int]:
    """Add the window's gradient to the parameters; (loss per trained token, trained tokens), or (None, 0) when it trains nothing."""
    total = sum(batch.trained_tokens for batch in window)
    loss: Tensor | None = None
    for batch in window:
        poll()
        faults.point("train.micro_batch")
        if batch.trained_tokens == 0:
            continue
        part = token_loss_sum(model, head, batch)[0] / total
        part.backward()
        loss = part.detach() if loss is None else loss + part.detach()
    faults.point("train.backward_done")
    return loss, total
