"""The tour from rows to report, with a small model in the starter's place; the starter's own figures are in tests/end_to_end."""

import json
import re
from pathlib import Path

import pytest

from halfbyte.errors import Interrupted
from halfbyte.pages import terminal_picture
from halfbyte.quickstart import screen, task, tour
from tests.end_to_end import tiny_world


def outcome(folder: Path) -> tour.Outcome:
    samples = [{"prompt": "Lights on.", "reference": '{"do":1}', "before": "no\x1b[2J <idea>", "after": '{"do":1}'}]
    return tour.Outcome(folder, 0.0, 0.95, 0.01, 0.0, 61.0, 2**31, 640, 120, samples)


def test_a_taken_folder_gets_a_number(tmp_path: Path) -> None:
    assert tour.free_folder(tmp_path / "q") == tmp_path / "q"
    (tmp_path / "q").mkdir()
    (tmp_path / "q-2").mkdir()
    assert tour.free_folder(tmp_path / "q") == tmp_path / "q-3"


def test_the_rows_are_written_as_a_user_would_write_them(tmp_path: Path) -> None:
    train, held_out = task.make(train_rows=16, held_out_rows=8)
    paths = tour.write_rows(tmp_path / "run", train, held_out)
    rows = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert [message["role"] for message in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert len(rows) == 16 and len(paths[1].read_text().splitlines()) == 8
    config = tour.settings(tmp_path / "run", 7, paths)
    assert config.method == "qlora" and config.model.name == "starter" and config.train.seed == 7 and config.lora.rank == 16


def test_exact_match_is_to_the_letter() -> None:
    rows = task.make(train_rows=8, held_out_rows=8)[1][:2]
    assert tour.exact_match([rows[0].answer, rows[1].answer + "}"], rows) == 0.5


def test_the_screen_shows_both_answers_the_scores_and_three_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen.show(outcome(tmp_path / "run"), tmp_path / "picture.svg")
    shown = capsys.readouterr().out
    for text in (
        "before",
        "after",
        "95.0 %",
        "always the commonest answer",
        "repeating the request",
        "2.00 GiB",
        "1 min 01 s",
        "adapter",
        "report",
    ):
        assert text in shown
    assert len(re.findall("halfbyte (data check|train|chat) ", shown)) == 3
    assert "\x1b[2J" not in shown


def test_the_picture_asks_the_network_for_nothing_and_is_the_same_each_time(tmp_path: Path) -> None:
    drawn = [terminal_picture.svg(screen.screen(outcome(tmp_path)), title="t", width=100) for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0].startswith("<svg")
    assert not re.search(r"url\((?!#)|@import|<script|href=", drawn[0])
    assert "http" not in drawn[0].replace("http://www.w3.org/2000/svg", "")
    assert "&lt;idea&gt;" in drawn[0]


def test_the_report_of_the_tour_holds_scores_and_samples(tmp_path: Path) -> None:
    tour.write_results(outcome(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "95.0 %" in page and "&lt;idea&gt;" in page and "always the commonest answer" in page
    assert json.loads((tmp_path / "quickstart.json").read_text())["after"] == 0.95


def test_a_stopped_tour_goes_on_in_its_folder_and_ends_with_its_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = task.make(train_rows=16, held_out_rows=8)
    monkeypatch.setattr(task, "make", lambda seed: few)
    small = {"model": str(tiny_world.write_model(tmp_path / "model")), "train.max_steps": 4, "train.global_batch_size": 4}
    monkeypatch.setattr(tour, "SETTINGS", {**tour.SETTINGS, **small, "train.eval_every_steps": 2, "train.save_every_steps": 2})
    monkeypatch.setattr(tour, "LONGEST_ANSWER", 2)
    monkeypatch.setenv("HALFBYTE_FAULTS", "train.step_done:sigterm:3")
    with pytest.raises(Interrupted) as stopped:
        tour.run(tmp_path / "q")
    assert stopped.value.exit_code == 143 and f"halfbyte quickstart --out {tmp_path / 'q'}" in stopped.value.remedy
    assert "train --resume" not in stopped.value.remedy
    monkeypatch.delenv("HALFBYTE_FAULTS")
    assert tour.stopped_folder(tmp_path / "q", few[0][1:]) is None
    done = tour.run(tmp_path / "q")
    assert done.folder == tmp_path / "q" and "before and after" in capsys.readouterr().out
    summary = json.loads((tmp_path / "q" / "run.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 4
    assert tour.stopped_folder(tmp_path / "q", few[0]) is None and tour.free_folder(tmp_path / "q") == tmp_path / "q-2"
