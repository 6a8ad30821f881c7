"""The one place where labels meet predictions: the loss of a batch as a sum, and the count of what was summed.

    row      t0 t1 t2 t3 t4
    label     -  - t2 t3  -       labels stand on their own tokens (-100 elsewhere)
    state    h0 h1 h2 h3          h_i predicts token i + 1: the one shift
    trained      h1->t2 h2->t3    only these positions go through the head

Nothing here divides: training divides by the trained tokens of a whole optimizer step, evaluation by those of all rows, so neither
depends on how rows were cut into batches.  Logits of untrained positions are never computed, those of trained ones never held whole
(`halfbyte.kernels.linear_cross_entropy`).  For sequence classification a label is one class per row and nothing is shifted.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from halfbyte.data.batches import Batch
from halfbyte.data.tokenize import IGNORED
from halfbyte.kernels.linear_cross_entropy import linear_cross_entropy
from halfbyte.models.heads import Head, hidden_at, logits_of


def shift(labels_BT: Tensor) -> Tensor:
    """What each position predicts: the label of the next token; the last position predicts nothing.  (B, T) -> (B, T)

    >>> shift(torch.tensor([[-100, 7, 8]]))
    tensor([[   7,    8, -100]])
    """
    return torch.cat([labels_BT[:, 1:], labels_BT.new_full((labels_BT.shape[0], 1), IGNORED)], dim=1)


def token_loss_sum(model: nn.Module, head: Head, batch: Batch) -> tuple[Tensor, int]:
    """(sum of the token losses as a 0-d tensor, differentiable; number of tokens summed over).  A batch without labels gives 0."""
    if batch.labels.ndim == 1:
        return _summed(logits_of(model, batch), batch.labels), batch.trained_tokens
    targets_BT = shift(batch.labels)
    trained_BT = targets_BT != IGNORED
    labels_N = targets_BT[trained_BT]
    if head.kind == "logits":
        return _summed(logits_of(model, batch)[trained_BT], labels_N), labels_N.numel()
    hidden_NH = hidden_at(model, batch, trained_BT)
    loss = linear_cross_entropy(hidden_NH, head.weight, labels_N, bias=head.bias, softcap=head.softcap, scale=head.scale)
    return loss, labels_N.numel()


def _summed(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross entropy in float32 or wider."""
    exact = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return cross_entropy(exact, labels_N, ignore_index=IGNORED, reduction="sum")
