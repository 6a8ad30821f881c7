"""TrainState: all that an exact resume needs, between two optimizer steps.

    Progress     counters and small numbers, kept by the loop while it runs and written as JSON
    trainables   {parameter name: tensor} of every parameter that requires a gradient
    optimizer    {name: tensor} as the optimizer gives it: both moments and the step counts
    rng          {generator: tensor} of python, numpy, torch CPU and every CUDA device

A state is taken at an optimizer-step boundary only: gradients that are half accumulated are never saved; a run that stops inside
an accumulation window does that window again from its first micro-batch, with the random numbers it had.

What is not here: the frozen base (named by its digest in the identity), and the learning rate (a pure function of the step).
"""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn

from halfbyte.errors import CheckpointError

RETIRED = frozenset({"loss_ema"})
"""Fields of older checkpoints that nothing reads any more."""


@dataclass
class Progress:
    """Where a run is.  The loop changes these fields as it goes; they are saved and restored as they stand.

    step                  optimizer steps done
    tokens_seen           trained tokens of all steps done
    cursor                the data cursor, as `Batches.state_dict()` gives it: the next window to train on
    best_metric           best evaluation so far (None before the first), best_step the step it was measured at
    evals_without_gain    evaluations since the best one (early stopping)
    evaluated_step        step of the last evaluation (-1 before the first): a run that stopped inside one does it again
    skipped_steps, bad_in_a_row, rollbacks   NaN counters: windows skipped in all, in a row, and returns to a checkpoint
    bad_steps             numbers of the steps whose windows are left out after a return to a checkpoint
    micro_batch_size      the size in use, smaller than configured after an out-of-memory (0: as configured)
    metrics_offset        bytes of metrics.jsonl written by the steps done; a resume cuts the file to this length
    """

    step: int = 0
    tokens_seen: int = 0
    cursor: dict[str, int] = field(default_factory=dict)
    best_metric: float | None = None
    best_step: int | None = None
    evals_without_gain: int = 0
    evaluated_step: int = -1
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    rollbacks: int = 0
    bad_steps: list[int] = field(default_factory=list)
    micro_batch_size: int = 0
    metrics_offset: int = 0

    def to_json(self) -> dict[str, object]:
        """A dict of JSON values; floats keep all their bits."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, object]) -> "Progress":
        """The inverse of `to_json`.  Raises CheckpointError when a field is missing or unknown."""
        names, values = {entry.name for entry in fields(Progress)}, {name: value for name, value in values.items() if name not in RETIRED}
        if names != set(values):
            raise CheckpointError(
                "the progress of a checkpoint must hold exactly its known fields", code="E-CKPT-011",
                found=f"missing: {sorted(names - set(values))}, unknown: {sorted(set(values) - names)}",
                remedy="resume with the version of Halfbyte that wrote it",
            )
        return Progress(**values)  # type: ignore[arg-type]


@dataclass
class TrainState:
    """A run between two optimizer steps; see the module's text.  `identity` is what `identity.identity_of` returned."""

    progress: Progress
    trainables: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    identity: dict[str, object] = field(default_factory=dict)


class TensorOptimizer(Protocol):
    """What a checkpoint asks of an optimizer; halfbyte.optim.adamw.AdamW is one."""

    def state_tensors(self) -> dict[str, Tensor]: ...

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None: ...


def trainables_of(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of the parameters that require a gradient, without copying."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def capture(model: nn.Module, optimizer: TensorOptimizer, progress: Progress, identity: Mapping[str, object]) -> TrainState:
    """The state of a run at this optimizer-step boundary; tensors are shared with the model, so save before the next step."""
    return TrainState(
        progress=Progress.from_json(progress.to_json()), trainables=trainables_of(model), optimizer=optimizer.state_tensors(),
        rng=capture_rng(), identity=dict(identity),
    )


def restore(state: TrainState, model: nn.Module, optimizer: TensorOptimizer) -> Progress:
    """Put `state` into the model, the optimizer and the global generators, in place; returns the progress to go on from.

    Raises CheckpointError when names, shapes or dtypes of the trainables do not agree with the model's.  Call it last before the
    loop goes on: anything that draws random numbers after it breaks the exact resume.
    """
    here = trainables_of(model)
    wrong = [f"{name}: only in the checkpoint" for name in sorted(set(state.trainables) - set(here))]
    wrong += [f"{name}: only in this model" for name in sorted(set(here) - set(state.trainables))]
    for name in sorted(set(here) & set(state.trainables)):
        mine, saved = here[name], state.trainables[name]
        if mine.shape != saved.shape or mine.dtype != saved.dtype:
            wrong.append(f"{name}: {tuple(saved.shape)} {saved.dtype} saved, {tuple(mine.shape)} {mine.dtype} here")
    if wrong:
        raise CheckpointError(
            "the trainable tensors of the checkpoint must be those of the model", code="E-CKPT-012",
            found="\n".join(wrong[:10]) + (f"\nand {len(wrong) - 10} more" if len(wrong) > 10 else ""),
            remedy="resume with the configuration of the run, or start a new run in another folder",
        )
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(state.trainables[name])
    optimizer.load_state_tensors(state.optimizer)
    restore_rng(state.rng)
    return Progress.from_json(state.progress.to_json())


def capture_rng() -> dict[str, Tensor]:
    """The global random generators as integer tensors: python (626), numpy (626), torch (5056 bytes), cuda.<i>, and two gauss caches."""
    version, words, gauss = random.getstate()
    twister: dict[str, Any] = dict(numpy.random.get_state(legacy=False))
    found = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*twister["state"]["key"].tolist(), twister["state"]["pos"], twister["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([twister["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {f"cuda.{index}": torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())}
    return found


def restore_rng(saved: Mapping[str, Tensor]) -> None:
    """Put the generators back as `capture_rng` found them.  CUDA states of devices this machine lacks are left out.

    Raises CheckpointError when a generator is missing.
    """
    missing = {"python", "python_gauss", "numpy", "numpy_gauss", "torch"} - set(saved)
    if missing:
        raise CheckpointError(
            "a checkpoint holds every random generator", code="E-CKPT-013", found=f"missing: {sorted(missing)}",
            remedy="resume with the version of Halfbyte that wrote it",
        )
    version, *words = saved["python"].tolist()
    gauss = saved["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position, has_gauss = saved["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, saved["numpy_gauss"].item()))
    torch.set_rng_state(saved["torch"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in saved:
                torch.cuda.set_rng_state(saved[f"cuda.{index}"], index)
