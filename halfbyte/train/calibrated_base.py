"""quant.calibrate: make the calibrated base of a run from its training rows before the model is loaded, or find the one it made.

true    <out>/base and <out>/base/start, from data.train; the adapter begins there unless lora.init was written
auto    true where 4 bits are known to cost something (halfbyte/plan/four_bits.py); the reason is logged
false   the default: calibrating needs the model in 16 or 32 bits in memory once, which plain quantizing never does
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.calibrate.base import (
    LEAST_ROWS,
    LEAST_TOKENS,
    Calibration,
    choose_rows,
    require_room,
    require_writable,
    unfinished,
    write_base,
)
from halfbyte.config.run import RunConfig
from halfbyte.data.load import TrainData
from halfbyte.errors import ModelError, UnsupportedError
from halfbyte.log import logger
from halfbyte.models.calibrated_base import BASE, base_of_run
from halfbyte.models.source import Source, resolve
from halfbyte.plan.four_bits import worth_calibrating
from halfbyte.shape import ModelShape
from halfbyte.train.run_lock import RunLock


def with_calibrated_base(config: RunConfig, source: Source, data: TrainData, *, resume: bool = False) -> tuple[RunConfig, Path | None]:
    """The settings with quant.calibrate decided, and the calibrated base; None where there is none.

    Raises DataError for too few rows, ModelError when a resumed run's base is gone, and what `write_base` raises.
    """
    out = Path(config.out) / BASE
    config = _decided(config, source.folder, data, out if resume else None)
    if config.quant.calibrate is not True:
        return config, None
    config = with_own_start(config)
    if resume:
        return config, base_of_run(Path(config.out))
    rows = choose_rows([row.input_ids for row in data.train], config.quant.calibration_rows, config.train.seed, config.data.path)
    quant = config.quant.model_copy(update={"format": config.quant_format})
    lora = config.lora if config.lora.init == "calibrated" else None
    require_room(config.model, source.folder)
    logger().info("calibrating the base on %d training rows, once", len(rows))
    with _only_writer(out):
        quality = write_base(source, rows, out, Calibration(quant, lora, config.model, config.train.seed))
    for line in quality.text().splitlines():
        logger().info("base: %s", line)
    return config, out


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Alone in the run's folder, without what a calibration that was killed has left there.  Raises CheckpointError, StorageError."""
    require_writable(out)
    with RunLock(out.parent):
        for left in unfinished(out):
            shutil.rmtree(left, ignore_errors=True)
        yield


def settled(config: RunConfig) -> RunConfig:
    """The settings with quant.calibrate=auto decided by the model alone, and what follows from it; for settings that go through a file.

    A file writes every setting, so behind it nothing shows that an init was left open.
    """
    if config.quant.calibrate == "auto":
        source = resolve(config.model.name, revision=config.model.revision, allow_download=config.model.allow_download)
        wanted = config.method == "qlora" and _worth(source.folder)[0]
        config = config.model_copy(update={"quant": config.quant.model_copy(update={"calibrate": wanted})})
    return with_own_start(config)


def with_own_start(config: RunConfig) -> RunConfig:
    """lora.init=calibrated where quant.calibrate is true and no init was written."""
    if config.quant.calibrate is not True or config.lora.init != "default" or "init" in config.lora.model_fields_set:
        return config
    return config.model_copy(update={"lora": config.lora.model_copy(update={"init": "calibrated"})})


def _decided(config: RunConfig, folder: Path, data: TrainData, begun: Path | None) -> RunConfig:
    """`config` with quant.calibrate true or false; a resumed run has what its folder shows that it had."""
    if config.quant.calibrate != "auto":
        return config
    if begun is not None:
        wanted, why = begun.is_dir(), "as at the start of the run"
    else:
        wanted, why = decide(config, folder, data)
    logger().info("quant.calibrate=%s: %s", str(wanted).lower(), why)
    return config.model_copy(update={"quant": config.quant.model_copy(update={"calibrate": wanted})})


def decide(config: RunConfig, folder: Path, data: TrainData) -> tuple[bool, str]:
    """(whether to calibrate, why), for quant.calibrate=auto."""
    if config.method != "qlora":
        return False, f"method {config.method} keeps the weights as they are"
    if len(data.train) < LEAST_ROWS or sum(len(row.input_ids) for row in data.train) < LEAST_TOKENS:
        return False, f"fewer than {LEAST_ROWS} training rows or {LEAST_TOKENS} tokens"
    return _worth(folder)


def _worth(folder: Path) -> tuple[bool, str]:
    try:
        shape = ModelShape.read(folder)
    except (ModelError, UnsupportedError):
        return False, "the size of this model family is not known"
    return worth_calibrating(shape)
