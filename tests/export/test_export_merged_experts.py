"""A merged mixture of experts is wholly dense, whether its experts carried an adapter or only lay packed; plain transformers runs it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import halfbyte as hb
from halfbyte.lora.experts import LoraExperts
from halfbyte.quant.experts import QuantExperts
from tests.models.small_models import write_folder

IDS = torch.arange(3, 60)[None]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_a_merged_mixture_of_experts_is_dense_and_gives_the_same_logits(targets: object, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_folder(tmp_path / "base", "mixtral")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{number}+1=", "completion": f"{number + 1}"}) + "\n" for number in range(12)))
    train = {"max_steps": 3, "global_batch_size": 4, "threads": 1, "sample_prompts": 0, "eval_every_steps": None, "save_every_steps": None}
    settings = {"lora": {"rank": 2, "targets": targets}, "optim": {"learning_rate": 0.01}, "train": train}
    run = hb.train(model={"name": str(tmp_path / "base"), "dtype": "float32"}, data=rows, out=tmp_path / "run", **settings)
    unmerged = run.opened.model
    assert any(isinstance(module, QuantExperts) for module in unmerged.modules())
    assert any(isinstance(module, LoraExperts) for module in unmerged.modules()) == (targets == "all-linear")
    done = hb.merge(run.folder, tmp_path / "merged", dtype="float32")
    assert done.difference.largest < 1e-4
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert any(".experts." in name for name in after) and all(after[name].shape == before[name].shape for name in before)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        expected, found = unmerged(input_ids=IDS).logits, plain(input_ids=IDS).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (base - expected).abs().max() > 1e-2
