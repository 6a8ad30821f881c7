"""A run small enough to save hundreds of times: one linear layer, and an optimizer whose tensors follow from the step number."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from halfbyte.train import checkpoint
from halfbyte.train.saver import Saver
from halfbyte.train.state import Progress, TrainState, capture

IDENTITY: dict[str, object] = {
    "base": "b" * 64, "tokenizer": "t" * 64, "template": "p" * 64, "data": "d" * 64,
    "config": {"lora.rank": 4, "lora.targets": "all-linear", "model.dtype": "float32", "train.epochs": 1.0},
}


class ToyOptimizer:
    """Holds the tensors an optimizer would."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def state_tensors(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors


def state_at(step: int, best_step: int | None = None, width: int = 8) -> TrainState:
    """The state of the toy run after `step` steps: a pure function of its arguments, but for the random generators."""
    generator = torch.Generator().manual_seed(step)
    layer, optimizer = nn.Linear(width, width), ToyOptimizer()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(width, width, generator=generator))
        layer.bias.fill_(step)
    optimizer.tensors = {
        "weight.m": torch.randn(width, width, generator=generator), "weight.v": torch.rand(width, width, generator=generator),
        "weight.step": torch.tensor(step),
    }
    progress = Progress(step=step, tokens_seen=100 * step, cursor={"epoch": step // 4, "step": step % 4}, best_step=best_step,
                        best_metric=None if best_step is None else 1.0 / best_step, metrics_offset=17 * step)
    return capture(layer, optimizer, progress, IDENTITY)


def require_is(found: TrainState, step: int) -> None:
    """Every bit of `found` is that of the toy run after `step` steps (generators aside)."""
    wanted = state_at(step, found.progress.best_step)
    assert found.progress == wanted.progress
    assert found.identity == wanted.identity
    for mine, theirs in ((found.trainables, wanted.trainables), (found.optimizer, wanted.optimizer)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


def leftovers(folder: Path) -> list[str]:
    """Names in a checkpoints folder that are neither a checkpoint nor the pointer."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def newest_valid(run_folder: Path) -> int:
    """Step of the newest valid checkpoint, 0 when there is none."""
    valid = checkpoint.scan(run_folder / "checkpoints").valid
    return valid[0].step if valid else 0


def restart(run_folder: Path) -> int:
    """What the next process does: lock, clean, load.  Returns the step it goes on from (0: from the start)."""
    with Saver(run_folder) as saver:
        if saver.folder.is_dir():
            assert leftovers(saver.folder) == [] and checkpoint.scan(saver.folder).skipped == []
        if newest_valid(run_folder) == 0:
            return 0
        loaded = saver.load_newest(IDENTITY)
        require_is(loaded.state, loaded.state.progress.step)
        return loaded.state.progress.step


def in_child(work: Callable[[], None]) -> int:
    """Start `work` in a forked process (one torch thread, so that the fork is safe) and return its pid."""
    torch.set_num_threads(1)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Exit status of a child: 0 and above as it said, -9 when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
