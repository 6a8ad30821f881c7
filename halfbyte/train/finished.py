"""Is there anything left to do?  A run that reached its end is answered from what it wrote, before a model is loaded.

A run is finished when run.json says so, everything it delivers lies there, and no setting asks for more than it did.  A longer run
(train.max_steps, train.epochs), whatever else was changed, and a folder that cannot be read go the usual way, which knows what a resume
may change.  The rows are not looked at: a run without another step reads none.
"""

import json
from pathlib import Path
from typing import Any

from halfbyte.config import load_config
from halfbyte.config.run import RunConfig
from halfbyte.models.calibrated_base import BASE
from halfbyte.train import metrics
from halfbyte.train.identity import flatten
from halfbyte.train.loop import TrainResult
from halfbyte.train.run_folder import RunFolder

ENDS = ("finished", "stopped early")
WHILE_TRAINING = frozenset({
    "out", "data.workers", "model.allow_download", "train.eval_every_steps", "train.save_every_steps", "train.log_every_steps",
    "train.keep_checkpoints", "train.verify_checkpoints", "train.trackers", "train.on_nan", "train.threads",
})  # fmt: skip
"""Settings that mean nothing to a run without another step."""


def finished(config: RunConfig) -> TrainResult | None:
    """What the run in `config.out` reached, if it is finished and `config` (with whole paths) asks for nothing more; writes nothing."""
    folder = RunFolder(Path(config.out))
    try:
        needed = (folder.config, folder.summary, folder.path / "report.html", *_delivered(folder, config.method))
        if not all(path.stat().st_size for path in needed):
            return None
        summary, begun = json.loads(folder.summary.read_text(encoding="utf-8")), load_config(folder.config)
        if begun.quant.calibrate is True and not (folder.path / BASE).is_dir():  # what the run trained on lies beside its adapter
            return None
        if summary["status"] not in ENDS or _changed(config, begun, summary) or not _long_enough(begun, summary):
            return None
        return _reached(folder, begun, summary)
    except (OSError, ValueError, KeyError, TypeError):  # something is missing or damaged
        return None


def _delivered(folder: RunFolder, method: str) -> list[Path]:
    """The files without which the run has delivered nothing."""
    if method != "full":
        return [folder.adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    index = folder.model / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return [folder.model / name for name in ("config.json", *sorted(shards))]


def _reached(folder: RunFolder, begun: RunConfig, summary: dict[str, Any]) -> TrainResult:
    whole = begun.method == "full"
    return TrainResult(
        run_folder=folder.path, adapter_folder=None if whole else folder.adapter, model_folder=folder.model if whole else None,
        steps=summary["steps"], total_steps=summary["total_steps"], tokens=summary["tokens"], seconds=summary["seconds"],
        peak_rss_bytes=summary["peak_memory_bytes"], first_eval_loss=summary["first_eval_loss"], last_eval_loss=summary["last_eval_loss"],
        best_eval_loss=summary["best_eval_loss"], best_step=summary["best_step"], delivered_step=summary["delivered_step"],
        stopped_early=summary["status"] == "stopped early", history=metrics.read(folder.metrics),
    )  # fmt: skip


def _changed(config: RunConfig, begun: RunConfig, summary: dict[str, Any]) -> list[str]:
    """Settings that ask for something else than the run was; what was left `auto` or to the rows asks for what was chosen."""
    now, then = (flatten(each.model_dump(mode="json")) for each in (config, begun))
    open_keys = WHILE_TRAINING | {key for key in now if now[key] == "auto" or (key == "model.labels" and not now[key])}
    if config.train.max_steps is not None and config.train.max_steps <= summary["steps"]:
        open_keys = open_keys | {"train.max_steps", "train.epochs"}  # no more than it did
    return [key for key in now if now[key] != then[key] and key not in open_keys]


def _long_enough(begun: RunConfig, summary: dict[str, Any]) -> bool:
    """The summary is of a run of this length, and not of a shorter one that was to be made longer and was killed."""
    if begun.train.max_steps is not None:
        return bool(summary["total_steps"] >= begun.train.max_steps)
    steps = summary["steps"]
    return bool(steps) and summary["epochs"] * summary["total_steps"] / steps >= begun.train.epochs - 1e-9
