"""Texts to labels with a trained classifier.

A text is read as `evaluate_rows` reads it: whole, up to what the model can see, and its label does not depend on the texts beside it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from halfbyte.data.encoding import class_tokens
from halfbyte.data.tokenize import AUTO_MAX_TOKENS, Example
from halfbyte.errors import ModelError, NumericError
from halfbyte.evaluate.classification import choose
from halfbyte.evaluate.opened import Opened
from halfbyte.evaluate.rows import batches_of
from halfbyte.models.load import token_limit
from halfbyte.models.modes import evaluating


class Label(NamedTuple):
    """The likeliest label of a text, and its probability between 0 and 1: the softmax over all labels, in fp32."""

    label: str
    probability: float


def longest_text(opened: Opened) -> int:
    """Tokens of the longest text that is labelled: the model's limit, AUTO_MAX_TOKENS where its config names none."""
    return token_limit(opened.source) or AUTO_MAX_TOKENS


def label_texts(opened: Opened, texts: Sequence[str], *, batch_size: int = 8) -> list[Label | None]:
    """The label of each text; None for a text that is empty or longer than `longest_text`.

    Raises ModelError where the model is no classifier, ConfigError for a batch without rows, NumericError for damaged weights.
    """
    require_classifier(opened)
    tokens = [class_tokens(text, opened.tokenizer) for text in texts]
    limit = longest_text(opened)
    rows = [Example(ids, [], number) for number, ids in enumerate(tokens) if 0 < len(ids) <= limit]
    found: list[Label | None] = [None] * len(texts)
    with evaluating(opened.model), torch.inference_mode():
        for batch in batches_of(rows, opened, batch_size):
            classes, shares = (values.tolist() for values in choose(opened.model, batch.to(opened.model.device)))
            for row, best, share in zip(batch.rows, classes, shares, strict=True):
                found[row] = Label(opened.labels[best], _finite(share, row, opened))
    return found


def require_classifier(opened: Opened) -> None:
    """Raise ModelError unless the model chooses between labels."""
    if len(opened.labels) < 2:
        raise ModelError(
            "only a classifier can label texts", code="E-MODEL-093", place=str(opened.located.adapter or opened.source.name),
            found=f"{type(opened.model).__name__}, trained to write text" if not opened.labels else "a model with one label",
            expected="a run with model.task=sequence-classification, or a model saved as such",
            remedy="train one on rows with a text and a label; a model that writes text answers with `halfbyte generate`",
            nothing_done="Nothing was labelled.",
        )  # fmt: skip


def _finite(share: float, row: int, opened: Opened) -> float:
    if not math.isfinite(share):
        raise NumericError(
            "the scores of a classifier must be finite", code="E-NUM-305", place=f"text {row + 1:,}", found=str(share),
            remedy=f"the weights of {opened.title()} are damaged; train again", nothing_done="Nothing was labelled.",
        )  # fmt: skip
    return share
