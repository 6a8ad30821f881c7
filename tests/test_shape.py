"""ModelShape against transformers' own modules, tensor by tensor, and against published parameter counts."""

import json
from pathlib import Path

import pytest
import torch

from halfbyte.errors import ModelError, UnsupportedError
from halfbyte.shape import FAMILIES, ModelShape

LLAMA_2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM2_135M = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
# GPT-3 (arXiv 2005.14165, table 2.1): separate q, k, v projections with biases, as in OPT.
GPT_3 = {
    "model_type": "opt", "hidden_size": 12288, "ffn_dim": 49152, "num_hidden_layers": 96, "num_attention_heads": 96,
    "vocab_size": 50257, "max_position_embeddings": 2048,
}  # fmt: skip


def test_published_adapter_counts() -> None:
    assert ModelShape.from_config(LLAMA_2_7B).lora_params(8, ("q_proj", "v_proj")) == 4_194_304
    assert ModelShape.from_config(GPT_3).lora_params(4, ("q_proj", "v_proj")) == 18_874_368
    for rank in (1, 8, 16):
        assert ModelShape.from_config(SMOLLM2_135M).lora_params(rank) == 305_280 * rank


def test_published_model_counts() -> None:
    assert ModelShape.from_config(LLAMA_2_7B).total_params == 6_738_415_616
    assert ModelShape.from_config(SMOLLM2_135M).total_params == 134_515_008


def test_all_linear_with_the_head_is_what_litgpt_counts() -> None:
    """20,277,248 at rank 8 and 648,871,936 at rank 256 on Llama-2-7B: all linear layers and the output head."""
    shape = ModelShape.from_config(LLAMA_2_7B)
    head = shape.hidden + shape.vocab
    assert shape.lora_params(8) + 8 * head == 20_277_248
    assert shape.lora_params(256) + 256 * head == 648_871_936


def _small(family: str) -> dict[str, object]:
    names = {
        "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": 96},
        "opt": {"hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40,
                "vocab_size": 96, "word_embed_proj_dim": 48},
    }  # fmt: skip
    common: dict[str, object] = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
        "max_position_embeddings": 40,
    }  # fmt: skip
    if family not in ("phi", "gpt_neox"):
        common["num_key_value_heads"] = 2
    if family in ("mixtral", "olmoe", "qwen3_moe"):
        common |= {"num_local_experts": 3} if family == "mixtral" else {"num_experts": 3}
        common |= {"moe_intermediate_size": 24} if family == "qwen3_moe" else {}
    return dict(names.get(family, common))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tensor_of_a_family_equals_transformers(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **_small(family), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_config(config.to_dict())
    expected: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight").removesuffix(".bias")
        expected[module] = expected.get(module, 0) + parameter.numel()
    assert {weight.name: weight.params for weight in shape.weights if weight.params} == expected
    assert shape.total_params == sum(parameter.numel() for parameter in model.parameters())
    linear_kinds = {name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"}
    assert {weight.name for weight in shape.linears} == linear_kinds


def test_attention_bias_and_untied_head_are_counted() -> None:
    plain = ModelShape.from_config(SMOLLM2_135M)
    biased = ModelShape.from_config({**SMOLLM2_135M, "attention_bias": True})
    untied = ModelShape.from_config({**SMOLLM2_135M, "tie_word_embeddings": False})
    assert biased.total_params - plain.total_params == 30 * (576 + 2 * 192 + 576)
    assert untied.total_params - plain.total_params == 49152 * 576


def test_kinds_add_up_to_the_whole() -> None:
    shape = ModelShape.from_config(LLAMA_2_7B)
    kinds = {weight.kind for weight in shape.weights}
    assert sum(shape.params_of(kind) for kind in kinds) == shape.total_params


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model_type": "lama"}, "E-UNSUP-901"), ({"model_type": None}, "E-UNSUP-901"), ({"hidden_size": 0}, "E-MODEL-904"),
        ({"hidden_size": "576"}, "E-MODEL-904"), ({"num_hidden_layers": True}, "E-MODEL-904"), ({"vocab_size": None}, "E-MODEL-904"),
        ({"num_hidden_layers": 10**6}, "E-MODEL-905"), ({"num_key_value_heads": -1}, "E-MODEL-904"), ({"head_dim": 1.5}, "E-MODEL-904"),
        ({"mlp_only_layers": [1]}, "E-UNSUP-902"),
    ],
)  # fmt: skip
def test_a_bad_config_is_refused_with_its_key(change: dict[str, object], code: str) -> None:
    with pytest.raises((ModelError, UnsupportedError)) as caught:
        ModelShape.from_config({**SMOLLM2_135M, **change})
    assert caught.value.code == code
    assert next(iter(change)) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "written"), [("hidden_size", "hiden_size"), ("num_hidden_layers", "num_hiden_layers"), ("vocab_size", "vocabsize")]
)
def test_a_misspelt_key_is_named_beside_the_one_that_is_missing(key: str, written: str) -> None:
    values = {written if name == key else name: value for name, value in {**SMOLLM2_135M, "hidden_act": "silu", "pad_token_id": 0}.items()}
    with pytest.raises(ModelError) as caught:
        ModelShape.from_config(values)
    assert caught.value.found == "no such key" and caught.value.remedy == f"rename {written}, which is there, to {key}"
    assert "a whole number over 0, without quotes" in str(caught.value)
    del values[written]
    with pytest.raises(ModelError) as caught:
        ModelShape.from_config(values)
    assert caught.value.found == "no such key" and not caught.value.remedy


def test_a_size_in_quotes_is_shown_with_them() -> None:
    with pytest.raises(ModelError) as caught:
        ModelShape.from_config({**SMOLLM2_135M, "hidden_size": "576"})
    assert caught.value.found == '"576"' and not caught.value.remedy


def test_read_takes_a_folder_and_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="E-MODEL-901"):
        ModelShape.read(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="E-MODEL-903"):
        ModelShape.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2_135M), encoding="utf-8")
    assert ModelShape.read(tmp_path).layers == 30
    (tmp_path / "config.json").write_text(" " * 1_000_001, encoding="utf-8")
    with pytest.raises(ModelError, match="E-MODEL-902"):
        ModelShape.read(tmp_path)


@pytest.mark.parametrize(("changes", "key"), [
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings"), ({"attention_bias": float("nan")}, "attention_bias"),
    ({"mlp_bias": "32"}, "mlp_bias"), ({"mlp_bias": 1}, "mlp_bias"), ({"do_layer_norm_before": "yes"}, "do_layer_norm_before"),
    ({"num_attention_heads": 5, "num_key_value_heads": 3, "hidden_size": 35}, "num_key_value_heads"),
    ({"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 32}, "num_attention_heads"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ({"quantization_config": 3}, "quantization_config"),
])  # fmt: skip
def test_what_a_config_cannot_mean_is_refused_by_its_key(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ModelError) as caught:
        ModelShape.from_config({**LLAMA_2_7B, **changes}, place="x/config.json")
    assert caught.value.place.endswith(key) and caught.value.code in ("E-MODEL-009", "E-MODEL-906", "E-MODEL-907")


def test_what_a_config_may_leave_open_is_accepted() -> None:
    same = {"attention_bias": None, "quantization_config": None}
    assert ModelShape.from_config({**LLAMA_2_7B, **same}).total_params == ModelShape.from_config(LLAMA_2_7B).total_params
    assert ModelShape.from_config({**LLAMA_2_7B, "hidden_size": 4100, "head_dim": 128}).sizes["queries"] == 4096
