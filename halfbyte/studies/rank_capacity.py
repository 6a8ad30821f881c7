"""Stage A, forward only: how many bits the rows ask for, and the rank that can hold them.

    bits = trained tokens * share that is not repeated * (loss of the base - floor) / ln 2
    rank = ceil(c * bits / (2 * P1))         P1 = sum of (in + out) over the targets: parameters of rank 1, which store 2 bits each

The floor is half of the base's loss until a probe run has measured what can be learnt; then it is the base's loss less the probe's gain,
a difference of two losses on the same held-out rows.  The factor c says what the rows teach; published points need 1 (reinforcement
learning), 2 (format or style), 8 (instructions), 16 (code, knowledge, further pre-training).  A row that was there before, prompt and all,
counts once; those that are left are discounted by compression: what all take together over what PARTS of them take apart.

Orders tasks rightly and is no more than that.  Sources: 2 bits a parameter https://arxiv.org/abs/2404.05405; the rule
https://thinkingmachines.ai/blog/lora/
"""

import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from halfbyte.data.batches import Batch
from halfbyte.data.tokenize import IGNORED, Example
from halfbyte.models.modes import evaluating
from halfbyte.studies.rank_problem import Problem, eject

TASKS = {"reinforcement": 1, "style": 2, "instructions": 8, "knowledge": 16}
BITS_PER_PARAMETER = 2
FLOOR = 0.5
PARTS = 16


@dataclass(frozen=True)
class Capacity:
    """trained_tokens of all rows, share of them that is new (0 to 1), base_loss and floor in nats a token, parameters of rank 1."""

    trained_tokens: int
    new_share: float
    base_loss: float
    floor: float
    task: str
    rank_one: int

    @property
    def bits(self) -> float:
        """Bits that are there to be learnt (estimate)."""
        return self.trained_tokens * self.new_share * max(0.0, self.base_loss - self.floor) / math.log(2)

    @property
    def rank(self) -> int:
        """The rank that holds them, for this task (estimate)."""
        return max(1, math.ceil(TASKS[self.task] * self.bits / (BITS_PER_PARAMETER * self.rank_one)))

    def with_gain(self, gain: float) -> "Capacity":
        """The same with the floor below the base's loss by what a probe run gained on held-out rows, where it gained anything."""
        return replace(self, floor=max(0.0, self.base_loss - max(0.0, gain)))


def without_repeats(examples: Sequence[Example]) -> list[Example]:
    """The first of each row; two are the same only where prompt and trained tokens are."""
    return list({(tuple(example.input_ids), tuple(example.labels)): example for example in reversed(examples)}.values())[::-1]


def trained_tokens(examples: Sequence[Example]) -> list[list[int]]:
    """The tokens of each row that are trained on."""
    return [[label for label in example.labels[1:] if label != IGNORED] for example in examples]


def new_share(rows: Sequence[Sequence[int]]) -> float:
    """How much of unlike rows is not said before: compressed size of all over the sum of PARTS parts; 1 where there are few rows.

    >>> new_share([[5, 6, 7]] * 4)
    1.0
    """
    if len(rows) < 4 * PARTS:
        return 1.0
    texts = [" ".join(map(str, row)) for row in rows]
    whole = len(lzma.compress("\n".join(texts).encode()))
    apart = sum(len(lzma.compress("\n".join(texts[part::PARTS]).encode())) for part in range(PARTS))
    return min(1.0, whole / apart)


def base_loss(problem: Problem, batches: Sequence[Batch]) -> float:
    """Nats a trained token of the model without an adapter."""
    eject(problem.model)
    total, count = 0.0, 0
    with evaluating(problem.model), torch.inference_mode():
        for batch in batches:
            if batch.trained_tokens:
                summed, tokens = problem.loss_sum(problem.model, batch.to(problem.device))
                total, count = total + float(summed), count + tokens
    return total / max(1, count)


def capacity(problem: Problem, examples: Sequence[Example], sample: Sequence[Batch], rank_one: int, task: str) -> Capacity:
    """Stage A: `examples` are all training rows, `sample` batches of some of them."""
    base = base_loss(problem, sample)
    return Capacity(*counted(examples), base, FLOOR * base, task, rank_one)


def counted(examples: Sequence[Example]) -> tuple[int, float]:
    """(trained tokens of all rows, share of them that is new)."""
    once, total = trained_tokens(without_repeats(examples)), sum(map(len, trained_tokens(examples)))
    return total, new_share(once) * sum(map(len, once)) / max(1, total)
