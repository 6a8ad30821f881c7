"""What a run tells: the file of metrics, the console with and without a terminal, trackers that are there and that are not."""

import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from halfbyte.errors import EnvironmentFault, StorageError
from halfbyte.train import console, metrics, trackers
from halfbyte.train.metrics import Header, MetricsFile, Observers

HEADER = Header(lines=[("model", "tiny [bold]x"), ("steps", "4")], total_steps=4, first_step=0, settings={"lora.rank": 8})
STEP = {
    "step": 1, "epoch": 0.25, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "clipped_norm": 0.5, "trained_tokens": 10, "tokens": 40,
    "rows": [3, 1], "seconds": 0.5, "tokens_per_second": 80.0, "memory_bytes": 2**30,
}
EVALUATION = {"step": 2, "eval_loss": 2.25, "perplexity": math.exp(2.25), "eval_tokens": 30, "best": True, "seconds": 0.1}
SUMMARY = {
    "status": "finished", "steps": 4, "total_steps": 4, "seconds": 2.0, "best_eval_loss": 2.25, "best_step": 2, "peak_memory_bytes": 2**31,
}


def play(observer: Any) -> None:
    observer.started(HEADER)
    for step in range(1, 5):
        observer.stepped({**STEP, "step": step})
        if step == 2:
            observer.evaluated(EVALUATION)
    observer.noted("out of memory at step 3: micro-batch 8 -> 4")
    observer.finished(SUMMARY)


def test_lines_come_back_and_nan_stays_nan(tmp_path: Path) -> None:
    """T24: what is not a number is written, not left out or replaced."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for loss in (1.0, math.nan, math.inf, None):
        file.write({"step": 1, "loss": loss})
    file.close()
    first, second, third, fourth = metrics.read(tmp_path / "metrics.jsonl")
    assert first["loss"] == 1.0
    assert math.isnan(second["loss"])
    assert third["loss"] == math.inf
    assert fourth["loss"] is None


def test_a_cut_forgets_later_lines_and_goes_on_there(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1})
    kept = file.offset
    file.write({"step": 2})
    file.close()
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 3, "lo')
    assert [record["step"] for record in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2]
    again = MetricsFile(tmp_path / "metrics.jsonl")
    again.cut(kept)
    again.write({"step": 20})
    assert [record["step"] for record in again.records()] == [1, 20]
    again.close()
    assert (tmp_path / "metrics.jsonl").stat().st_size == again.offset


def test_metrics_in_a_folder_that_is_gone_are_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        MetricsFile(tmp_path / "gone" / "metrics.jsonl")


def test_plain_lines_say_everything(capsys: pytest.CaptureFixture[str]) -> None:
    play(console.PlainLines())
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "model  tiny [bold]x"
    assert lines[2].startswith("step 1/4  loss 2.5000  lr 1.00e-03  grad 0.5  80 tokens/s  1.00 GiB  left ")
    assert lines[4] == "step 2  held-out loss 2.2500  perplexity 9.488  (best so far)"
    assert lines[7] == "out of memory at step 3: micro-batch 8 -> 4"
    assert lines[8] == "finished at step 4 of 4 after 2.0 s, best held-out loss 2.2500 at step 2, peak memory 2.00 GiB"
    assert "\x1b" not in err


def test_plain_lines_of_a_long_run_are_about_a_hundred(capsys: pytest.CaptureFixture[str]) -> None:
    lines = console.PlainLines()
    lines.started(Header(lines=[("model", "x")], total_steps=5000, first_step=0))
    for step in range(1, 5001):
        lines.stepped({**STEP, "step": step})
    printed = capsys.readouterr().err.splitlines()[1:]
    assert 100 <= len(printed) <= 102
    assert printed[0].startswith("step 1/")
    assert printed[-1].startswith("step 5000/5000")


def test_a_step_that_trained_nothing_is_shown_without_a_loss() -> None:
    """T18: not as 0.0."""
    assert "loss -" in console.step_text({**STEP, "loss": None}, 4, "?")


def test_a_terminal_gets_the_live_view_and_a_pipe_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(console.for_this_terminal(), console.LiveView)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(console.for_this_terminal(), console.PlainLines)


def test_the_live_view_draws_values_and_scrolls_evaluations() -> None:
    view = console.LiveView(Console(record=True, force_terminal=True, width=120, file=io.StringIO(), highlight=False, markup=False))
    play(view)
    text = view.console.export_text()
    assert "tiny [bold]x" in text
    assert "held-out loss 2.2500" in text
    assert "micro-batch 8 -> 4" in text
    assert "finished at step 4 of 4" in text
    assert view.progress.tasks[0].completed == 4
    assert "80 tokens/s" in view.progress.tasks[0].fields["values"]


def test_time_left_counts_the_steps_of_this_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("halfbyte.train.console.time.monotonic", lambda: next(clock))
    pace = console.Pace(Header(lines=[], total_steps=60, first_step=50))
    assert pace.left(50) == "?"
    assert pace.left(55) == "10.0 s"
    assert pace.left(pace.total) == "0 steps, then evaluation and report"


class Recorder(types.ModuleType):
    """A stand-in for a tracker's package that notes every call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name, parent="")  # type: ignore[assignment]
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.mark.parametrize(("name", "log", "end"), [
    ("wandb", "log", "finish"), ("trackio", "log", "finish"), ("mlflow", "log_metrics", "end_run"),
])
def test_services_get_numbers_with_their_step(name: str, log: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T44: naming a tracker sends it the run, and only numbers."""
    package = Recorder(name)
    monkeypatch.setitem(sys.modules, name, package)
    (tracker,) = trackers.open_trackers((name,), tmp_path)
    play(tracker)
    logged = [(args[0], kwargs["step"]) for called, args, kwargs in package.calls if called == log]
    assert logged[0] == ({f"train/{key}": value for key, value in STEP.items() if key not in ("step", "rows")}, 1)
    assert logged[2][0]["eval/eval_loss"] == 2.25
    assert len(logged) == 5
    assert package.calls[-1][0] == end


def test_tensorboard_files_hold_the_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = trackers.open_trackers(("tensorboard",), tmp_path)
    play(tracker)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(step, 2.5) for step in range(1, 5)]
    assert events.Scalars("eval/eval_loss")[0].step == 2


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.train.trackers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault) as caught:
        trackers.open_trackers(("mlflow",), tmp_path)
    assert caught.value.code == "E-ENV-301"
    assert "halfbyte[trackers]" in caught.value.remedy
    assert caught.value.exit_code == 3


def test_several_observers_hear_the_same(tmp_path: Path) -> None:
    heard: list[list[Any]] = [[], []]

    class Ear:
        def __init__(self, notes: list[Any]) -> None:
            self.notes = notes

        def __getattr__(self, name: str) -> Any:
            return lambda value: self.notes.append((name, json.dumps(value, default=str)))

    play(Observers([Ear(heard[0]), Ear(heard[1])]))
    assert heard[0] == heard[1]
    assert [name for name, _ in heard[0]] == ["started", "stepped", "stepped", "evaluated", "stepped", "stepped", "noted", "finished"]
