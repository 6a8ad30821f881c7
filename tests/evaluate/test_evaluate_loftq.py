"""A LoftQ adapter belongs to the base that LoftQ quantized: opened, resumed, merged or moved it gives the numbers of training."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import AdapterError
from halfbyte.evaluate.opened import open_model
from halfbyte.formats import peft
from halfbyte.models.load import load_model
from halfbyte.quant.linear import QuantLinear
from tests.end_to_end.tiny_world import rows, write_model, write_rows

IDS = torch.arange(3, 60)[None]
SETTINGS = {
    "lora": {"rank": 4, "init": "loftq", "loftq_iterations": 3, "targets": ["q_proj", "up_proj", "down_proj"]},
    "train": {"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "threads": 1, "sample_prompts": 0, "eval_every_steps": 2,
              "save_every_steps": 2, "keep_best": False},
    "optim": {"learning_rate": 0.003}, "quant": {"blocksize": 128},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, held-out rows, and a finished LoftQ run in `run`."""
    folder = tmp_path_factory.mktemp("loftq")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", rows(24))
    write_rows(folder / "held.jsonl", rows(8, seed=5))
    train(folder, folder / "run")
    return folder


def train(world: Path, out: Path, dtype: str = "float32", **changes: object) -> hb.Run:
    own = {"model": {"name": str(world / "model"), "dtype": dtype}, "data": {"path": str(world / "rows.jsonl"),
           "eval_path": str(world / "held.jsonl"), "max_tokens": 128}}  # fmt: skip
    return hb.train(out=out, **{**SETTINGS, **own, **changes})


def last_loss(run: Path) -> float:
    return float([record["eval_loss"] for record in hb.Run.open(run).metrics() if "eval_loss" in record][-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_of_a_reopened_run_is_that_at_the_end_of_training(world: Path, tmp_path: Path, dtype: str) -> None:
    run = hb.Run.open(world / "run") if dtype == "float32" else train(world, tmp_path / "run", dtype)
    at_the_end = last_loss(run.folder)
    again = run.evaluate(world / "held.jsonl", batch_size=2)["loss"]
    assert again == pytest.approx(at_the_end, rel=1e-6 if dtype == "float32" else 1e-4)
    layers = {name for name, module in run.opened.model.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == 6 and all(name.removesuffix(".base").endswith(("q_proj", "up_proj", "down_proj")) for name in layers)
    # The plain NF4 base, on which such a run was opened once, is another model.
    plain = load_model(str(world / "model"), dtype=dtype, quant=run.config.quant.model_copy(update={"format": "nf4"}))
    hb.load_adapter(plain, run.adapter_folder or "", force_base=True)
    gap = (plain(input_ids=IDS).logits - run.opened.model(input_ids=IDS).logits).abs().max()
    assert gap > 1e-3


def test_an_adapter_folder_away_from_its_run_rebuilds_the_base(world: Path, tmp_path: Path) -> None:
    """Alone, beside its model by --adapter, and through load_adapter on the dense model: bit for bit; saved again it stays so."""
    expected = open_model(world / "run").model(input_ids=IDS).logits
    alone = tmp_path / "moved"
    shutil.copytree(world / "run" / "adapter", alone)
    noted = json.loads((alone / "halfbyte.json").read_text())["loftq"]
    assert noted == {"format": "nf4", "blocksize": 128, "double_quant": True, "iterations": 3, "dtype": "float32"}
    for opened in (open_model(alone, dtype="float32"), open_model(world / "model", adapter=alone, dtype="float32")):
        assert torch.equal(opened.model(input_ids=IDS).logits, expected)
    model = load_model(str(world / "model"), dtype="float32")
    hb.load_adapter(model, alone)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    hb.save_adapter(model, tmp_path / "again", base=str(world / "model"))
    assert peft.read(tmp_path / "again").loftq == peft.read(alone).loftq is not None
    assert torch.equal(open_model(tmp_path / "again", dtype="float32").model(input_ids=IDS).logits, expected)


def test_adapters_can_be_switched_on_the_rebuilt_base(world: Path) -> None:
    opened = open_model(world / "run")
    expected = opened.model(input_ids=IDS).logits
    name = opened.active
    opened.activate(None)
    assert not torch.equal(opened.model(input_ids=IDS).logits, expected)
    opened.activate(name)
    assert torch.equal(opened.model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_on_another_base_it_is_refused(world: Path, quant: str) -> None:
    with pytest.raises(AdapterError) as caught:
        open_model(world / "run", quant=quant)
    assert caught.value.code == "E-ADAPT-065" and "--force-base" in caught.value.text()
    assert open_model(world / "run", quant=quant, force_base=True).active == "run"
    bare = open_model(world / "model", quant=quant, dtype="float32")
    with pytest.raises(AdapterError, match="loftq"):
        bare.activate(str(world / "run"))
    assert bare.active is None


def test_a_resumed_run_is_the_uninterrupted_one(world: Path, tmp_path: Path) -> None:
    first = {**SETTINGS["train"], "max_steps": 2}
    train(world, tmp_path / "run", train=first, optim={"learning_rate": 0.003, "schedule": "constant"})
    hb.train(out=tmp_path / "run", resume=True, **{"train.max_steps": 4})
    train(world, tmp_path / "whole", optim={"learning_rate": 0.003, "schedule": "constant"})
    resumed, whole = peft.read(tmp_path / "run" / "adapter"), peft.read(tmp_path / "whole" / "adapter")
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)
    again = hb.Run.open(tmp_path / "run").evaluate(world / "held.jsonl", batch_size=2)["loss"]
    assert last_loss(tmp_path / "run") == last_loss(tmp_path / "whole") == pytest.approx(again, rel=1e-6)


def test_merged_it_is_the_model_that_was_trained(world: Path, tmp_path: Path) -> None:
    expected = open_model(world / "run").model(input_ids=IDS).logits
    done = hb.merge(world / "run", tmp_path / "merged", dtype="float32")
    assert done.difference.largest < 1e-4
    torch.testing.assert_close(load_model(str(tmp_path / "merged"), dtype="float32")(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="loftq"):
        hb.merge(world / "run", tmp_path / "original", onto="original", dtype="float32")
    assert not (tmp_path / "original").exists()
