"""An adapter on a base of the same shape with other weights is refused by every command that would use it; --force-base takes it."""

import io
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from halfbyte.cli.main import run
from halfbyte.models.source import resolve
from tests.end_to_end.tiny_world import write_model, write_rows

SMALL = ["train.max_steps=1", "train.global_batch_size=4", "data.max_tokens=128", "train.threads=1", "train.sample_prompts=0",
         "lora.rank=2", "optim.learning_rate=1e-3", "train.eval_every_steps=null", "train.save_every_steps=null"]  # fmt: skip


def other_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.25
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one shape, `a` and `b`, rows, and a run on `a`."""
    folder = tmp_path_factory.mktemp("bases")
    write_model(folder / "a")
    write_model(folder / "b")
    other_weights(folder / "b")
    write_rows(folder / "rows.jsonl")
    words = ["train", "--model", folder / "a", "--data", folder / "rows.jsonl", "--method", "lora", "--out", folder / "run", *SMALL]
    assert run([str(word) for word in words]) == 0
    return folder


def commands(world: Path, base: str, out: Path) -> dict[str, list[str]]:
    model, adapter = str(world / base), str(world / "run" / "adapter")
    return {
        "eval": ["eval", model, "--adapter", adapter, "--data", str(world / "rows.jsonl")],
        "generate": ["generate", model, "lamp", "--adapter", adapter, "--max-new-tokens", "2"],
        "chat": ["chat", model, "--adapter", adapter, "--max-new-tokens", "2"],
        "merge": ["merge", adapter, "--model", model, "--out", str(out / "merged")],
    }


@pytest.mark.parametrize("name", ["eval", "generate", "chat", "merge"])
def test_an_adapter_of_other_weights_is_refused(
    name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    noted = json.loads((world / "run" / "adapter" / "halfbyte.json").read_text())["base_digest"]
    assert noted == resolve(str(world / "a")).weights
    words = commands(world, "b", tmp_path)[name]
    assert run(words) == 2
    said = capsys.readouterr().err
    assert "error E-ADAPT-060" in said and noted[:12] in said and resolve(str(world / "b")).weights[:12] in said and "--force-base" in said
    assert not (tmp_path / "merged").exists()
    assert run([*words, "--force-base"]) == 0
    assert run(commands(world, "a", tmp_path / "a")[name]) == 0


def test_a_run_whose_base_was_changed_afterwards_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another template file is no other base; other weights are."""
    words = ["generate", str(world / "run"), "lamp", "--max-new-tokens", "2"]
    (world / "a" / "notes.json").write_text("{}")
    assert run(words) == 0
    weights = (world / "a" / "model.safetensors").read_bytes()
    other_weights(world / "a")
    assert run(words) == 2 and "E-ADAPT-060" in capsys.readouterr().err
    assert run([*words, "--force-base"]) == 0
    (world / "a" / "model.safetensors").write_bytes(weights)
    assert run(words) == 0
