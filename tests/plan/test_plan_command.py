"""Settings of a plan are those of a run, in a file, as key=value or as flags; and the commands it prints repeat them."""

import io
import json
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli.main import run
from halfbyte.config import load_config
from halfbyte.plan import question
from halfbyte.plan.answer import answer
from halfbyte.plan.command import calibrate_command, train_command
from halfbyte.plan.decide import RowsSeen, decide
from halfbyte.plan.hardware import PROCESSOR, Hardware
from halfbyte.plan.memory import packed_bytes
from halfbyte.plan.question import ask
from halfbyte.plan.setting import Setting
from halfbyte.shape import ModelShape
from tests.plan.asked import SMALL, plan

CARD = ("--gpu-memory", "24", "--json")


def _methods(*words: object) -> dict[str, Any]:
    code, text, err = plan(*words, *CARD)
    assert code == 0, err
    methods: dict[str, Any] = json.loads(text)["methods"]
    return methods


def test_a_flag_a_key_and_a_file_say_the_same(config: Path, tmp_path: Path) -> None:
    flags = ("--method", "lora", "--rank", 8, "--targets", "q_proj,v_proj", "--max-tokens", 512, "--micro-batch-size", 2,
             "--policy", "recompute", "--state", "int8")  # fmt: skip
    keys = ("method=lora", "lora.rank=8", "lora.targets=[q_proj,v_proj]", "data.max_tokens=512", "train.micro_batch_size=2",
            "train.activations=recompute", "optim.state=int8")  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {config}\nmethod: lora\nlora: {{rank: 64, targets: [q_proj, v_proj]}}\ndata: {{max_tokens: 512}}\n"
                    "train: {micro_batch_size: 2, activations: recompute}\noptim: {state: int8}\n", encoding="utf-8")  # fmt: skip
    as_flags = _methods(config, *flags)
    assert list(as_flags) == ["lora"] and as_flags["lora"]["policy"] == "recompute" and as_flags["lora"]["micro_batch_size"] == 2
    assert as_flags == _methods(config, *keys) == _methods(file, "lora.rank=8") == _methods(file, "--rank", 8)
    assert as_flags != _methods(file)


def test_settings_without_a_flag_count(config: Path, tmp_path: Path) -> None:
    plain, shape = _methods(config), ModelShape.from_config(SMALL)
    stored = {term["name"]: term["bytes"] for term in _methods(config, "quant.blocksize=256", "lora.dtype=bfloat16")["qlora"]["terms"]}
    assert stored["weights, packed"] == packed_bytes(shape, Setting(blocksize=256))
    assert 2 * stored["adapters"] == next(term["bytes"] for term in plain["qlora"]["terms"] if term["name"] == "adapters")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "a" * 90, "completion": "b" * 30}) for _ in range(40)), encoding="utf-8")
    said = json.loads(plan(config, f"data={rows}", "data.packing=true", "data.max_tokens=256", *CARD)[1])
    assert said["tokens"] == 256 and said["rows"]["steps_per_epoch"] == 1  # 40 samples of 51 tokens are 8 rows
    assert json.loads(plan(config, f"data={rows}", "data.max_rows=20", *CARD)[1])["rows"]["count"] == 20


def test_methods_that_the_settings_rule_out_are_not_planned(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("quant: {blocksize: 128}\n", encoding="utf-8")
    assert list(_methods(config, "quant.blocksize=128")) == ["qlora", "lora", "full"]  # can be left out of the others' commands
    assert list(_methods(config, file)) == ["qlora"]
    assert list(_methods(config, "lora.init=loftq")) == ["qlora", "full"]
    assert list(_methods(config, "method=auto")) == ["lora", "qlora"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--rank", "8", "lora.rank=16"], "E-CONF-026"), (["--method", "lora", "method=full"], "E-CONF-026"),
        (["model=starter"], "E-CONF-026"), (["lora.rnk=8"], "E-CONF-020"), (["--method", "full", "--rank", "8"], "E-CONF-170"),
        (["train.micro_batch_size=12"], "E-CONF-163"), (["model.device=cpu", "--gpu", "H100"], "E-CONF-425"),
        (["nothing.yaml"], "E-CONF-002"), (["another"], "E-CONF-002"), (["data.max_tokens=9000"], "E-CONF-403"),
    ],
)  # fmt: skip
def test_settings_that_contradict_are_refused_once(config: Path, words: list[str], code: str) -> None:
    status, out, err = plan(config, *words)
    assert status == 2 and not out and err.startswith(f"error {code}") and err.count("error ") == 1 and "Nothing was planned." in err


def _run_of(command: str, tmp_path: Path) -> Any:
    """The settings that the command line would train with, as the command line resolves them."""
    program, *words = shlex.split(command)
    assert program == "halfbyte"
    with redirect_stdout(io.StringIO()) as out:
        assert run([*words, "--dry-run"]) == 0
    (tmp_path / "resolved.yaml").write_text(out.getvalue(), encoding="utf-8")
    return load_config(tmp_path / "resolved.yaml")


@pytest.mark.parametrize(
    "given",
    [
        {}, {"rank": 8, "max_tokens": 512}, {"method": "lora", "targets": "q_proj,v_proj"}, {"method": "qlora", "micro_batch_size": 12},
        {"state": "int8", "policy": "recompute"}, {"settings": ["quant.blocksize=128", "lora.dora=true"]}, {"settings": ["lora.rank=256"]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("of_the_least", [1.13, 1.4, 2.0, 30.0])
def test_the_next_command_trains_what_was_planned(
    given: dict[str, Any], of_the_least: float, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Hardware(PROCESSOR, "cpu", 2**40)
    monkeypatch.setattr(question, "this_machine", lambda: place)
    least = min(one.memory.total for one in answer(ask(str(config), **given)).least.values())
    place = Hardware(PROCESSOR, "cpu", int(of_the_least * least))
    planned = answer(ask(str(config), **given))
    found = planned.found[planned.ranking[0][0]]
    settings = _run_of(train_command(planned), tmp_path)
    rows = RowsSeen((found.setting.tokens,), 0, 1.0, found.setting.tokens)
    decided = decide(settings, planned.question.shape, place, rows, found.setting.dtype).option
    assert decided.memory == found.memory and decided.verdict == found.verdict
    assert all(getattr(decided.setting, name) == getattr(found.setting, name) for name in ("method", "policy", "state", "micro_batch_size"))
    assert settings.model.name == str(config.parent) and settings.data.path == "FILE"


def test_commands_repeat_what_was_given(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(question, "this_machine", lambda: Hardware(PROCESSOR, "cpu", 2**35))
    rows, file = tmp_path / "my rows.jsonl", tmp_path / "run.yaml"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n", encoding="utf-8")
    file.write_text(f"model: {config}\nlora: {{rank: 64}}\n", encoding="utf-8")
    text = plan(config, "--data", rows, "--rank", 8, "--method", "lora", "train.seed=3")[1]
    asked = f"--data '{rows}' --method lora lora.rank=8 train.seed=3"
    assert text.endswith(f"next     halfbyte train --model {config.parent} {asked}\n")
    assert f"`halfbyte plan {config} {asked} --calibrate` measures them" in text
    text = plan(file, f"data={rows}", "lora.dropout=0.1")[1]
    given = shlex.quote(f"data={rows}")
    assert text.endswith(f"next     halfbyte train {file} --method lora {given} lora.dropout=0.1\n")
    assert calibrate_command(ask(file=file, settings=["lora.dropout=0.1"])) == f"halfbyte plan {file} lora.dropout=0.1 --calibrate"
