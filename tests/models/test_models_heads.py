"""The head apart from the backbone gives the model's own logits, and packed rows stay apart, for every family."""

from typing import Any

import pytest
import torch

from halfbyte.config.lora import LoraConfig
from halfbyte.data.batches import Batch
from halfbyte.lora.inject import inject
from halfbyte.models.heads import apply, head_of, hidden_of, logits_of
from halfbyte.models.token_loss import token_loss_sum
from tests.models.small_models import gpt2_config, mixtral_config

IDS = torch.arange(12).reshape(2, 6) * 13 % 320


def family(name: str) -> Any:
    import transformers as t

    common = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    made = {
        "llama": lambda: t.LlamaConfig(**common), "qwen2": lambda: t.Qwen2Config(**common),
        "gemma2": lambda: t.Gemma2Config(**common, head_dim=16, final_logit_softcapping=0.3),
        "gemma3": lambda: t.Gemma3TextConfig(**common, head_dim=16, final_logit_softcapping=0.3),
        "granite": lambda: t.GraniteConfig(**common, logits_scaling=8.0), "cohere": lambda: t.CohereConfig(**common, logit_scale=0.0625),
        "gpt2": gpt2_config, "phi3": lambda: t.Phi3Config(**common), "mixtral": mixtral_config,
    }  # fmt: skip
    return made[name]()


FAMILIES = ["llama", "qwen2", "gemma2", "gemma3", "granite", "cohere", "gpt2", "phi3", "mixtral"]


def build(name: str, attention: str | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(family(name), attn_implementation=attention).eval()


def batch_of(ids: torch.Tensor) -> Batch:
    return Batch(ids, ids, torch.ones_like(ids), None, None, list(range(ids.shape[0])))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_split_head_gives_the_models_logits(name: str) -> None:
    """Soft caps, scales and divisions are found by probing; the loss is the model's own loss."""
    model = build(name)
    head = head_of(model)
    assert head.kind == "linear", head.reason
    assert (head.softcap is not None) == name.startswith("gemma")
    assert head.scale == {"granite": 1 / 8, "cohere": 0.0625}.get(name, 1.0)
    batch = batch_of(IDS)
    wanted = logits_of(model, batch)
    assert torch.allclose(apply(head, hidden_of(model, batch)), wanted, rtol=1e-5, atol=1e-6)
    summed, count = token_loss_sum(model, head, batch)
    assert count == 10 and torch.isclose(summed / count, model(IDS, labels=IDS).loss, rtol=1e-5)


def test_a_head_that_does_not_fit_says_so() -> None:
    """An adapted head, or one with an unknown step behind it: the model's own logits, with the reason; the loss is the same."""
    model = build("llama")
    inject(model, LoraConfig(rank=2, targets=("lm_head", "q_proj")))
    adapted = head_of(model)
    assert adapted.kind == "logits" and "adapted" in adapted.reason
    other = build("granite")
    other.config.logits_scaling = 3.0
    other.logits_scaling = 3.0
    assert head_of(other).kind == "linear"
    other.lm_head.register_forward_hook(lambda module, given, made: made + made.roll(1, -1))
    odd = head_of(other)
    assert odd.kind == "logits" and odd.reason
    summed, count = token_loss_sum(other, odd, batch_of(IDS))
    assert torch.isclose(summed / count, other(IDS, labels=IDS).loss, rtol=1e-5)


@pytest.mark.parametrize("attention", [None, "eager"])  # None is sdpa where the family has it
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_do_not_see_each_other(name: str, attention: str | None) -> None:
    """# T19  Another first sample in a packed row leaves the second one's states bitwise equal, and near those it has alone."""
    model = build(name, attention)
    second = torch.arange(9)[None] * 17 % 320
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    segments = torch.cat([torch.zeros(7, dtype=torch.long), torch.ones(9, dtype=torch.long)])[None]

    def states(first: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([first, second], dim=1)
        return hidden_of(model, Batch(ids, ids, None, positions, segments, [0, 1]))[:, 7:]

    with torch.no_grad():
        one, other = states(torch.arange(7)[None]), states(torch.arange(7)[None] + 200)
        alone = hidden_of(model, batch_of(second))
    if name == "mixtral":  # the number of tokens an expert gets changes how its product is summed
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(one, other)
    assert torch.allclose(one, alone, rtol=1e-4, atol=1e-5)
