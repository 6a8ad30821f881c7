"""`halfbyte data check` of rows for a classifier: their shape may be said, and columns of other names are found by name."""

import json
from pathlib import Path

import pytest

from halfbyte.cli.main import run as command
from tests.end_to_end.tiny_world import write_model


def test_labelled_rows_are_looked_at_by_the_names_of_their_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = write_model(tmp_path / "model"), tmp_path / "rows.csv"
    rows.write_text("review,mood\n" + "".join(f"it was {word},{word}\n" for word in ("good", "bad") * 6))
    named = ["text_field=review", "label_field=mood", "eval_rows=2"]
    for settings in (named, [*named, "shape=classification"]):
        assert command(["data", "check", str(rows), *settings, "--model", str(model)]) == 0
        assert "2: bad, good" in capsys.readouterr().out
    assert command(["data", "check", str(rows), "--model", str(model)]) == 2
    assert "data.text_field=..., for labels data.label_field=..." in json.dumps(capsys.readouterr().err)
