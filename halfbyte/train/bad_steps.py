"""What happens after a step whose loss or gradient was not finite.  The weights were not touched by it.

    stop       end the run and name the step, the first bad module or tensor, and the rows       (default)
    skip       leave the step out; the third in a row ends the run
    rollback   leave it out; the third in a row returns to the last checkpoint, from where the recorded windows are left out;
               the fourth return ends the run

Each such step is in metrics.jsonl with its NaN, and its rows in bad_batches.jsonl.  Weights that are themselves not finite cannot be
trained around: that ends the run under `skip`, and returns to the checkpoint under `rollback`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from halfbyte.data.batches import Batch
from halfbyte.errors import NumericError
from halfbyte.train import numeric_check
from halfbyte.train.run_folder import RunFolder
from halfbyte.train.state import Progress, capture_rng, restore_rng
from halfbyte.train.step import StepResult

if TYPE_CHECKING:
    from halfbyte.train.training import Training

IN_A_ROW = 3
ROLLBACKS = 3


class BadSteps:
    """The policy and its record."""

    def __init__(self, folder: RunFolder, policy: str) -> None:
        self.folder, self.policy = folder, policy

    def handle(self, training: "Training", result: StepResult, window: Sequence[Batch], random_state: Mapping[str, Tensor]) -> None:
        """Record the step `training.progress.step` and act by the policy.  Raises NumericError where the run ends."""
        progress = training.progress
        after = capture_rng()
        restore_rng(random_state)
        where = training.micro.run(
            lambda parts: numeric_check.locate(training.model, parts, training.loss_sum), window,
            step=progress.step, on_change=training.note,
        )  # fmt: skip
        restore_rng(after)
        progress.skipped_steps += 1
        progress.bad_in_a_row += 1
        self._record(progress.step, result, where)
        error = not_finite(progress.step, result, where, progress.bad_in_a_row)
        if self.policy == "stop" or (self.policy == "skip" and (progress.bad_in_a_row >= IN_A_ROW or where.startswith("weight"))):
            raise error
        training.note(f"step {progress.step} is left out, not finite: {where}")
        if self.policy == "rollback" and (progress.bad_in_a_row >= IN_A_ROW or where.startswith("weight")):
            self._roll_back(training, error, bad_row(progress))

    def scan(self, training: "Training") -> None:
        """The full scan of weights and optimizer state.  Raises NumericError, or returns to a checkpoint under `rollback`."""
        try:
            numeric_check.scan(training.model, training.optimizer.state_tensors(), step=training.progress.step)
            return
        except NumericError as error:
            if self.policy != "rollback":
                raise
            found = error
        self._roll_back(training, found, [training.progress.step])

    def _roll_back(self, training: "Training", error: NumericError, bad: list[int]) -> None:
        if training.progress.rollbacks >= ROLLBACKS:
            raise error
        training.roll_back(bad)

    def _record(self, step: int, result: StepResult, where: str) -> None:
        line = {"step": step, "rows": result.rows, "loss": result.loss, "grad_norm": result.grad_norm, "where": where}
        with self.folder.bad_batches.open("a") as file:
            file.write(json.dumps(line) + "\n")


def bad_row(progress: Progress) -> list[int]:
    """The steps of the row of bad ones that ends at `progress.step`, steps left out before not counted; from saved numbers only, so that
    a resumed run knows them too.

    >>> bad_row(Progress(step=9, bad_in_a_row=3, bad_steps=[8]))
    [6, 7, 9]
    """
    candidates = [step for step in range(1, progress.step + 1) if step not in progress.bad_steps]
    return candidates[-progress.bad_in_a_row :]


def not_finite(step: int, result: StepResult, where: str, in_a_row: int) -> NumericError:
    """The error that names step, place and rows."""
    return NumericError(
        "the loss and the gradient of a step must be finite", code="E-NUM-304", place=f"step {step}, {where}",
        found=f"loss {result.loss}, gradient norm {result.grad_norm}" + (f", {in_a_row} such steps in a row" if in_a_row > 1 else ""),
        expected="finite numbers", remedy="lower optim.learning_rate, look at the rows "
        f"{', '.join(str(row) for row in result.rows[:16])}, or set train.on_nan: rollback",
        nothing_done="The weights were not changed by this step.",
    )
