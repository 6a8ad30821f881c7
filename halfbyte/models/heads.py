"""The output head apart from the backbone, so that the loss needs no logits of all tokens.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)          softcap and bias only where the model has them

What stands between hidden states and logits differs: a soft cap (Gemma 2 and 3), a division (Granite), a factor (Cohere).  The values are
read from the config and the whole is probed once against the model's own logits.  Where nothing fits, or the head is
adapted or packed, kind "logits" says so with its reason, and the model's own logits are used.

    B sequences, T tokens, H width, V vocabulary
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.data.batches import Batch, model_inputs
from halfbyte.log import logger
from halfbyte.models.announce import reads_boundaries
from halfbyte.models.modes import evaluating

PROBE_TOKENS = 6
ROUND_CPU = 64  # tokens
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")


@dataclass(frozen=True)
class Head:
    """How hidden states become logits.

    kind     "linear": by the formula of this module; "logits": ask the model (`logits_of`), for `reason`
    module   the output layer; its weight (V, H) and bias (V,) are read at each use, for they may be in training
    """

    kind: str
    module: nn.Module | None = None
    softcap: float | None = None
    scale: float = 1.0
    reason: str = ""

    @property
    def weight(self) -> Tensor:
        """(V, H), differentiable where the head trains."""
        assert self.module is not None
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """(V,) or None."""
        return getattr(self.module, "bias", None)


def settle_padding(model: Any, tokenizer: Any) -> None:
    """A classifier answers at the last token that is not the padding token of its config: let that be the one that rows are padded with."""
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def hidden_of(model: Any, batch: Batch) -> Tensor:
    """The backbone's last hidden states (B, T, H), differentiable; no logits are made."""
    return model.base_model(**model_inputs(batch)).last_hidden_state


def hidden_at(model: Any, batch: Batch, wanted_BT: Tensor) -> Tensor:
    """The last hidden states (N, H) of the tokens that `wanted_BT` marks, none of them padding.

    Where the model reads boundaries (models/rows.py), the real tokens of all rows go through it end to end and padding is not computed.
    On a CPU a few tokens of no row are put behind them, up to a multiple of ROUND_CPU: the library of matrix products keeps code and
    memory for each shape it has seen, 20 MB a shape for a model of 135M parameters, and lengths of chance would be ever new shapes.
    """
    if batch.positions is not None or not reads_boundaries(model):
        return hidden_of(model, batch)[wanted_BT]
    ids = batch.input_ids
    real = torch.ones_like(ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask != 0
    positions, kept = (real.cumsum(1) - 1)[real], ids[real]
    behind = -len(kept) % ROUND_CPU if ids.device.type == "cpu" else 0
    kept, positions = F.pad(kept, (0, behind)), torch.cat([positions, torch.arange(behind, device=ids.device)])
    states = model.base_model(input_ids=kept[None], position_ids=positions[None], use_cache=False).last_hidden_state
    return states[0, : len(kept) - behind][wanted_BT[real]]


def logits_of(model: Any, batch: Batch) -> Tensor:
    """The model's own logits (B, T, V)."""
    return model(**model_inputs(batch)).logits


def head_of(model: Any) -> Head:
    """The head of a language model, probed against its own logits; call it after adapters are in place."""
    module = model.get_output_embeddings()
    if module is None:
        return Head("logits", reason="the model names no output layer")
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or hasattr(module, "lora_a"):
        return _plain("the output layer is adapted or packed")
    with evaluating(model), torch.no_grad():
        ids = torch.arange(PROBE_TOKENS, device=weight.device)[None] * 7 % weight.shape[0]
        probe = Batch(ids, ids, None, None, None, [0])
        wanted, hidden = logits_of(model, probe), hidden_of(model, probe)
        for head in _candidates(model, module):
            if hidden.shape[-1] == weight.shape[1] and hidden.dtype == weight.dtype and close(apply(head, hidden), wanted):
                return head
    return _plain("its logits are not a scaled, capped linear map of the backbone's last states")


def _plain(reason: str) -> Head:
    logger().debug("loss by the model's own logits: %s", reason)
    return Head("logits", reason=reason)


def _candidates(model: Any, module: nn.Module) -> list[Head]:
    """Heads the config suggests, the likely first."""
    text = model.config.get_text_config()
    cap = getattr(text, "final_logit_softcapping", None)
    factors = [getattr(text, key) for key in _FACTORS if isinstance(getattr(text, key, None), (int, float))]
    scales = [scale for factor in factors if factor for scale in (float(factor), 1.0 / factor)] + [1.0]
    caps = [float(cap), None] if cap else [None]
    return [Head("linear", module, softcap, scale) for softcap in caps for scale in scales]


def apply(head: Head, hidden_BTH: Tensor) -> Tensor:
    """Logits (B, T, V) in float32 by the formula of this module."""
    logits = nn.functional.linear(hidden_BTH, head.weight, head.bias).float() * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to the rounding of the type the model computes in."""
    rounding = torch.finfo(wanted.dtype).eps * 8
    return bool((found - wanted.float()).abs().max() <= rounding * wanted.float().abs().max().clamp_min(1e-30))
