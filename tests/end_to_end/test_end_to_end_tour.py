"""The tour through the real command: with a small model always, with the starter where it can be fetched."""

import json
from pathlib import Path

import pytest

from halfbyte.cli.main import run as command
from halfbyte.quickstart import tour


def test_the_tour_runs_from_rows_to_report(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"model": str(tiny_folder), "train.max_steps": 2, "train.eval_every_steps": 1, "train.save_every_steps": 1, "train.threads": 1}
    monkeypatch.setattr(tour, "SETTINGS", {**tour.SETTINGS, **small})
    assert command(["quickstart", "--out", str(tmp_path / "run"), "--picture", str(tmp_path / "p.svg")]) == 0
    shown = capsys.readouterr().out
    assert "Exact match on 120 held-out requests" in shown and "halfbyte train --model starter --data my-rows.jsonl" in shown
    for name in ("rows.jsonl", "held_out.jsonl", "adapter/adapter_model.safetensors", "report.html", "samples.json", "scores.json"):
        assert (tmp_path / "run" / name).is_file(), name
    assert len(json.loads((tmp_path / "run" / "samples.json").read_text())) == tour.SHOWN
    assert (tmp_path / "p.svg").read_text().startswith("<svg")


def test_the_starter_learns_within_a_few_steps(starter: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of the tour bring the held-out loss to less than half; all forty are `make quickstart`."""
    from halfbyte.quickstart import task
    from halfbyte.train import from_config

    train, held_out = task.make(train_rows=96, held_out_rows=16)
    files = tour.write_rows(tmp_path / "run", train, held_out)
    config = tour.settings(tmp_path / "run", 0, files)
    steps = {"max_steps": 4, "eval_every_steps": 4, "save_every_steps": None, "threads": 1}
    result = from_config.train_from_config(config.model_copy(update={"train": config.train.model_copy(update=steps)}))
    assert result.first_eval_loss is not None and result.last_eval_loss is not None
    assert result.last_eval_loss < result.first_eval_loss / 2
    assert result.peak_rss_bytes > 0 and (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size > 4 * 4_884_480


@pytest.mark.slow
def test_the_whole_tour_reaches_its_goal(starter: object, tmp_path: Path) -> None:
    assert command(["quickstart", "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "quickstart.json").read_text())
    assert found["before"] <= 0.05 and found["after"] >= 0.85
    assert max(found["commonest"], found["copying"]) <= 0.05
    assert found["peak_bytes"] < 2.5 * 2**30
    assert found["train_rows"] >= 500 and found["held_out_rows"] >= 100
