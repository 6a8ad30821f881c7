"""The loop: step, evaluate, save, stop.  One for full fine-tuning, LoRA and QLoRA, language models and classifiers.

What differs between methods was decided when the model was assembled; here a model is parameters that ask for a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.config.run import RunConfig
from halfbyte.data.load import TrainData
from halfbyte.errors import HalfbyteError
from halfbyte.models.assemble import Assembled
from halfbyte.plan.decide import Decision
from halfbyte.train import console, signals, trackers
from halfbyte.train.metrics import Observer, Observers
from halfbyte.train.run_folder import RunFolder
from halfbyte.train.saver import Saver
from halfbyte.train.training import Training, items_of, resolved


@dataclass(frozen=True)
class TrainResult:
    """What a run reached.

    steps, total_steps   optimizer steps done, and planned
    tokens               trained tokens seen
    seconds              of this process, from the first step to the last
    first, last and best held-out loss   None where nothing was held out
    delivered_step       step of the weights in `adapter_folder` (for method full: of the model in `model_folder`)
    history              the records of metrics.jsonl
    """

    run_folder: Path
    adapter_folder: Path | None
    model_folder: Path | None
    steps: int
    total_steps: int
    tokens: int
    seconds: float
    peak_rss_bytes: int
    first_eval_loss: float | None
    last_eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    delivered_step: int
    stopped_early: bool
    history: list[dict[str, Any]] = field(repr=False, default_factory=list)


def run(
    config: RunConfig, assembled: Assembled, data: TrainData, *, resume: bool = False, observers: Sequence[Observer] | None = None,
    plan: Decision | None = None,
) -> TrainResult:  # fmt: skip
    """Train as `config` says, into the folder `config.out`; the model keeps the delivered weights.

    resume     go on from the newest checkpoint of that folder
    observers  who follows the run; by default the terminal.  metrics.jsonl and `train.trackers` are always served.
    plan       what stands behind the settings that were `auto`; told at the start and kept in plan.json

    Raises ConfigError, CheckpointError, StorageError, NumericError, DoesNotFitError, EnvironmentFault, and Interrupted when a
    signal asked to stop and the run was saved.
    """
    items = items_of(config, data)
    config = resolved(config, assembled, data, items)
    folder = RunFolder(Path(config.out))
    folder.check(resume=resume)
    services = trackers.open_trackers(config.train.trackers, folder.path)
    folder.open(resume=resume)
    audience = Observers([*(observers if observers is not None else [console.for_this_terminal()]), *services])
    with Saver(folder.path, keep=config.train.keep_checkpoints, verify=config.train.verify_checkpoints) as saver, signals.listen() as stop:
        training = Training(config, assembled, data, items, folder, saver, stop, audience, plan)
        try:
            training.begin(resume)
            training.between_steps()
            while training.goes_on():
                training.one_step()
                training.between_steps()
            return TrainResult(**training.finish())
        except signals.StopRequested as request:
            raise training.leave(request) from None
        except HalfbyteError as error:
            training.report_failure(error)
            raise
        finally:
            training.close()
