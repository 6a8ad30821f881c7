"""Which parameter is in which group, and what weight decay does to each."""

import pytest
import torch
from torch import nn

from halfbyte.config.optim import OptimConfig
from halfbyte.errors import ConfigError
from halfbyte.lora.trained import TrainedParts
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.param_groups import describe, groups, set_rate


class Adapter(nn.Module):
    """The shape of an adapter layer: a frozen base, two factors, a magnitude."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(4, 2))
        self.magnitude = nn.Parameter(torch.ones(4))


def model() -> nn.Module:
    table, layer = Adapter(nn.Embedding(4, 4)), Adapter(nn.Linear(4, 4))
    copied = TrainedParts(nn.Embedding(3, 4).requires_grad_(False), ("weight",))
    return nn.ModuleDict({"table": table, "layer": layer, "whole": nn.Embedding(3, 4), "copied": copied, "norm": nn.LayerNorm(4)})


def by_label(config: OptimConfig, lr: float = 1e-3) -> dict[str, dict]:
    return {group["label"]: group for group in groups(model(), config, lr)}


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    found = {label: sorted(name for name, _ in group["params"]) for label, group in by_label(OptimConfig()).items()}
    assert found == {
        "matrices": ["layer.lora_a"], "lora_b": ["layer.lora_b"], "vectors": ["layer.magnitude", "norm.bias", "norm.weight"],
        "embeddings": ["copied.parts.0", "table.lora_a", "table.lora_b", "whole.weight"], "embedding_vectors": ["table.magnitude"],
    }


def test_lora_plus_and_embedding_rates() -> None:
    """T43: the rate of embeddings is not lost under LoRA+."""
    found = by_label(OptimConfig(lora_plus_ratio=16.0, embedding_lr=1e-6))
    rates = {label: group["lr"] for label, group in found.items()}
    assert rates == {"matrices": 1e-3, "lora_b": 16e-3, "vectors": 16e-3, "embeddings": 1e-6, "embedding_vectors": 1e-6}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by its old name
def test_rates_equal_pefts_lora_plus() -> None:
    """The rate of every tensor, against peft.optimizers.create_loraplus_optimizer on a real adapter."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer
    from transformers import LlamaConfig, LlamaForCausalLM

    base = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32))
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"))
    theirs = create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0, loraplus_lr_embedding=1e-5)
    rate_of = {id(parameter): group["lr"] for group in theirs.param_groups for parameter in group["params"]}
    expected = {name: rate_of[id(parameter)] for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    rates = by_label(OptimConfig(lora_plus_ratio=4.0, embedding_lr=1e-5))
    for name, rate in expected.items():
        label = "embeddings" if "embed_tokens" in name else "lora_b" if "lora_B" in name else "matrices"
        assert rates[label]["lr"] == rate, name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_gradient_each_group_shrinks_by_its_decay_or_not_at_all(weight_decay: float) -> None:
    """T43."""
    made = groups(model(), OptimConfig(weight_decay=weight_decay, lora_plus_ratio=2.0), 1e-2)
    optimizer = AdamW(made)
    before = {id(p): p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            share = 1.0 if parameter.ndim == 1 else 1 - group["lr"] * weight_decay  # DoRA's lengths too, also those of a table
            torch.testing.assert_close(parameter.detach(), before[id(parameter)] * share, rtol=1e-7, atol=0)


@pytest.mark.parametrize(("config", "option"), [
    (OptimConfig(lora_plus_ratio=4.0), "optim.lora_plus_ratio"), (OptimConfig(embedding_lr=1e-5), "optim.embedding_lr"),
])
def test_an_option_nobody_would_feel_is_refused(config: OptimConfig, option: str) -> None:
    """T44."""
    with pytest.raises(ConfigError) as caught:
        groups(nn.Linear(2, 2), config, 1e-3)
    assert (caught.value.code, caught.value.place) == ("E-CONF-302", option)


def test_groups_are_printed_by_name_and_rates_follow_the_schedule() -> None:
    """T43: what decays can be read."""
    made = groups(model(), OptimConfig(weight_decay=0.1), 2e-3)
    text = describe(made)
    assert "vectors: 3 tensors, 12 parameters, learning rate 0.002, weight decay 0" in text
    assert "matrices: 1 tensors, 8 parameters, learning rate 0.002, weight decay 0.1" in text
    set_rate(made, 0.5)
    assert {group["lr"] for group in made} == {1e-3}
    set_rate(made, 0.25)
    assert {group["lr"] for group in made} == {5e-4}
