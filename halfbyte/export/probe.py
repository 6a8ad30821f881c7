"""How far apart two models are, by their logits on real prompts.

Sentences of this module, or texts of the caller; every token position counts.  What this does not say: which of the two is better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from halfbyte.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = (
    "The committee will meet again on Thursday to decide how the money from the sale is to be spent.",
    "To make the sauce, melt the butter slowly, stir in the flour, and add the milk a little at a time.",
    "Question: A train leaves at 9:40 and arrives at 12:05. How long does the journey take?\nAnswer:",
    "def mean(values):\n    return sum(values) / len(values)\n",
)
LONGEST = 256


@dataclass(frozen=True)
class Difference:
    """Two models on the same tokens: largest and mean |difference| of a logit, share of positions with the same likeliest token."""

    largest: float
    mean: float
    same_choice: float
    positions: int
    largest_logit: float


def logits_of(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str] = TEXTS) -> list[Tensor]:
    """For each text the logits (T, V) as float32, one text at a time so that no padding takes part."""
    device = next(model.parameters()).device
    found = []
    with evaluating(model), torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids[:, :LONGEST].to(device)
            found.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return found


def compare(first: Sequence[Tensor], second: Sequence[Tensor]) -> Difference:
    """The difference of two lists as `logits_of` gives them."""
    gaps = [(one - other).abs() for one, other in zip(first, second, strict=True)]
    same = [one.argmax(-1) == other.argmax(-1) for one, other in zip(first, second, strict=True)]
    return Difference(
        largest=max(float(gap.max()) for gap in gaps),
        mean=sum(float(gap.sum()) for gap in gaps) / sum(gap.numel() for gap in gaps),
        same_choice=sum(int(hit.sum()) for hit in same) / sum(hit.numel() for hit in same),
        positions=sum(hit.numel() for hit in same),
        largest_logit=max(float(one.abs().max()) for one in first),
    )
