"""Scores of generated text against references, by well-kept libraries.

| metric                | scale  | by                                                                 |
|-----------------------|--------|--------------------------------------------------------------------|
| exact_match           | 0..1   | equal after surrounding white space is removed                     |
| final_answer          | 0..1   | equal last numbers: what maths word problems are judged by          |
| rouge1 rouge2 rougeL  | 0..1   | rouge-score, F measure with stemming, mean over rows, best reference |
| bleu, chrf            | 0..100 | sacrebleu, over the whole corpus                                   |

Sources: https://github.com/google-research/google-research/tree/master/rouge, https://github.com/mjpost/sacrebleu
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from halfbyte.errors import ConfigError, nearest

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
References = Sequence[str | Sequence[str]]


def require_known(metrics: Sequence[str], place: str = "--metrics") -> None:
    """Raise ConfigError for a name that is none of METRICS."""
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(
                "a score must be one of those known", code="E-CONF-086", place=place, found=name, expected=", ".join(METRICS),
                remedy=nearest(name, tuple(METRICS)),
            )  # fmt: skip


def score(predictions: Sequence[str], references: References, metrics: Sequence[str]) -> dict[str, float]:
    """Each metric's value; a row may have several references.  Raises ConfigError on unknown metrics or unequal lengths.

    >>> score(["a b"], ["a b "], ["exact_match"])
    {'exact_match': 1.0}
    """
    if len(predictions) != len(references) or not predictions:
        raise ConfigError(
            "scores need one reference for each answer", code="E-CONF-065",
            found=f"{len(predictions)} answers, {len(references)} references",
        )  # fmt: skip
    require_known(metrics)
    several = [[wanted] if isinstance(wanted, str) else list(wanted) for wanted in references]
    return {name: METRICS[name](list(predictions), several) for name in metrics}


def _exact_match(predictions: list[str], references: list[list[str]]) -> float:
    hits = sum(any(made.strip() == one.strip() for one in wanted) for made, wanted in zip(predictions, references))
    return hits / len(predictions)


def final_number(text: str) -> float | None:
    """The last number of a text, without thousands commas; None where there is none.

    >>> final_number("48+24 = 72\\n#### 1,072."), final_number("none")
    (1072.0, None)
    """
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _final_answer(predictions: list[str], references: list[list[str]]) -> float:
    hits = 0
    for made, wanted in zip(predictions, references):
        number = final_number(made)
        hits += number is not None and any(number == final_number(one) for one in wanted)
    return hits / len(predictions)


def _rouge(kind: str, predictions: list[str], references: list[list[str]]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=True)
    return sum(scorer.score_multi(wanted, made)[kind].fmeasure for made, wanted in zip(predictions, references)) / len(predictions)


def _streams(references: list[list[str]]) -> list[list[Any]]:
    """sacrebleu wants one list per reference number; rows with fewer are filled with None."""
    most = max(len(wanted) for wanted in references)
    return [[wanted[number] if number < len(wanted) else None for wanted in references] for number in range(most)]


def _bleu(predictions: list[str], references: list[list[str]]) -> float:
    from sacrebleu.metrics import BLEU

    return float(BLEU().corpus_score(predictions, _streams(references)).score)


def _chrf(predictions: list[str], references: list[list[str]]) -> float:
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score(predictions, _streams(references)).score)


METRICS: dict[str, Callable[[list[str], list[list[str]]], float]] = {
    "exact_match": _exact_match, "final_answer": _final_answer, "rouge1": partial(_rouge, "rouge1"), "rouge2": partial(_rouge, "rouge2"),
    "rougeL": partial(_rouge, "rougeL"), "bleu": _bleu, "chrf": _chrf,
}  # fmt: skip
"""Every score there is; what a command takes and its help names are made from these names."""
