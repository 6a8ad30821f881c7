"""Services that follow a run: TensorBoard, Weights & Biases, MLflow, Trackio; each is imported only when it is asked for.

metrics.jsonl stays the source of truth; a tracker gets the same numbers.  Nothing is sent anywhere unless `train.trackers` names it.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from halfbyte.errors import EnvironmentFault
from halfbyte.train.metrics import Header

NOT_CURVES = ("step", "rows")


def numbers_of(record: dict[str, Any], prefix: str) -> dict[str, float]:
    """The numeric values of a record, with names like "train/loss"."""
    return {f"{prefix}/{key}": float(value) for key, value in record.items() if key not in NOT_CURVES and isinstance(value, int | float)}


class Tracker:
    """A service as an observer, made of three functions: begin(header), log(numbers, step), end()."""

    def __init__(
        self, begin: Callable[[Header], None], log: Callable[[dict[str, float], int], None], end: Callable[[], None]
    ) -> None:
        self._begin, self._log, self._end, self._begun = begin, log, end, False

    def started(self, header: Header) -> None:
        """Open the service."""
        self._begin(header)
        self._begun = True

    def stepped(self, record: dict[str, Any]) -> None:
        """Send the step."""
        self._log(numbers_of(record, "train"), record["step"])

    def evaluated(self, record: dict[str, Any]) -> None:
        """Send the evaluation."""
        self._log(numbers_of(record, "eval"), record["step"])

    def noted(self, text: str) -> None:
        """Trackers get numbers only."""

    def finished(self, summary: dict[str, Any]) -> None:
        """Close the service."""
        if self._begun:
            self._end()


def require(name: str) -> ModuleType:
    """The tracker's package.  Raises EnvironmentFault naming what to install."""
    if importlib.util.find_spec(name) is None:
        raise EnvironmentFault(
            "a tracker needs its package", code="E-ENV-301", place="train.trackers", found=f"{name}, whose package is not installed",
            expected=f"the package {name}", remedy=f"pip install 'halfbyte[trackers]', or remove {name} from train.trackers",
            nothing_done="Nothing was trained.",
        )
    return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)


def tensorboard(module: ModuleType, folder: Path) -> Tracker:
    """Event files in <run>/tensorboard."""
    writer = module.SummaryWriter(str(folder / "tensorboard"))

    def log(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    def begin(header: Header) -> None:
        writer.add_text("settings", "\n\n".join(f"{label}: {text}" for label, text in header.lines))

    return Tracker(begin, log, writer.close)


def wandb(module: ModuleType, folder: Path) -> Tracker:
    """A Weights & Biases run named after the folder."""
    return Tracker(
        lambda header: module.init(project="halfbyte", name=folder.name, dir=str(folder), config=header.settings),
        lambda numbers, step: module.log(numbers, step=step), module.finish,
    )


def mlflow(module: ModuleType, folder: Path) -> Tracker:
    """An MLflow run named after the folder; the tracking server is MLflow's own setting."""

    def begin(header: Header) -> None:
        module.start_run(run_name=folder.name)
        module.log_params({key: str(value)[:500] for key, value in header.settings.items()})

    return Tracker(begin, lambda numbers, step: module.log_metrics(numbers, step=step), module.end_run)


def trackio(module: ModuleType, folder: Path) -> Tracker:
    """A Trackio run named after the folder."""
    return Tracker(
        lambda header: module.init(project="halfbyte", name=folder.name, config=header.settings),
        lambda numbers, step: module.log(numbers, step=step), module.finish,
    )


TRACKERS: dict[str, Callable[[ModuleType, Path], Tracker]] = {
    "tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio,
}


def open_trackers(names: tuple[str, ...], folder: Path) -> list[Tracker]:
    """One observer per name.  Raises EnvironmentFault for the first whose package is missing."""
    modules = [(name, require(name)) for name in names]
    return [TRACKERS[name](module, folder) for name, module in modules]
