"""Merged logits equal unmerged ones within the rounding of the type; the way back is exact; ties are cut and said."""

from pathlib import Path

import pytest
import torch
from peft_oracle import IDS, gpt2, llama, mixtral, off, quantized, qwen2
from torch import Tensor, nn

from halfbyte.config.lora import LoraConfig
from halfbyte.errors import AdapterError
from halfbyte.lora import merge as merge_module
from halfbyte.lora.inject import eject, inject, updates
from halfbyte.lora.merge import merge, unmerge
from halfbyte.lora.tensors import live_tensors
from halfbyte.quant.dense import dense_weight
from halfbyte.quant.experts import QuantExperts, is_experts
from halfbyte.quant.linear import QuantLinear
from halfbyte.surgery import modules_of, replace


def trained(model: nn.Module, config: LoraConfig, size: float = 0.05) -> nn.Module:
    """The model with a random adapter in it."""
    inject(model, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in live_tensors(model).items():
            if not name.rpartition(".")[2].startswith("start"):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * size)
    return model


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def with_packed_experts(model: nn.Module) -> nn.Module:
    for name, module in modules_of(model, lambda _, module: is_experts(module)):
        replace(model, name, QuantExperts.from_experts(module, name=name))
    return quantized(model)


EXPERTS = ("q_proj", "experts.gate_up_proj", "experts.down_proj")
CASES = {
    "dense": (llama, LoraConfig(rank=4, alpha=6)),
    "rslora ranks": (llama, LoraConfig(rank=4, alpha=6, rslora=True, ranks={"q_proj": 2}, alphas={"up_proj": 9})),
    "dora": (llama, LoraConfig(rank=4, alpha=6, dora=True)),
    "pissa": (llama, LoraConfig(rank=4, alpha=6, init="pissa")),
    "bias where there was none": (llama, LoraConfig(rank=4, alpha=6, lora_bias=True)),
    "saved": (llama, LoraConfig(rank=4, alpha=6, fully_trained=("lm_head", "norm"))),
    "conv1d": (gpt2, LoraConfig(rank=4, alpha=6)),
    "conv1d dora biases": (gpt2, LoraConfig(rank=4, alpha=6, dora=True, train_bias="all")),
    "conv1d lora bias": (gpt2, LoraConfig(rank=4, alpha=6, lora_bias=True)),
    "biases": (qwen2, LoraConfig(rank=4, alpha=6, train_bias="lora_only", rslora=True)),
    "nf4": (lambda: quantized(llama()), LoraConfig(rank=4, alpha=6)),
    "nf4 dora": (lambda: quantized(llama()), LoraConfig(rank=4, alpha=6, dora=True)),
    "fp4 bias": (lambda: quantized(qwen2(), "fp4"), LoraConfig(rank=4, alpha=6, lora_bias=True)),
    "loftq": (llama, LoraConfig(rank=4, alpha=6, init="loftq")),
    "experts": (mixtral, LoraConfig(rank=4, alpha=6, targets=EXPERTS)),
    "one expert parameter": (mixtral, LoraConfig(rank=4, alpha=6, targets=EXPERTS[2:])),
    "packed experts": (lambda: with_packed_experts(mixtral()), LoraConfig(rank=4, alpha=6, targets=EXPERTS)),
    "embedding and head": (llama, LoraConfig(rank=4, alpha=6, targets=("embed_tokens", "lm_head"))),
    "embedding dora": (llama, LoraConfig(rank=4, alpha=6, dora=True, targets=("embed_tokens", "q_proj"))),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_equals_adapter_and_unmerge_restores_the_base(case: str) -> None:
    """T30, T59, T60: bias and scale are not lost; a packed base is merged as what the adapter was trained on; every delta is counted."""
    make, config = CASES[case]
    untouched = make()
    bytes_before = {name: tensor.clone() for name, tensor in untouched.state_dict().items()}
    model = trained(make(), config)
    expected, adapted = logits_of(model), len(updates(model))
    report = merge(model)
    assert not any(isinstance(module, merge_module.WRAPPERS) for module in model.modules())
    assert adapted <= report.count
    assert off(logits_of(model), expected) < 2e-5
    unmerge(model, report)
    assert torch.equal(logits_of(model), expected)
    eject(model)
    if config.init != "loftq":
        after = model.state_dict()
        assert all(torch.equal(after[name], bytes_before[name]) for name in bytes_before)
        assert torch.equal(logits_of(model), logits_of(untouched))


@pytest.mark.parametrize("case", ["dense", "dora", "conv1d", "nf4", "experts", "embedding and head"])
def test_merged_equals_adapter_in_bfloat16(case: str) -> None:
    """Within the rounding of bf16 weights: 2^-9 relative per weight, times the roundings of the activations on the way."""
    make, config = CASES[case]
    model = trained(quantized(llama().bfloat16()) if case == "nf4" else make().bfloat16(), config)
    expected = logits_of(model).float()
    report = merge(model)
    assert 0 < report.rounding_error < 2**-7
    assert off(logits_of(model), expected) < 2**-5


def test_a_packed_layer_becomes_a_dense_one_that_is_never_packed_again() -> None:
    """T58: the delta survives: the merged weight is base + delta to float32, where packing again would lose a tenth of it."""
    model = trained(quantized(llama()), LoraConfig(rank=4, alpha=6), size=0.01)
    layer = updates(model)["model.layers.0.self_attn.q_proj"]
    expected = dense_weight(layer.frozen_base, torch.float32) + layer.delta_weight()
    merge(model)
    merged = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(merged) is nn.Linear
    assert torch.equal(merged.weight, expected)
    again = dense_weight(QuantLinear.from_linear(merged, "nf4", 64, True, ""))
    assert off(again, expected) > 0.05
    assert not any(isinstance(module, QuantLinear) for name, module in model.named_modules() if "proj" in name)


def test_delta_norms_are_scale_times_product() -> None:
    """T60: per tensor the length of what was added is s ||B A||."""
    model = trained(llama(), LoraConfig(rank=4, alpha=6, rslora=True))
    lengths = {name: float((layer.lora_b @ layer.lora_a).detach().norm()) * 6 / 2 for name, layer in updates(model).items()}
    report = merge(model)
    assert {entry.name for entry in report.tensors} == set(lengths)
    for entry in report.tensors:
        assert entry.delta_norm == pytest.approx(lengths[entry.name], rel=1e-4)


def test_a_lost_delta_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """T60: a fold that returns the base unchanged is caught by reading the tree back."""
    model = trained(llama(), LoraConfig(rank=4, alpha=6))
    monkeypatch.setitem(merge_module.FOLDS, merge_module.LoraLinear, lambda layer: layer.frozen_base)
    with pytest.raises(AdapterError, match="E-ADAPT-022"):
        merge(model)


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens"), ("q_proj",)])
@pytest.mark.parametrize("how", ["lora", "fully_trained"])
def test_tied_embeddings_survive_merge_and_reload(targets: tuple[str, ...], how: str, tmp_path: Path) -> None:
    """T62, T63: head and table part when one of them changes, the config says so, and a saved model has both."""
    from transformers import AutoModelForCausalLM

    whole = targets if how == "fully_trained" and targets != ("q_proj",) else ()
    config = LoraConfig(rank=4, alpha=6, targets=("v_proj",) if whole else targets, fully_trained=whole)
    model = trained(llama(tie_word_embeddings=True), config)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    expected = logits_of(model)
    report = merge(model)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert off(logits_of(model), expected) < 2e-5
    apart = targets != ("q_proj",)
    assert (head.weight is not table.weight) == apart
    assert model.config.tie_word_embeddings == (not apart)
    model.save_pretrained(tmp_path)
    assert off(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected) < 2e-5
    unmerge(model, report)
    assert model.config.tie_word_embeddings
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("zeros,targets", [
    ("model.layers.1.self_attn.o_proj", ("q_proj", "o_proj")), ("model.embed_tokens", ("embed_tokens",)),
])  # fmt: skip
def test_dora_has_gain_1_where_the_weight_has_no_length(zeros: str, targets: tuple[str, ...]) -> None:
    """Rows of zeros, as in an expanded or pruned model: a gain of 0 / 0 would be NaN, before the first step or in its gradient."""
    model = llama()
    with torch.no_grad():
        table = model.get_submodule(zeros).weight  # of an embedding the columns have the lengths
        (table[:, :5] if "embed" in zeros else table).zero_()
    before = logits_of(model)
    inject(model, LoraConfig(rank=4, alpha=6, dora=True, targets=targets))
    assert off(logits_of(model), before) < 2e-6
    step = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        step.step()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in live_tensors(model).values())
    eject(model)
    inject(model, LoraConfig(rank=4, alpha=6, dora=True, targets=targets))
    merge(model)
    assert off(logits_of(model), before) < 2e-6


def test_nothing_to_merge_and_changed_since() -> None:
    with pytest.raises(AdapterError, match="E-ADAPT-020"):
        merge(llama())
    model = trained(llama(), LoraConfig(rank=4, alpha=6, targets=("q_proj",)))
    report = merge(model)
    replace(model, "model.layers.0.self_attn.q_proj", nn.Linear(64, 64))
    with pytest.raises(AdapterError, match="E-ADAPT-023"):
        unmerge(model, report)


def test_a_broken_number_is_not_merged_in_silence() -> None:
    model = trained(llama(), LoraConfig(rank=4, alpha=6, targets=("q_proj",)))
    with torch.no_grad():
        updates(model)["model.layers.0.self_attn.q_proj"].lora_b[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="E-ADAPT-022"):
        merge(model)
