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
from typing import Any

from halfbyte.errors import ConfigError, nearest

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
References = Sequence[str | Sequence[str]]


def score(
    predictions: Sequence[str], references: References, metrics: Sequence[str] = ("exact_match", "rouge", "bleu", "chrf")
) -> dict[str, float]:
    """Each metric's value; a row may have several references.  Raises ConfigError on unknown metrics or unequal lengths.

    >>> score(["a b"], ["a b "], ["exact_match"])
    {'exact_match': 1.0}
    """
    if len(predictions) != len(references) or not predictions:
        raise ConfigError(
            "scores need one reference for each answer", code="E-CONF-065",
            found=f"{len(predictions)} answers, {len(references)} references",
        )  # fmt: skip
    several = [[wanted] if isinstance(wanted, str) else list(wanted) for wanted in references]
    found: dict[str, float] = {}
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(
                "a metric must be known", code="E-CONF-066", place="metrics", found=repr(name), expected=", ".join(METRICS),
                remedy=nearest(name, METRICS),
            )  # fmt: skip
        found.update(METRICS[name](list(predictions), several))
    return found


def _exact_match(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    hits = sum(any(made.strip() == one.strip() for one in wanted) for made, wanted in zip(predictions, references))
    return {"exact_match": hits / len(predictions)}


def final_number(text: str) -> float | None:
    """The last number of a text, without thousands commas; None where there is none.

    >>> final_number("48+24 = 72\\n#### 1,072."), final_number("none")
    (1072.0, None)
    """
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _final_answer(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    hits = 0
    for made, wanted in zip(predictions, references):
        number = final_number(made)
        hits += number is not None and any(number == final_number(one) for one in wanted)
    return {"final_answer": hits / len(predictions)}


def _rouge(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    rows = [scorer.score_multi(wanted, made) for made, wanted in zip(predictions, references)]
    return {kind: sum(row[kind].fmeasure for row in rows) / len(rows) for kind in kinds}


def _streams(references: list[list[str]]) -> list[list[Any]]:
    """sacrebleu wants one list per reference number; rows with fewer are filled with None."""
    most = max(len(wanted) for wanted in references)
    return [[wanted[number] if number < len(wanted) else None for wanted in references] for number in range(most)]


def _bleu(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    from sacrebleu.metrics import BLEU

    return {"bleu": BLEU().corpus_score(predictions, _streams(references)).score}


def _chrf(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    from sacrebleu.metrics import CHRF

    return {"chrf": CHRF().corpus_score(predictions, _streams(references)).score}


METRICS: dict[str, Callable[[list[str], list[list[str]]], dict[str, float]]] = {
    "exact_match": _exact_match, "final_answer": _final_answer, "rouge": _rouge, "bleu": _bleu, "chrf": _chrf,
}  # fmt: skip
