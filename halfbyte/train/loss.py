"""The one place where labels meet predictions: next-token loss as a sum, and the count of what was summed.

    row      t0 t1 t2 t3 t4
    label     -  - t2 t3  -       labels stand on their own tokens (-100 elsewhere)
    state    h0 h1 h2 h3          h_i predicts token i + 1: the one shift
    trained      h1->t2 h2->t3    only these positions go through the head

A step's loss is the sum over all its trained tokens divided by their number, so it and its gradient do not depend on how rows were
cut into micro-batches.  Nothing here divides.  Logits of untrained positions are never computed, those of trained ones never held whole
(see `halfbyte.kernels.linear_cross_entropy`).  For sequence classification a label is one class per row and nothing is shifted.
"""


import torch
from torch import Tensor, nn

from halfbyte.data.batches import Batch, model_inputs
from halfbyte.data.tokenize import IGNORED
from halfbyte.kernels.linear_cross_entropy import linear_cross_entropy
from halfbyte.models.heads import Head, hidden_of


def shift(labels_BT: Tensor) -> Tensor:
    """What each position predicts: the label of the next token; the last position predicts nothing.  (B, T) -> (B, T)

    >>> shift(torch.tensor([[-100, 7, 8]]))
    tensor([[   7,    8, -100]])
    """
    return torch.cat([labels_BT[:, 1:], labels_BT.new_full((labels_BT.shape[0], 1), IGNORED)], dim=1)


def trained_tokens(batch: Batch) -> int:
    """Number of labels that the batch's loss sums over; rows, for sequence classification (labels of shape (B,))."""
    wanted = batch.labels if batch.labels.ndim == 1 else batch.labels[:, 1:]
    return int((wanted != IGNORED).sum())


def token_loss_sum(model: nn.Module, head: Head, batch: Batch) -> tuple[Tensor, int]:
    """(sum of the token losses as a 0-d tensor with gradient, number of tokens summed over)."""
    if batch.labels.ndim == 1:
        return _class_loss_sum(model, batch)
    targets_BT = shift(batch.labels)
    trained_BT = targets_BT != IGNORED
    hidden_BTH = hidden_of(model, batch)
    hidden_NH, labels_N = hidden_BTH[trained_BT], targets_BT[trained_BT]
    loss = linear_cross_entropy(hidden_NH, head.weight, labels_N, bias=head.bias, softcap=head.softcap, scale=head.scale)
    return loss, labels_N.numel()


def _class_loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The classifier's case: one label a row, logits (B, classes)."""
    logits_BC = model(**model_inputs(batch)).logits
    exact = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    return torch.nn.functional.cross_entropy(exact, batch.labels, ignore_index=IGNORED, reduction="sum"), trained_tokens(batch)
