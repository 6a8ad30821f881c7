"""The command line on bad settings, data, models, adapters and checkpoints: one block, the right exit code, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.cli.main import run
from tests.end_to_end.tiny_world import rows, write_model, write_rows

SMALL = ["train.max_steps=2", "train.global_batch_size=4", "train.micro_batch_size=2", "data.max_tokens=128", "train.threads=1",
         "train.sample_prompts=0", "lora.rank=2", "train.save_every_steps=1", "optim.learning_rate=1e-3"]  # fmt: skip
Case = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same in shards, rows, and a finished run of two steps with its checkpoints."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    write_model(folder / "shards", shards=True)
    write_rows(folder / "rows.jsonl")
    arguments = ["train", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--method", "lora"]
    assert run([*arguments, "--out", str(folder / "done"), *SMALL]) == 0
    return folder


def _train(folder: Path, *settings: str, model: str = "model", data: str = "rows.jsonl", method: str = "lora") -> list[str]:
    given = ["--model", str(folder / model), "--data", str(folder / data), "--method", method, "--out", str(folder / "out")]
    return ["train", *given, *SMALL, *settings]


def _data(text: str | bytes) -> Case:
    def case(folder: Path) -> list[str]:
        (folder / "rows.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
        return _train(folder)

    return case


def _yaml(text: str) -> Case:
    def case(folder: Path) -> list[str]:
        (folder / "run.yaml").write_text(text, encoding="utf-8")
        return ["train", str(folder / "run.yaml"), "--out", str(folder / "out")]

    return case


def _model_config(**changes: object) -> Case:
    def case(folder: Path) -> list[str]:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")
        return _train(folder)

    return case


def _weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Case:
    def case(folder: Path) -> list[str]:
        path = folder / "model" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return _train(folder)

    return case


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")


def _without_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.self_attn.q_proj.weight"]


def _truncated(folder: Path) -> list[str]:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return _train(folder)


def _git_lfs(folder: Path) -> list[str]:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234\n"
    (folder / "model" / "model.safetensors").write_text(text, encoding="utf-8")
    return _train(folder)


def _missing_shard(folder: Path) -> list[str]:
    next((folder / "shards").glob("model-00002-of-*.safetensors")).unlink()
    return _train(folder, model="shards")


def _adapter(change: Callable[[Path], None]) -> Case:
    def case(folder: Path) -> list[str]:
        change(folder / "done" / "adapter")
        return ["generate", str(folder / "done"), "lamp in the hall on", "--max-new-tokens", "2"]

    return case


def _adapter_rank(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 7}), encoding="utf-8")


def _adapter_nan(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")


def _adapter_incomplete(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors")


def _adapter_pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _resume(folder: Path) -> list[str]:
    return ["train", "--resume", "--out", str(folder / "done"), "train.max_steps=90"]


def _no_checkpoint(folder: Path) -> list[str]:
    shutil.rmtree(folder / "done" / "checkpoints")
    return _resume(folder)


def _damaged_checkpoints(folder: Path) -> list[str]:
    for path in (folder / "done" / "checkpoints").rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    return _resume(folder)


def _taken_folder(folder: Path) -> list[str]:
    return [*_train(folder)[:7], "--out", str(folder / "done"), *SMALL]


def _hub_name(folder: Path) -> list[str]:
    return ["train", "--model", "someone/some-model", "--data", str(folder / "rows.jsonl"), "--out", str(folder / "out")]


CASES: dict[str, tuple[Case, int, str]] = {
    # settings
    "no settings at all": (lambda folder: ["train"], 2, "E-CONF-021"),
    "settings file missing": (lambda folder: ["train", str(folder / "nothing.yaml")], 2, "E-CONF-002"),
    "unknown setting": (_yaml("data: rows.jsonl\nlora: {rnk: 8}\n"), 2, "E-CONF-020"),
    "rank zero on the command line": (lambda folder: _train(folder, "lora.alpha=0"), 2, "E-CONF-023"),
    "several problems": (_yaml("data: rows.jsonl\nlora: {rank: 0}\noptim: {learning_rate: 7}\n"), 2, "E-CONF-001"),
    "quantized base for method lora": (lambda folder: _train(folder, "quant.format=nf4"), 2, "E-CONF-141"),
    "folder of another run": (_taken_folder, 2, "E-CONF-"),
    # data
    "data file missing": (lambda folder: _train(folder, data="nothing.jsonl"), 2, "E-DATA-001"),
    "data file empty": (_data(""), 2, "E-DATA-008"),
    "line that is not JSON": (_data('{"prompt": "a", "completion": "b"}\n{"prompt": "a" "completion": "b"}\n'), 2, "E-DATA-020"),
    "unknown role": (_data('{"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'), 2, "E-DATA-"),
    "UTF-16 text": (_data('{"prompt": "a", "completion": "b"}\n'.encode("utf-16")), 2, "E-DATA-011"),
    "rows without an answer": (_data('{"prompt": "a", "completion": ""}\n' * 30), 2, "E-DATA-"),
    # model
    "model folder missing": (lambda folder: _train(folder, model="nothing"), 2, "E-MODEL-"),
    "unknown architecture": (_model_config(model_type="mystery", architectures=["MysteryForCausalLM"]), 2, "E-MODEL-"),
    "vocabulary smaller than the tokenizer": (_model_config(vocab_size=100), 2, "E-"),
    "weights cut off": (_truncated, 2, "E-WEIGHT-"),
    "weights are a Git LFS pointer": (_git_lfs, 2, "E-WEIGHT-"),
    "a shard is missing": (_missing_shard, 2, "E-WEIGHT-"),
    "a tensor is missing": (_weights(_without_one), 2, "E-WEIGHT-"),
    "a weight is not finite": (_weights(_nan), 2, "E-WEIGHT-"),
    "a target that matches nothing": (lambda folder: _train(folder, "lora.targets=[q_prj]"), 2, "E-TARGET-"),
    # adapter
    "adapter of another rank": (_adapter(_adapter_rank), 2, "E-ADAPT-"),
    "adapter with a NaN": (_adapter(_adapter_nan), 2, "E-ADAPT-"),
    "adapter with a tensor missing": (_adapter(_adapter_incomplete), 2, "E-ADAPT-"),
    "adapter as a pickle": (_adapter(_adapter_pickled), 2, "E-ADAPT-"),
    # checkpoint
    "no checkpoint to resume from": (_no_checkpoint, 4, "E-CKPT-"),
    "every checkpoint damaged": (_damaged_checkpoints, 4, "E-CKPT-"),
    # the network
    "a Hub name without permission to download": (_hub_name, 2, "E-MODEL-003"),
}  # fmt: skip


def _state(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", list(CASES))
def test_one_block_one_exit_code_and_nothing_written(
    name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, exit_code, code = CASES[name]
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    # What the run wrote names the folder it was made in; the copy is to stand for itself.
    saved = folder / "done" / "config.yaml"
    saved.write_text(saved.read_text().replace(str(world), str(folder)), encoding="utf-8")
    arguments = case(folder)
    before = _state(folder)
    assert run(arguments) == exit_code
    printed = capsys.readouterr()
    blocks = [line for line in printed.err.splitlines() if line.startswith("error ")]
    assert len(blocks) == 1 and blocks[0].startswith(f"error {code}"), printed.err
    assert "Traceback" not in printed.out + printed.err
    assert printed.err[printed.err.index("error ") :].count("\n  ") >= 2, "the block says where, what was found, or what to do"
    assert _state(folder) == before
    assert not (folder / "out").exists() or not any(path.is_file() for path in (folder / "out").rglob("*"))


def test_the_good_neighbours_of_the_bad_inputs_work(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the one fault the same command lines succeed, so each refusal above is due to its fault."""
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    assert run(_train(folder, model="shards")) == 0
    assert run(["generate", str(folder / "out"), "lamp in the hall on", "--max-new-tokens", "2"]) == 0
    write_rows(folder / "more.jsonl", rows(30, seed=1))
    assert run(["eval", str(folder / "out"), "--data", str(folder / "more.jsonl")]) == 0
    assert "loss " in capsys.readouterr().out
