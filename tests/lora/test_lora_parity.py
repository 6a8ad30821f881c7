"""Logits and every adapter gradient equal PEFT's, over settings and kinds of base; adapters go both ways through their folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import IDS, compare_with_peft, dequantized, gpt2, llama, mixtral, off, peft_load, quantized, qwen2, qwen3_moe

from halfbyte.adapters.folder import load_adapter, save_adapter
from halfbyte.config.lora import LoraConfig
from halfbyte.lora.inject import inject
from halfbyte.lora.tensors import live_tensors

LIMIT = 1e-5
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DENSE: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1, "lora_alpha": 1},
    "alpha is not rank": {"r": 4, "lora_alpha": 12},
    "all-linear": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "rslora": {"r": 8, "lora_alpha": 5, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "dora rslora": {"r": 4, "lora_alpha": 3, "use_dora": True, "use_rslora": True},
    "ranks": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "ranks rslora": {"r": 4, "lora_alpha": 8, "rank_pattern": {"layers.0.self_attn.q_proj": 7}, "alpha_pattern": {"q_proj": 3},
    "use_rslora": True},
    "ranks dora": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 30}, "use_dora": True},
    "lora bias": {"r": 4, "lora_alpha": 6, "lora_bias": True},
    "lora bias rslora": {"r": 4, "lora_alpha": 6, "lora_bias": True, "use_rslora": True},
    "saved head": {"r": 4, "lora_alpha": 8, "modules_to_save": ["lm_head"]},
    "saved embedding and norm": {"r": 4, "lora_alpha": 8, "modules_to_save": ["embed_tokens", "norm"]},
    "embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens"]},
    "embedding dora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "lm_head"]},
    "pattern": {"r": 4, "lora_alpha": 8, "target_modules": r".*layers\.1\..*(q|v)_proj"},
    "layers": {"r": 4, "lora_alpha": 8, "layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "exclude": {"r": 4, "lora_alpha": 8, "exclude_modules": ["layers.0.self_attn.q_proj"]},
}
BIASED: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8}, "dora": {"r": 4, "lora_alpha": 8, "use_dora": True}, "rslora": {"r": 4, "lora_alpha": 3,
    "use_rslora": True},
    "biases all": {"r": 4, "lora_alpha": 8, "bias": "all"}, "biases lora_only": {"r": 4, "lora_alpha": 8, "bias": "lora_only"},
    "biases dora": {"r": 4, "lora_alpha": 8, "bias": "all", "use_dora": True}, "lora bias": {"r": 2, "lora_alpha": 7, "lora_bias": True},
}  # fmt: skip
MOE: dict[str, dict[str, Any]] = {
    "both": {"r": 4, "lora_alpha": 8, "target_parameters": EXPERTS},
    "both rslora": {"r": 4, "lora_alpha": 6, "target_parameters": EXPERTS[::-1], "use_rslora": True},
    "one": {"r": 2, "lora_alpha": 8, "target_parameters": EXPERTS[1:]},
    "ranks": {"r": 2, "lora_alpha": 8, "target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 3},
    "alpha_pattern": {"gate_up_proj": 1}},
}


def check(distances: dict[str, float]) -> None:
    worst = max(distances, key=lambda name: distances[name])
    assert distances[worst] <= LIMIT, f"{worst} is off by {distances[worst]:.2e}"


@pytest.mark.parametrize("case", DENSE)
def test_dense_equals_peft(case: str, tmp_path: Path) -> None:
    check(compare_with_peft(llama, tmp_path, **{"target_modules": LINEAR, **DENSE[case]}))


@pytest.mark.parametrize("case", BIASED)
def test_conv1d_equals_peft(case: str, tmp_path: Path) -> None:
    check(compare_with_peft(gpt2, tmp_path, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, **BIASED[case]))


@pytest.mark.parametrize("case", BIASED)
def test_linear_with_bias_equals_peft(case: str, tmp_path: Path) -> None:
    check(compare_with_peft(qwen2, tmp_path, target_modules=["q_proj", "v_proj"], **BIASED[case]))


@pytest.mark.parametrize("case", ["alpha is not rank", "rslora", "dora", "ranks dora", "ranks", "lora bias", "saved head", "embedding"])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_packed_base_equals_peft_on_the_same_dequantized_weights(case: str, format: str, tmp_path: Path) -> None:
    settings = {"target_modules": LINEAR, **DENSE[case]}
    check(compare_with_peft(lambda: dequantized(quantized(llama(), format)), tmp_path, lambda: quantized(llama(), format), **settings))


@pytest.mark.parametrize("case", ["alpha is not rank", "rslora", "dora", "lora bias"])
def test_packed_base_equals_peft_on_bitsandbytes(case: str, tmp_path: Path) -> None:
    """The same packed bytes under PEFT + bitsandbytes' Linear4bit: sizes are multiples of 64, where its CPU dequantization is right."""
    import bitsandbytes as bnb

    def with_bitsandbytes() -> torch.nn.Module:
        model = llama()
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                packed = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32,
                    quant_type="nf4")
                packed.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4",
                    compress_statistics=False)
                model.set_submodule(name, packed.to("cpu"))
        return model

    def ours() -> torch.nn.Module:
        from halfbyte.quant.linear import QuantLinear
        from halfbyte.surgery import modules_of, replace

        model = llama()
        for name, module in modules_of(model, lambda name, module: isinstance(module, torch.nn.Linear) and name != "lm_head"):
            replace(model, name, QuantLinear.from_linear(module, "nf4", 64, False, name))
        return model

    check(compare_with_peft(with_bitsandbytes, tmp_path, ours, **{"target_modules": LINEAR, **DENSE[case]}))


@pytest.mark.parametrize("base", [mixtral, qwen3_moe])
@pytest.mark.parametrize("case", MOE)
def test_experts_equal_peft(base: Any, case: str, tmp_path: Path) -> None:
    check(compare_with_peft(base, tmp_path, target_modules=["q_proj", "o_proj"], **MOE[case]))


OURS: dict[str, tuple[Any, LoraConfig]] = {
    "llama": (llama, LoraConfig(rank=4, alpha=6)),
    "llama rslora ranks": (llama, LoraConfig(rank=4, alpha=6, rslora=True, ranks={"q_proj": 2, r".*\.1\..*": 5}, alphas={"up_proj": 9,
    "v_proj": 1})),
    "llama dora": (llama, LoraConfig(rank=4, alpha=6, dora=True, targets=("q_proj", "embed_tokens"))),
    "llama head and embedding": (llama, LoraConfig(rank=4, alpha=6, targets=("lm_head", "embed_tokens", "up_proj"))),
    "llama bias": (llama, LoraConfig(rank=4, alpha=6, lora_bias=True)),
    "llama saved": (llama, LoraConfig(rank=4, alpha=6, fully_trained=("lm_head", "norm"))),
    "llama one layer": (llama, LoraConfig(rank=4, alpha=6, layers=(1,))),
    "llama pissa": (llama, LoraConfig(rank=4, alpha=6, init="pissa")),
    "llama pissa rslora": (llama, LoraConfig(rank=4, alpha=6, init="pissa", rslora=True, ranks={"q_proj": 2}, alphas={"up_proj": 9})),
    "llama pissa dora": (llama, LoraConfig(rank=4, alpha=6, init="pissa", dora=True)),
    "llama gaussian": (llama, LoraConfig(rank=4, alpha=6, init="gaussian")),
    "gpt2": (gpt2, LoraConfig(rank=4, alpha=6)),
    "gpt2 pissa": (gpt2, LoraConfig(rank=4, alpha=6, init="pissa")),
    "gpt2 biases": (gpt2, LoraConfig(rank=4, alpha=6, train_bias="all")),
    "gpt2 lora biases": (gpt2, LoraConfig(rank=4, alpha=6, train_bias="lora_only", targets=("c_attn",))),
    "qwen2 biases dora": (qwen2, LoraConfig(rank=4, alpha=6, train_bias="all", dora=True)),
    "mixtral": (mixtral, LoraConfig(rank=4, alpha=6, targets=("all-linear", "experts.gate_up_proj", "experts.down_proj"))),
    "mixtral ranks": (mixtral, LoraConfig(rank=4, alpha=6, rslora=True, targets=("q_proj", "down_proj", "gate_up_proj"),
    ranks={"down_proj": 2})),
    "qwen3 moe one": (qwen3_moe, LoraConfig(rank=4, alpha=6, targets=("q_proj", "layers.1.mlp.experts.down_proj"))),
}


@pytest.mark.parametrize("case", OURS)
def test_what_we_write_peft_reads_with_equal_logits(case: str, tmp_path: Path) -> None:
    """T28, T29: scale, ranks and alphas survive the file; fresh objects on both sides."""
    base, config = OURS[case]
    model = base()
    inject(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in live_tensors(model).items():
            if not name.rpartition(".")[2].startswith("start"):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    logits = model(input_ids=IDS).logits
    save_adapter(model, tmp_path / "adapter")
    untouched = base()(input_ids=IDS).logits
    assert off(logits, untouched) > 1e-3
    assert off(peft_load(base(), tmp_path / "adapter")(input_ids=IDS).logits, logits) <= LIMIT
    again = base()
    load_adapter(again, tmp_path / "adapter")
    assert off(again(input_ids=IDS).logits, logits) <= LIMIT


def test_dropout_in_training_equals_peft(tmp_path: Path) -> None:
    """T32: dropout acts in training, on the same elements as PEFT's with the same seed, with and without DoRA."""
    from peft_oracle import save_peft, with_peft

    for dora in (False, True):
        folder = tmp_path / str(dora)
        wrapped = with_peft(llama(), r=4, lora_alpha=8, target_modules=["q_proj"], lora_dropout=0.5, use_dora=dora)
        save_peft(wrapped, folder)
        model = llama()
        load_adapter(model, folder)
        calm = model(input_ids=IDS).logits
        wrapped.train()
        model.train()
        torch.manual_seed(7)
        expected = wrapped(input_ids=IDS).logits
        torch.manual_seed(7)
        found = model(input_ids=IDS).logits
        assert off(found, expected) <= LIMIT
        assert off(found, calm) > 1e-3


@pytest.mark.parametrize("dora", [False, True])
def test_bfloat16_base_equals_peft(dora: bool, tmp_path: Path) -> None:
    """T37, T39: float32 factors on a bf16 base; no further from the float32 model than PEFT, which multiplies in float32, by 1.5x."""
    import transformers  # noqa: F401
    from peft_oracle import save_peft, with_peft

    wrapped = with_peft(llama().bfloat16(), r=4, lora_alpha=8, target_modules=LINEAR, use_dora=dora)
    save_peft(wrapped, tmp_path)
    model = llama().bfloat16()
    load_adapter(model, tmp_path)
    assert {tensor.dtype for tensor in live_tensors(model).values()} == {torch.float32}
    expected = wrapped(input_ids=IDS).logits
    found = model(input_ids=IDS).logits
    assert found.dtype == torch.bfloat16
    exact = model.float()(input_ids=IDS).logits
    assert off(found, exact) <= 1.5 * off(expected, exact)
    assert off(expected, exact) <= 2**-5
