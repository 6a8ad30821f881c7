"""`kill -9` at random moments of a real training run that saves every step."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from halfbyte.models.assemble import assemble
from halfbyte.train import checkpoint, loop
from halfbyte.train.saver import Saver
from halfbyte.train.state import TrainState
from tests.train.checkpoint_samples import in_child, leftovers, wait
from tests.train.small_run import Drawer, Stage

ENDLESS = {"train.save_every_steps": 1, "train.epochs": 20_000, "train.eval_every_steps": 7}


class Acknowledging(Saver):
    """A saver that writes a step's number to a pipe once its save has returned."""

    pipe: int

    def save(self, state: TrainState) -> Path | None:
        """See Saver."""
        path = super().save(state)
        os.write(self.pipe, state.progress.step.to_bytes(4, "big"))
        return path


def kills_of_a_run(root: Path, out: Path, count: int, seed: int = 0, longest: float = 0.2) -> dict[str, int]:
    """Kill one run `count` times at random moments, each next process going on with it; AssertionError at any loss.

    The model is built once and forked, so that a kill costs milliseconds; one torch thread, so that the fork is safe.
    """
    torch.set_num_threads(1)
    stage = Stage(root, "lora", ENDLESS).prepare()
    config = stage.config(out)
    assembled, data = assemble(config), stage.data(config)
    rng = random.Random(seed)
    reached, amid, before_first = 0, 0, 0

    def work(pipe: int) -> None:
        Acknowledging.pipe = pipe
        loop.Saver = Acknowledging  # type: ignore[misc, attr-defined]
        loop.run(config, assembled, data, resume=reached > 0, observers=[Drawer()])

    for number in range(count):
        reader, writer = os.pipe()
        if reached == 0 and out.exists():
            before_first += 1
            for path in sorted(out.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        pid = in_child(lambda writer=writer: work(writer))  # type: ignore[misc]
        os.close(writer)
        told = os.read(reader, 4) if rng.random() < 0.8 else b""  # the rest of the kills may fall into the start
        time.sleep(rng.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL, f"kill {number} of seed {seed}: the run ended by itself"
        while part := os.read(reader, 4096):
            told += part
        os.close(reader)
        acknowledged = int.from_bytes(told[-4:], "big") if told else reached
        amid += any(out.glob("checkpoints/.*"))
        valid = []
        if out.exists():
            with Saver(out) as saver:
                valid = checkpoint.scan(saver.folder).valid
                assert not saver.folder.exists() or (leftovers(saver.folder) == [] and not checkpoint.scan(saver.folder).skipped)
        found = valid[0].step if valid else 0
        assert found >= acknowledged >= reached, f"kill {number} of seed {seed}: {acknowledged} was saved, {found} was found"
        reached = found
    return {"kills": count, "kills_inside_a_save": amid, "kills_before_the_first_save": before_first, "steps_reached": reached, "lost": 0}


def test_kill_a_training_run_at_random_moments(tmp_path: Path) -> None:
    seen = kills_of_a_run(tmp_path / "stage", tmp_path / "run", 25)
    assert seen["steps_reached"] > 15


@pytest.mark.slow
def test_kill_a_training_run_200_times(tmp_path: Path) -> None:
    assert kills_of_a_run(tmp_path / "stage", tmp_path / "run", 200)["kills"] == 200
