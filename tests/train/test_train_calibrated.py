"""quant.calibrate in a run: its base is made once, found again, used by all that opens the run, and missed by name when gone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as hb
from halfbyte import host
from halfbyte.config import load_config
from halfbyte.data.load import TrainData, load_data
from halfbyte.errors import AdapterError, CheckpointError, ConfigError, DoesNotFitError, HalfbyteError, ModelError
from halfbyte.evaluate.opened import open_model
from halfbyte.formats import peft
from halfbyte.lora.inject import updates
from halfbyte.models.assemble import assemble
from halfbyte.models.load import load_model, load_tokenizer
from halfbyte.models.source import resolve
from halfbyte.train import calibrated_base
from halfbyte.train.calibrated_base import decide
from halfbyte.train.faults import FaultStop
from halfbyte.train.run_lock import RunLock
from tests.end_to_end.tiny_world import rows, write_model, write_rows
from tests.train.small_run import clear_faults

SETTINGS: dict[str, Any] = {
    "lora": {"rank": 4}, "optim": {"learning_rate": 0.003}, "quant": {"calibrate": True, "calibration_rows": 20},
    "train": {"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "threads": 1, "sample_prompts": 0, "eval_every_steps": 2,
              "save_every_steps": 2, "keep_best": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, held-out rows, and a finished run with a calibrated base in `run`."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", rows(24))
    write_rows(folder / "held.jsonl", rows(8, seed=5))
    train(folder, folder / "run")
    return folder


def settings(world: Path, **changes: Any) -> dict[str, Any]:
    own = {"model": {"name": str(world / "model"), "dtype": "float32"}, "data": {"path": str(world / "rows.jsonl"),
           "eval_path": str(world / "held.jsonl"), "max_tokens": 128}}  # fmt: skip
    return {**SETTINGS, **own, **changes}


def train(world: Path, out: Path, **changes: Any) -> hb.Run:
    return hb.train(out=out, **settings(world, **changes))


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return peft.read(run / "adapter").tensors


def test_the_run_begins_on_its_base_and_start(world: Path) -> None:
    run = hb.Run.open(world / "run")
    assert run.config.lora.init == "calibrated" and run.config.quant.calibrate is True
    adapter = peft.read(world / "run" / "adapter")
    assert adapter.base_name == str((world / "run" / "base").absolute())
    begun, config = peft.read(world / "run" / "base" / "start"), load_config(world / "run" / "config.yaml")
    layers = updates(assemble(config, base=world / "run" / "base").model)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_a.detach(), begun.tensors[f"{name}.lora_a"]) and bool(layer.lora_b.any())
    losses = [record["eval_loss"] for record in run.metrics() if "eval_loss" in record]
    assert run.evaluate(world / "held.jsonl", batch_size=2)["loss"] == pytest.approx(losses[-1], rel=1e-6)


def test_a_resumed_run_is_the_same_to_the_bit(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """# T70  Stopped after step 3, gone on with: the base is found, not made again, and the adapter is that of the unbroken run."""
    clear_faults(monkeypatch)
    monkeypatch.setenv("HALFBYTE_FAULTS", "train.step_done:stop:3")
    with pytest.raises(FaultStop):
        train(world, tmp_path / "run")
    clear_faults(monkeypatch)
    made = (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns
    hb.train(out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns == made
    resumed, unbroken = tensors(tmp_path / "run"), tensors(world / "run")
    assert resumed.keys() == unbroken.keys() and all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_merge_generate_and_a_moved_run_use_the_base(world: Path, tmp_path: Path) -> None:
    """# T59"""
    shutil.copytree(world / "run", tmp_path / "moved")
    opened, merged = open_model(tmp_path / "moved"), hb.merge(tmp_path / "moved", tmp_path / "merged", dtype="float32")
    assert opened.source.folder == tmp_path / "moved" / "base" and merged.difference.largest < 1e-3
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        again = load_model(str(tmp_path / "merged"), dtype="float32")(input_ids=ids).logits
        assert torch.allclose(again, opened.model(input_ids=ids).logits, atol=1e-3)
    answer = hb.generate(tmp_path / "moved", "3: lamp in the hall on", max_new_tokens=4)
    assert answer == hb.Run.open(world / "run").generate("3: lamp in the hall on", max_new_tokens=4)
    with pytest.raises(AdapterError, match="E-ADAPT-084"):
        hb.merge(tmp_path / "moved", tmp_path / "onto", onto="original")


def test_a_base_that_has_gone_is_missed_by_name(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "base")
    for use in (lambda: open_model(tmp_path / "run"), lambda: open_model(tmp_path / "run" / "adapter"),
                lambda: hb.train(out=tmp_path / "run", resume=True)):  # fmt: skip
        with pytest.raises(ModelError, match="E-MODEL-048"):
            use()


def test_a_folder_of_the_quantize_command_serves_a_run(world: Path, tmp_path: Path) -> None:
    """The start of the folder with another alpha: the product stays.  Another rank or other layers are refused, before training."""
    hb.quantize(world / "model", tmp_path / "base", calibrate=world / "rows.jsonl", start_rank=4)
    own = {"model": {"name": str(tmp_path / "base"), "dtype": "float32"}, "quant": {}}
    run = train(world, tmp_path / "run", lora={"rank": 4, "alpha": 2, "init": "calibrated"}, **own)
    begun = peft.read(tmp_path / "base" / "start")
    layers = updates(assemble(run.config).model)
    for name, layer in layers.items():
        wanted = 2.0 * begun.tensors[f"{name}.lora_b"] @ begun.tensors[f"{name}.lora_a"]
        assert torch.allclose(layer.delta_weight(), wanted, atol=1e-6)
    assert run.evaluate(world / "held.jsonl")["loss"] > 0
    for lora, code in (({"rank": 8}, "E-ADAPT-006"), ({"rank": 4, "targets": ["q_proj", "v_proj"]}, "E-ADAPT-007")):
        with pytest.raises(AdapterError, match=code):
            train(world, tmp_path / "other", lora={**lora, "init": "calibrated"}, **own)
    shutil.rmtree(tmp_path / "base" / "start")
    with pytest.raises(ModelError, match="E-MODEL-047"):
        train(world, tmp_path / "other", lora={"rank": 4, "init": "calibrated"}, **own)
    with pytest.raises(ModelError, match="E-MODEL-046"):
        train(world, tmp_path / "other", **{**own, "quant": {"calibrate": True}})


def test_a_start_that_was_written_down_is_kept(world: Path, tmp_path: Path) -> None:
    """lora.init=default: calibrated scales, an ordinary start, and no folder start."""
    run = train(world, tmp_path / "run", lora={"rank": 4, "init": "default"})
    assert run.config.lora.init == "default" and not (tmp_path / "run" / "base" / "start").exists()
    assert (tmp_path / "run" / "base" / "calibration.json").is_file()


@pytest.mark.parametrize(("changes", "code"), [
    ({"method": "lora"}, "E-CONF-148"), ({"quant": {"calibrate": True, "format": "int8"}}, "E-CONF-149"),
    ({"lora": {"init": "loftq"}}, "E-CONF-156"), ({"method": "lora", "quant": {}, "lora": {"init": "calibrated"}}, "E-CONF-157"),
    ({"quant": {"calibration_rows": 9}}, "E-CONF-170"),
])  # fmt: skip
def test_settings_that_do_not_go_together(world: Path, tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        train(world, tmp_path / "run", **changes)


def test_dense_weights_that_do_not_fit_are_refused_before_they_are_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan counts the packed base; calibrating needs the dense one beside it once."""
    monkeypatch.setattr(host, "memory_bytes", lambda: (1 << 30, 100_000))
    config = load_config(None, flags={**settings(world), "out": str(tmp_path / "run")})
    data = load_data(config.data, load_tokenizer(str(world / "model")))
    with pytest.raises(DoesNotFitError, match="E-FIT-402"):
        calibrated_base.with_calibrated_base(config, resolve(str(world / "model")), data)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_start_has_no_calibrated_init(world: Path) -> None:
    with pytest.raises(HalfbyteError, match="E-UNSUP-049"):
        hb.inject(load_model(str(world / "model")), init="calibrated", rank=4)


def test_auto_calibrates_where_four_bits_are_known_to_cost(world: Path, tmp_path: Path) -> None:
    """By size and family, with the reason; too few rows are no error but a reason."""
    config = load_config(None, flags={**settings(world, quant={"calibrate": "auto"}), "out": str(tmp_path / "run")})
    data = load_data(config.data, load_tokenizer(str(world / "model")))
    llama = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}  # fmt: skip

    def says(data: TrainData = data, **changes: int) -> tuple[bool, str]:
        (tmp_path / "config.json").write_text(json.dumps({**llama, **changes}))
        return decide(config, tmp_path, data)

    assert says() == (True, "4 bits cost models of the LLaMA-3 kind 0.03 nats and more (published)")
    assert says(vocab_size=32000)[0] is False
    assert says(num_hidden_layers=4) == (True, "4 bits cost models below 3 B parameters 0.03 nats and more (published)")
    few = TrainData(data.train[:3], [], data.report, "", data.shape)
    assert says(few)[0] is False
    run = train(world, tmp_path / "run", quant={"calibrate": "auto"})
    assert run.config.quant.calibrate is True and (tmp_path / "run" / "base").is_dir()


def test_what_a_killed_calibration_left_in_the_run_goes_and_one_at_work_is_left(world: Path, tmp_path: Path) -> None:
    left = tmp_path / "run" / ".base-abcd1234" / "new"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(bytes(100))
    with RunLock(tmp_path / "run"), pytest.raises(CheckpointError, match="E-CKPT-003"):  # another process is calibrating here
        train(world, tmp_path / "run")
    assert left.is_dir()
    train(world, tmp_path / "run")
    assert not left.parent.exists() and (tmp_path / "run" / "base" / "config.json").is_file()
