"""Resume to the bit: a run stopped anywhere and gone on with equals the one that was never stopped, and each saved item is needed."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte.data.batches import Batch, Batches
from halfbyte.errors import AdapterError, CheckpointError
from halfbyte.train import checkpoint
from halfbyte.train import loss as loss_module
from halfbyte.train.faults import FaultStop
from halfbyte.train.state import Progress, TrainState, capture_rng
from tests.train.small_run import (
    KINDS,
    Drawer,
    Outcome,
    Stage,
    clear_faults,
    differences,
    go,
    go_on,
    go_until,
    outcome,
    rewrite,
    scramble,
    watch_saves,
)

SIX = (
    "train.micro_batch:stop:6", "train.backward_done:stop:5", "train.step_done:stop:4", "train.after_eval:stop:1",
    "train.before_save:stop:2", "train.epoch_end:stop:1",
)
"""Inside a window, before and after an optimizer step, after an evaluation, before a save, at the end of an epoch."""

MORE = (
    *(f"train.micro_batch:stop:{count}" for count in (1, 2, 4, 9, 10, 15)), "train.micro_batch:sigterm:8", "train.micro_batch:sigint:13",
    *(f"train.backward_done:stop:{count}" for count in (1, 8)), *(f"train.step_done:stop:{count}" for count in (5, 8)),
    "train.before_eval:stop:1", "train.before_eval:stop:3", "train.after_eval:stop:2", "train.before_eval:sigterm:2",
    "train.after_save:stop:1", "checkpoint.rename:stop:3",
)
"""With SIX, the 24 stop points that are tried with each of the four kinds of run."""

REFERENCES: dict[str, Outcome] = {}


@pytest.fixture(scope="module")
def stage_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stage")


def reference(kind: str, root: Path, fault: str = "", changes: dict[str, Any] | None = None) -> Outcome:
    """The run that nothing stops, made once; `fault` is one it bears."""
    key = f"{root} {kind} {changes}"
    if key not in REFERENCES:
        stage, drawer, out = Stage(root, kind, changes or {}).prepare(), Drawer(), root / f"reference {len(REFERENCES)}"
        with pytest.MonkeyPatch.context() as patch:
            progress = watch_saves(patch)
            assert not go_until(stage, out, drawer, fault, patch)
        REFERENCES[key] = outcome(out, drawer, progress)
    return REFERENCES[key]


def stop_and_go_on(
    kind: str, root: Path, out: Path, fault: str, change: Callable[[TrainState], None] | None = None, changes: dict[str, Any] | None = None
) -> Outcome:
    """A run stopped by `fault` and gone on with; `change` is applied to its checkpoint in between."""
    stage, drawer = Stage(root, kind, changes or {}).prepare(), Drawer()
    with pytest.MonkeyPatch.context() as patch:
        progress = watch_saves(patch)
        assert go_until(stage, out, drawer, fault, patch), f"the run never came to {fault}"
        progress.clear()  # a signal saves before an evaluation that is due, and what counts is what comes after
        if change is not None:
            rewrite(out, change)
        go_on(stage, out, drawer)
    return outcome(out, drawer, progress)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", SIX)
def test_a_run_stopped_anywhere_goes_on_to_the_bit(stage_root: Path, tmp_path: Path, kind: str, fault: str) -> None:  # T70
    """T70: adapters, optimizer, generators, progress, log lines and delivered files equal those of the run that was not stopped."""
    assert differences(stop_and_go_on(kind, stage_root, tmp_path / "run", fault), reference(kind, stage_root)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", MORE)
def test_a_run_stopped_at_the_other_72_points_goes_on_to_the_bit(stage_root: Path, tmp_path: Path, kind: str, fault: str) -> None:  # T70
    """T70: the rest of the 96."""
    assert differences(stop_and_go_on(kind, stage_root, tmp_path / "run", fault), reference(kind, stage_root)) == []


def test_a_run_stopped_again_and_again_goes_on_to_the_bit(stage_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # T70
    """T70: a second resume does not start over."""
    stage, drawer, out = Stage(stage_root).prepare(), Drawer(), tmp_path / "run"
    progress = watch_saves(monkeypatch)
    assert go_until(stage, out, drawer, "train.after_save:stop:1", monkeypatch)
    for _ in range(3):
        monkeypatch.setenv("HALFBYTE_FAULTS", "train.after_save:stop:1")
        with pytest.raises(FaultStop):
            go(stage, out, drawer, resume=True)
        clear_faults(monkeypatch)
    assert go_on(stage, out, drawer) >= 6
    assert differences(outcome(out, drawer, progress), reference("lora", stage_root)) == []


def test_a_finished_run_gone_on_with_stays_as_it_is(stage_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, drawer, out = Stage(stage_root).prepare(), Drawer(), tmp_path / "run"
    progress = watch_saves(monkeypatch)
    go(stage, out, drawer)
    go(stage, out, drawer, resume=True)
    assert differences(outcome(out, drawer, progress), reference("lora", stage_root)) == []


def test_a_killed_process_and_a_new_one_equal_the_uninterrupted_run(stage_root: Path, tmp_path: Path) -> None:
    """In real processes: SIGKILL inside a window of step 6, then another process."""
    stage = Stage(stage_root).prepare()
    expected = reference("lora", stage_root)
    script = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from tests.train.small_run import *\n"
        "stage, out = Stage(Path(sys.argv[1])), Path(sys.argv[2])\n"
        "go(stage, out, Drawer(), resume=out.exists())\n"
    )
    for number, fault in enumerate(("train.micro_batch:kill:11", "")):
        env = dict(os.environ, HALFBYTE_FAULTS=fault, PYTHONHASHSEED=str(number))
        done = subprocess.run([sys.executable, "-c", script, str(stage.root), str(tmp_path / "run")],
                              env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == (-9 if fault else 0), done.stderr[-2000:]
    found = outcome(tmp_path / "run", Drawer(), {})
    found.draws = expected.draws  # the observer of the killed process is gone; the generators' states are compared
    assert differences(found, expected) == []


# --- negative controls ------------------------------------------------------------------------------------------------------------

MISHAPS = {"train.save_every_steps": 1, "train.eval_every_steps": 1, "train.on_nan": "skip", "optim.learning_rate": 0.1}
"""A run with an out-of-memory in step 1, NaN in steps 4 and 5 among others, and evaluations that also get worse."""


def zero(tensors: dict[str, torch.Tensor], last: str) -> None:
    """Forget the optimizer tensors of one kind."""
    chosen = [name for name in tensors if name.rpartition(".")[2] == last]
    assert chosen, sorted(tensors)[:4]
    for name in chosen:
        tensors[name] = torch.zeros_like(tensors[name])


def forget(name: str) -> Callable[[TrainState], None]:
    """Give one field of the progress its value at the start of a run."""

    def change(state: TrainState) -> None:
        blank = getattr(Progress(), name)
        assert getattr(state.progress, name) != blank, f"{name} has nothing to lose here"
        setattr(state.progress, name, blank)

    return change


def forget_cursor(name: str) -> Callable[[TrainState], None]:
    def change(state: TrainState) -> None:
        assert state.progress.cursor[name] != 0
        state.progress.cursor[name] = 0

    return change


def forget_generator(*names: str) -> Callable[[TrainState], None]:
    def change(state: TrainState) -> None:
        scramble()
        for name in names:
            state.rng[name] = capture_rng()[name]

    return change


def forget_trainables(state: TrainState) -> None:
    for name, tensor in state.trainables.items():
        if name.endswith("lora_b"):
            state.trainables[name] = torch.zeros_like(tensor)


EARLY, AMID, LATE = "train.step_done:stop:5", "train.micro_batch:sigterm:18", "train.micro_batch:sigterm:36"
"""Stops after which the newest checkpoint is of step 3, with log lines after it; of step 4, amid bad steps; of step 9, past the best."""

ITEMS: dict[str, tuple[str, Callable[[TrainState], None]]] = {
    "trainables": (EARLY, forget_trainables),
    "first moment": (EARLY, lambda state: zero(state.optimizer, "m")),
    "second moment": (EARLY, lambda state: zero(state.optimizer, "v")),
    "optimizer step count": (EARLY, lambda state: zero(state.optimizer, "step")),
    "python generator": (EARLY, forget_generator("python", "python_gauss")),
    "numpy generator": (EARLY, forget_generator("numpy", "numpy_gauss")),
    "torch generator": (EARLY, forget_generator("torch")),
    "cursor epoch": (LATE, forget_cursor("epoch")),
    "cursor step": (EARLY, forget_cursor("step")),
    "step": (EARLY, forget("step")),
    "tokens seen": (EARLY, forget("tokens_seen")),
    "best metric": (LATE, forget("best_metric")),
    "best step": (LATE, forget("best_step")),
    "early-stop counter": (LATE, forget("evals_without_gain")),
    "evaluated step": (EARLY, forget("evaluated_step")),
    "skipped steps": (AMID, forget("skipped_steps")),
    "micro-batch size": (EARLY, forget("micro_batch_size")),
    "log offset": (EARLY, lambda state: setattr(state.progress, "metrics_offset", 1 << 40)),
}
"""Item -> (where the run is stopped, how the item is dropped from its checkpoint)."""


@pytest.fixture
def mishaps(monkeypatch: pytest.MonkeyPatch, stage_root: Path) -> str:
    """Make the losses of steps 4 and 5 NaN, whichever run computes them; returns the fault that makes step 1 run out of memory."""
    stage = Stage(stage_root).prepare()
    config = stage.config(Path("unused"))
    items = stage.data(config).train
    batches = Batches(items, micro_batch_size=2, global_batch_size=4, seed=config.train.seed, pad_id=0)
    rows = [[{items[number].row for part in window for number in part} for window in batches.windows(epoch)] for epoch in (0, 1)]
    poison = {min(rows[0][3] - rows[1][0]), min(rows[0][4] - rows[1][0])}
    real = loss_module.token_loss_sum

    def poisoned(model: nn.Module, head: Any, batch: Batch) -> tuple[torch.Tensor, int]:
        loss, count = real(model, head, batch)
        return (loss * float("nan") if set(batch.rows) & poison else loss), count

    monkeypatch.setattr(loss_module, "token_loss_sum", poisoned)
    return "train.micro_batch:memory:1"


def test_a_run_with_mishaps_goes_on_to_the_bit(stage_root: Path, tmp_path: Path, mishaps: str) -> None:  # T70
    """T70: with NaN steps and an out-of-memory behind it; the controls below differ from this by one forgotten item each."""
    expected = reference("lora", stage_root, mishaps, MISHAPS)
    assert expected.progress[10]["skipped_steps"] >= 2 and expected.progress[1]["micro_batch_size"] == 1
    for name, fault in (("early", EARLY), ("late", LATE), ("amid", AMID)):
        found = stop_and_go_on("lora", stage_root, tmp_path / name, f"{mishaps},{fault}", lambda state: None, MISHAPS)
        assert differences(found, expected) == [], name


def test_the_best_can_be_delivered_though_steps_were_left_out(stage_root: Path, mishaps: str) -> None:  # T72
    """T72: a best is only measured where it is also saved; an evaluation due after a step that was left out is not made."""
    expected = reference("lora", stage_root, mishaps, {**MISHAPS, "train.eval_every_steps": 3})
    assert [line["step"] for line in expected.log if "eval_loss" in line] == [0, 3, 6, 10]
    assert not [line for line in expected.log if "cannot be read" in line.get("event", "")]


@pytest.mark.parametrize("item", ITEMS)
def test_each_saved_item_is_needed(stage_root: Path, tmp_path: Path, mishaps: str, item: str) -> None:  # T70
    """T70, negative controls: a checkpoint without this one item does not lead to the same run."""
    fault, drop = ITEMS[item]
    expected = reference("lora", stage_root, mishaps, MISHAPS)
    try:
        found = stop_and_go_on("lora", stage_root, tmp_path / "run", f"{mishaps},{fault}", drop, MISHAPS)
    except AdapterError:
        assert item == "trainables"  # the best adapter is delivered, and one without its factors is refused
    else:
        assert differences(found, expected) != []


def test_the_count_of_bad_steps_in_a_row_is_needed(stage_root: Path, tmp_path: Path, mishaps: str) -> None:  # T70
    """T70, negative control: it shows only while the row lasts, so the run is stopped a second time inside it."""
    seen = []
    for name, drop in (("whole", lambda state: None), ("dropped", forget("bad_in_a_row"))):
        stage, out = Stage(stage_root, "lora", MISHAPS).prepare(), tmp_path / name
        with pytest.MonkeyPatch.context() as patch:
            assert go_until(stage, out, Drawer(), f"{mishaps},{AMID}", patch)
            rewrite(out, drop)
            assert go_until(stage, out, Drawer(), "train.micro_batch:sigterm:3", patch, resume=True)
        progress = checkpoint.load_newest(out / "checkpoints").state.progress
        seen.append((progress.step, progress.bad_in_a_row))
    assert seen == [(5, 2), (5, 1)]


def test_each_item_list_is_complete() -> None:
    """Every field of the progress is dropped by a control, but those that a lone fault cannot show."""
    named = {"step", "tokens_seen", "cursor", "best_metric", "best_step", "evals_without_gain", "evaluated_step",
             "skipped_steps", "bad_in_a_row", "micro_batch_size", "metrics_offset"}
    assert {entry.name for entry in dataclasses.fields(Progress)} - named == {"rollbacks", "bad_steps"}
    assert len(ITEMS) >= 18


# --- another run's checkpoint -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [
    ("lora.rank", 8), ("lora.targets", ["q_proj"]), ("lora.alpha", 8.0), ("model.dtype", "bfloat16"), ("optim.learning_rate", 0.02),
    ("train.seed", 6), ("train.global_batch_size", 8), ("data.max_tokens", 31),
])
def test_changed_settings_are_refused_by_name(
    stage_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: object
) -> None:
    out = tmp_path / "run"
    assert go_until(Stage(stage_root).prepare(), out, Drawer(), "train.after_save:stop:1", monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        go(Stage(stage_root, changes={field: value}), out, Drawer(), resume=True)
    assert caught.value.code == "E-CKPT-002" and caught.value.exit_code == 4
    assert re.search(rf"^{re.escape(field)}: .* -> {re.escape(json.dumps(value))}$", caught.value.found, re.MULTILINE)


def test_changed_rows_are_refused(stage_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, other = tmp_path / "run", tmp_path / "stage"
    assert go_until(Stage(stage_root).prepare(), out, Drawer(), "train.after_save:stop:1", monkeypatch)
    shutil.copytree(stage_root / "model", other / "model")
    lines = (stage_root / "rows.jsonl").read_text().splitlines(keepends=True)
    (other / "rows.jsonl").write_text("".join([*lines[:-1], lines[0]]))
    with pytest.raises(CheckpointError, match=r"(?m)^ *data: \w{16}\.\. -> \w{16}\.\.$"):
        go(Stage(other), out, Drawer(), resume=True)


def test_a_changed_base_is_refused(stage_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, other = tmp_path / "run", tmp_path / "stage"
    assert go_until(Stage(stage_root).prepare(), out, Drawer(), "train.after_save:stop:1", monkeypatch)
    shutil.copytree(stage_root, other, ignore=shutil.ignore_patterns("reference*"))
    path = other / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"(?m)^ *base: \w+\.* -> \w+\.*$"):
        go(Stage(other), out, Drawer(), resume=True)


def test_length_and_evaluation_may_change(stage_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, drawer = tmp_path / "run", Drawer()
    assert go_until(Stage(stage_root).prepare(), out, drawer, "train.after_save:stop:2", monkeypatch)
    go(Stage(stage_root, changes={"train.epochs": 3, "train.eval_every_steps": 4, "train.keep_checkpoints": 1}), out, drawer, resume=True)
    assert max(drawer.draws) == 15
