"""`kill -9` at random moments and before every single system call of a save, and the power loss that forgets what was not synced."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from halfbyte.train import checkpoint
from halfbyte.train.saver import Saver
from tests.train.checkpoint_samples import IDENTITY, in_child, leftovers, newest_valid, require_is, restart, state_at, wait
from tests.train.crash_states import Call, Recorder, build, crash_state


def save_from(run: Path, first: int, last: int, acknowledge: int) -> None:
    """Save every step as a run would, writing a byte for each save that returned."""
    with Saver(run, keep=2) as saver:
        for step in range(first, last + 1):
            assert saver.save(state_at(step, best_step=1 + step // 3)) is not None
            os.write(acknowledge, b".")


def kill_at_random(run: Path, rng: random.Random, begin: int, longest: float) -> tuple[int, int]:
    """Start a run after step `begin`, kill it after a random time; (steps acknowledged, step the next start goes on from)."""
    reader, writer = os.pipe()
    pid = in_child(lambda: save_from(run, begin + 1, begin + 10_000, writer))
    os.close(writer)
    acknowledged = begin
    if rng.random() < 0.8:  # otherwise the kill may fall into the start
        acknowledged += len(os.read(reader, 1))
    time.sleep(rng.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    while dots := os.read(reader, 4096):
        acknowledged += len(dots)
    os.close(reader)
    return acknowledged, restart(run)


def kills(run: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Kill one run `count` times, each time going on where it stands; raises AssertionError on any loss.

    Returns counts: kills, kills that left something for the next start to clean, and how far the run came.
    """
    rng = random.Random(seed)
    run.mkdir(exist_ok=True)
    reached, amid = 0, 0
    for number in range(count):
        acknowledged, found = kill_at_random(run, rng, reached, 0.12)
        assert found >= acknowledged >= reached, f"kill {number}, seed {seed}: {acknowledged} were saved, {found} was found"
        assert found <= acknowledged + 1
        assert not (run / "checkpoints").exists() or leftovers(run / "checkpoints") == []
        amid += found > acknowledged
        reached = found
    return {"kills": count, "found_one_more_than_acknowledged": amid, "steps_reached": reached}


def test_kill_at_random_moments(tmp_path: Path) -> None:
    seen = kills(tmp_path / "run", 25)
    assert seen["steps_reached"] > 15


@pytest.mark.slow
def test_kill_at_200_random_moments(tmp_path: Path) -> None:
    assert kills(tmp_path / "run", 200)["kills"] == 200


def scene(run: Path) -> None:
    """A run with two checkpoints, of which the first is the best."""
    run.mkdir()
    with Saver(run, keep=1) as saver:
        for step in (1, 2):
            saver.save(state_at(step, best_step=1))


def save_rotate_replace(run: Path, acknowledge: int) -> None:
    """Everything a save can do: a new step, the removal of an old one, the same step once more with a new best."""
    with Saver(run, keep=1) as saver:
        saver.save(state_at(3, best_step=1))
        os.write(acknowledge, b".")
        saver.save(state_at(3, best_step=3))
        os.write(acknowledge, b".")


def test_kill_before_every_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of them: the newest valid checkpoint is the old or the new one, the best exists, and the next start leaves nothing behind."""
    scene(tmp_path / "scene")
    points = 0
    for count in range(1, 200):
        run = tmp_path / str(count)
        shutil.copytree(tmp_path / "scene", run)
        monkeypatch.setenv("HALFBYTE_FAULTS", f"checkpoint.*:kill:{count}")
        reader, writer = os.pipe()
        status = wait(in_child(lambda run=run, writer=writer: save_rotate_replace(run, writer)))  # type: ignore[misc]
        monkeypatch.delenv("HALFBYTE_FAULTS")
        os.close(writer)
        acknowledged = len(os.read(reader, 16))
        os.close(reader)
        found = restart(run)
        assert found == 3 if acknowledged else found in (2, 3), f"killed before call {count}"
        state = checkpoint.load_newest(run / "checkpoints").state
        best = state.progress.best_step
        assert best == 3 if acknowledged == 2 else best in (1, 3)
        require_is(checkpoint.load(run / "checkpoints" / checkpoint.step_name(best)), best)
        shutil.rmtree(run)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        points += 1
    assert points > 60, points


def test_kill_before_every_system_call_of_the_cleaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash inside the cleaning after a crash is cleaned by the start after it."""
    scene(tmp_path / "scene")
    folder = tmp_path / "scene" / "checkpoints"
    shutil.copytree(folder / "step-000002", folder / ".tmp-step-000003-1-aa")
    shutil.copytree(folder / "step-000001", folder / ".del-step-000000-bb")
    (folder / "step-000002").rename(folder / ".old-step-000002-cc")
    shutil.copytree(folder / "step-000001", folder / ".old-step-000001-dd")
    for count in range(1, 60):
        run = tmp_path / str(count)
        shutil.copytree(tmp_path / "scene", run)
        monkeypatch.setenv("HALFBYTE_FAULTS", f"checkpoint.*:kill:{count}")
        status = wait(in_child(lambda run=run: Saver(run).__enter__()))  # type: ignore[misc]
        monkeypatch.delenv("HALFBYTE_FAULTS")
        assert newest_valid(run) == 2
        assert restart(run) == 2
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["LATEST", "step-000001", "step-000002"]
        if status == 0:
            break
    assert count > 15


def test_every_call_that_changes_files_passes_a_fault_point(tmp_path: Path) -> None:
    """An audit hook counts what Python asks the system for; the fault points must have seen all of it."""
    import sys

    from halfbyte.train import faults

    def work() -> None:
        seen: list[str] = []
        asked: list[str] = []
        point = faults.point
        faults.point = lambda name: (seen.append(name), point(name))[1]  # type: ignore[assignment, func-returns-value]
        names = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir"}

        def hook(event: str, args: tuple[object, ...]) -> None:
            if event in names and str(tmp_path) in str(args[0]):
                asked.append(f"checkpoint.{names[event]}")
            if event == "open" and str(tmp_path) in str(args[0]) and isinstance(args[2], int) and args[2] & os.O_CREAT:
                asked.append("checkpoint.open")

        scene(tmp_path / "run")
        seen.clear()
        sys.addaudithook(hook)
        with Saver(tmp_path / "run", keep=1) as saver:
            asked.clear()
            saver.save(state_at(3, best_step=1))
            saver.save(state_at(3, best_step=3))
        kinds = {f"checkpoint.{kind}" for kind in ("open", "mkdir", "rename", "unlink", "rmdir")}
        assert [name for name in seen if name in kinds] == asked and len(asked) > 30

    assert wait(in_child(work)) == 0


def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int) -> tuple[list[Call], list[tuple[int, int]]]:
    """The calls of `saves` saves with rotation, and (number of calls, step) at each save's return."""
    root = tmp_path / "recorded"
    root.mkdir()
    marks = []
    with Recorder(root).recording(monkeypatch) as recorder:
        saver = Saver(root, keep=1)
        for step in range(1, saves + 1):
            saver.save(state_at(step, width=2))
            marks.append((len(recorder.calls), step))
    return recorder.calls, marks


def power_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, seed: int = 0) -> int:
    """Build `count` crash states; in each the newest acknowledged step or a later one must be there whole.  Returns torn ones seen."""
    calls, marks = record(tmp_path, monkeypatch, 4)
    kinds = {call.inode: call.kind for call in calls if call.kind in ("create", "mkdir")}
    rng = random.Random(seed)
    torn = 0
    for number in range(count):
        cut = rng.randint(1, len(calls))
        folders, files = crash_state(calls[:cut], rng)
        target = tmp_path / "state"
        build(target, folders, files, kinds)
        acknowledged = max([step for at, step in marks if at <= cut], default=0)
        found = checkpoint.scan(target / "checkpoints")
        torn += bool(found.skipped)
        for entry in found.valid:
            assert checkpoint.load(entry.path).progress.step == entry.step
        newest = found.valid[0].step if found.valid else 0
        assert newest >= acknowledged, f"state {number} of seed {seed}, after call {cut}: {acknowledged} was saved, {newest} is there"
        assert restart_any(target) == newest
        shutil.rmtree(target)
    return torn


def restart_any(run: Path) -> int:
    """Lock, clean, and say which step is newest."""
    with Saver(run):
        return newest_valid(run)


def test_power_loss_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    power_losses(tmp_path, monkeypatch, 250)


@pytest.mark.slow
def test_power_loss_in_20000_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    power_losses(tmp_path, monkeypatch, 20_000)


def test_the_crash_states_can_lose_what_was_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above: without the syncs of the recording, acknowledged checkpoints are lost or torn."""
    calls, _ = record(tmp_path, monkeypatch, 3)
    kinds = {call.inode: call.kind for call in calls if call.kind in ("create", "mkdir")}
    unsynced = [call for call in calls if call.kind != "sync"]
    lost = 0
    for seed in range(20):
        folders, files = crash_state(unsynced, random.Random(seed))
        build(tmp_path / str(seed), folders, files, kinds)
        lost += newest_valid(tmp_path / str(seed)) < 3
    assert lost > 10


def test_the_identity_survives_all_of_it(tmp_path: Path) -> None:
    kills(tmp_path / "run", 3, seed=5)
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints").state.identity == IDENTITY
