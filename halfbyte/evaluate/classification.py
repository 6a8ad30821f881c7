"""Label accuracy and macro-averaged F1.

    F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c)          macro: plain mean over the classes that occur in labels or predictions

so a rare class weighs as much as a common one; a classifier that always says the commonest label scores badly.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from halfbyte.data.batches import Batch, model_inputs
from halfbyte.errors import DataError
from halfbyte.models.modes import evaluating


def classification_scores(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """accuracy and macro_f1 of predicted against true classes.

    >>> classification_scores([0, 0, 1, 1], [0, 0, 0, 1])["accuracy"]
    0.75
    """
    if len(predictions) != len(labels) or not labels:
        raise DataError(
            "scores need one label for each prediction", code="E-DATA-091", found=f"{len(predictions)} predictions, {len(labels)} labels"
        )
    pairs = list(zip(predictions, labels))
    scores = []
    for one in sorted({*predictions, *labels}):
        hit = sum(made == one == wanted for made, wanted in pairs)
        wrong = sum((made == one) != (wanted == one) for made, wanted in pairs)
        scores.append(2 * hit / (2 * hit + wrong))
    return {"accuracy": sum(made == wanted for made, wanted in pairs) / len(pairs), "macro_f1": sum(scores) / len(scores)}


def choose(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each row the likeliest class (B,) int64 and its probability (B,) fp32: exp(z_c) / sum_k exp(z_k) over the logits z."""
    logits = model(**model_inputs(batch)).logits.float()
    best = logits.argmax(dim=-1)
    return best, logits.softmax(dim=-1).gather(1, best[:, None])[:, 0]


def predict(model: nn.Module, batches: Iterable[Batch]) -> tuple[list[int], list[int]]:
    """(predicted, true) class numbers over all rows, without dropout."""
    made: list[int] = []
    wanted: list[int] = []
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            here = batch.to(device)
            made += choose(model, here)[0].tolist()
            wanted += here.labels.tolist()
    return made, wanted


def evaluate_classes(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """accuracy and macro_f1 of a sequence classifier over `batches` with labels (B,)."""
    return classification_scores(*predict(model, batches))
