"""When a plan says that the loss from 4 bits is worth a calibrated base: by size and kind, with its reason, where qlora is planned."""

import json
from pathlib import Path

import pytest

from halfbyte.plan.four_bits import advice, worth_calibrating
from halfbyte.shape import ModelShape

SIZES = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip


def shape(folder: Path, **changes: object) -> ModelShape:
    given = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32_000, **SIZES, **changes}
    (folder / "config.json").write_text(json.dumps(given))
    return ModelShape.read(folder)


@pytest.mark.parametrize(("changes", "worth"), [({}, False), ({"vocab_size": 128_256}, True), ({"num_hidden_layers": 10}, True)])
def test_small_models_and_llama_3_are_worth_it(changes: dict[str, object], worth: bool, tmp_path: Path) -> None:
    found, why = worth_calibrating(shape(tmp_path, **changes))
    assert found is worth and "published" in why
    assert ("quant.calibrate=true" in advice(shape(tmp_path, **changes), "nf4")) is worth
    assert not advice(shape(tmp_path, **changes), "int8")
    assert not advice(shape(tmp_path, **changes, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "nf4")
