"""PEFT adapters of a mixture of experts: fused experts beside plain layers are read; a router's update is refused by name and count."""

from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import AdapterError
from tests.models.small_models import write_folder

IDS = torch.arange(3, 60)[None]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks transformers for it
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),  # peft's own all-linear
]


def by_peft(folder: Path, **settings: Any) -> Any:
    """A Mixtral in `base` with a random adapter of PEFT, saved in `adapter`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    write_folder(folder / "base", "mixtral")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **settings)).eval()
    wrapped.save_pretrained(folder / "adapter")
    return wrapped


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"], ["mlp.experts.gate_up_proj"]])
@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], r".*\.(q_proj|o_proj)"])
def test_fused_experts_beside_plain_layers(tmp_path: Path, parameters: list[str], modules: object) -> None:
    """Endings of parameters without their owner do not make experts of the plain layers."""
    theirs = by_peft(tmp_path, target_modules=modules, target_parameters=parameters)
    ours = hb.load(tmp_path / "base", dtype="float32")[0]
    hb.load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": "all-linear"}, {"target_modules": ["q_proj", "gate"]},
     {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}],
)  # fmt: skip
def test_an_adapted_router_is_refused_by_name_and_count(tmp_path: Path, settings: dict[str, Any]) -> None:
    by_peft(tmp_path, **settings)
    model = hb.load(tmp_path / "base", dtype="float32")[0]
    before = model(input_ids=IDS).logits
    with pytest.raises(AdapterError) as caught:
        hb.load_adapter(model, tmp_path / "adapter")
    assert caught.value.code == "E-ADAPT-063"
    assert "model.layers.0.mlp.gate, model.layers.1.mlp.gate" in caught.value.found and "tensors match" in caught.value.found
    assert torch.equal(model(input_ids=IDS).logits, before)
