"""Bad settings print exactly the block that is kept in tests/golden/bad_config, and nothing is trained."""

import os
from pathlib import Path

import pytest

from halfbyte.config import LoraConfig, RunConfig, load_config, make
from halfbyte.errors import ConfigError
from tests.config.bad_config_cases import CASES, GOLDEN, block


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_block_is_the_kept_one(name: str, tmp_path: Path) -> None:  # T44, T45
    kept = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert block(CASES[name], tmp_path) == kept
    assert kept.startswith("error E-CONF-") and kept.endswith("  Nothing was trained.\n")


def test_every_kept_block_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)
    assert len(CASES) >= 100


def test_exit_code_is_that_of_bad_input() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None)
    assert caught.value.exit_code == 2


def test_a_file_without_read_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "run.yaml").write_text("data: rows.jsonl\n", encoding="utf-8")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"E-CONF-005(.|\n)*chmod u\+r"):
        load_config(tmp_path / "run.yaml")


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "run.yaml"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        load_config(pipe)


def test_all_problems_of_a_file_are_in_one_message(tmp_path: Path) -> None:
    text = (GOLDEN / "several_problems.txt").read_text(encoding="utf-8")
    for expected in ("line 2, methd", "line 4, lora.rank", "line 5, lora.dora", "line 7, optim.learning_rate", "E-CONF-164", "train.seed"):
        assert expected in text


def test_constructing_a_run_in_python_speaks_the_same_way() -> None:
    with pytest.raises(ConfigError, match="E-CONF-141"):
        RunConfig(method="lora", quant={"format": "nf4"}, data="rows.jsonl")
    with pytest.raises(ConfigError) as caught:
        make(LoraConfig, {"rank": 0, "rnk": 3}, "lora")
    assert "lora.rank" in str(caught.value) and "lora.rnk" in str(caught.value)
    with pytest.raises(ConfigError, match="E-CONF-130"):
        make(LoraConfig, {"dora": True, "lora_bias": True}, "lora")
    assert make(LoraConfig, {"rank": 3}).rank == 3
