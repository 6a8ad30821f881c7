"""Does a model keep the samples of a packed row apart?  Asked of the model itself, once, before training.

    row     a a a a a a | b b b b b b        hidden states of b with one a and with another must be equal

Samples are told apart by positions that restart.  A model that takes no positions (ALiBi, a recurrence, a convolution) or makes its own
lets b see a, and nothing in its loss would show it.  Masked attention adds exact zeros, so equal means equal to the bit; only where
tokens are dealt to experts may the rounding differ, since the other sample's tokens share the products.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.data.batches import Batch, collate
from halfbyte.data.packing import Packed
from halfbyte.errors import UnsupportedError
from halfbyte.models.heads import hidden_of
from halfbyte.models.modes import evaluating
from halfbyte.quant.experts import expert_shapes

TOKENS = 6
ROUNDINGS = 8


def require_separate(model: Any) -> None:
    """Raise UnsupportedError when one sample of a packed row changes what the model makes of another."""
    with evaluating(model), torch.no_grad():
        one, other = (_second_sample(model, first) for first in (1, 2))
    largest = float(one.abs().max())
    allowed = ROUNDINGS * torch.finfo(one.dtype).eps * largest if any(expert_shapes(module) for module in model.modules()) else 0.0
    leaked = float((one - other).abs().max())
    if not leaked <= allowed:
        raise UnsupportedError(
            "samples that share a packed row must not see each other", code="E-UNSUP-046",
            place=f"data.packing with {type(model).__name__}",
            found=f"another first sample changes the states of the second by up to {leaked:.3g} (largest state {largest:.3g})",
            expected="a model that keeps samples apart by their positions", remedy="set data.packing=false",
            nothing_done="Nothing was trained.",
        )  # fmt: skip


def _second_sample(model: Any, first: int) -> Tensor:
    """States (T, H) of the second sample behind the first, which `first` chooses."""
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [*((first + step * 7) * first % vocabulary for step in range(TOKENS)), *(step * 5 % vocabulary for step in range(TOKENS))]
    positions = [*range(TOKENS), *range(TOKENS)]
    row = Packed(ids, [-100] * len(ids), [0] * TOKENS + [1] * TOKENS, positions, [0, 1])
    batch: Batch = collate([row], pad_id=0).to(device)
    return hidden_of(model, batch)[0, TOKENS:]
