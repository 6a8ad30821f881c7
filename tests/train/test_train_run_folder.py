"""What a run writes for people to read: nothing secret in it, and still the file it was to be."""

import json
from pathlib import Path

import pytest
import yaml

from halfbyte.config import load_config, to_yaml
from halfbyte.errors import ConfigError
from halfbyte.train.run_folder import RunFolder

TEXTS = [
    'curl "https://api.x.com?api_key=hunter22"', 'print("password: hunter22")', '"X-Api-Key: hunter22"', "it's 'password: hunter22'",
    'secret="hunter22\\', "one\npassword: hunter22\ntwo",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_blanked_secret_leaves_its_file_readable(text: str, tmp_path: Path) -> None:
    """Quotes and line ends around a secret are escaped in JSON and YAML; the blank takes none of that with it."""
    RunFolder(tmp_path).write_json(tmp_path / "samples.json", {"rows": [{"prompt": text}], text: 1, "place": tmp_path})
    written = (tmp_path / "samples.json").read_text()
    read = json.loads(written)
    assert "hunter22" not in written and read["place"] == str(tmp_path)
    assert read["rows"][0]["prompt"] == text.replace("hunter22\\" if text.endswith("\\") else "hunter22", "<hidden>")
    config = load_config(None, ["data=rows.jsonl"]).model_copy(update={"out": text})
    settings = to_yaml(config)
    assert "hunter22" not in settings and yaml.safe_load(settings)["out"] == read["rows"][0]["prompt"]


def test_a_name_makes_a_secret_of_its_value(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_json(tmp_path / "x.json", {"api_key": "hunter22", "steps": {"password": "hunter22"}, "tokens": 12345678})
    assert json.loads((tmp_path / "x.json").read_text()) == {"api_key": "<hidden>", "steps": {"password": "<hidden>"}, "tokens": 12345678}


@pytest.mark.parametrize("record", [{"loss": 1.0}, {"step": None}, {"step": "3"}])
def test_records_of_somebody_else_are_not_written_over(record: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"E-CONF-304(.*\n)+.*metrics\.jsonl"):
            RunFolder(tmp_path).open(resume=resume)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 3.0}\n')
    RunFolder(tmp_path).open(resume=False)
