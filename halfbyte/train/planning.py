"""The plan of a run in the place where it starts: its base, its rows as they were tokenized, the memory that is free now.

Before the first long run on a processor its rates are measured once (plan/rates.py): a few seconds, in a process of its own, and only
while nothing else keeps the machine busy, for rates measured beside other work would be wrong for all runs to come.

What the plan does not know (a family outside shape.py, targets that match nothing) it leaves to loading, which tells more; only
`method: auto` cannot go on without it.  A resumed run keeps what its first start chose, from its own config.yaml, and is not refused.
"""

from pathlib import Path

import torch

from halfbyte import devices, host
from halfbyte.config import load_config
from halfbyte.config.rules import value_at
from halfbyte.config.run import RunConfig
from halfbyte.data.load import TrainData
from halfbyte.errors import EnvironmentFault, ModelError, UnsupportedError
from halfbyte.log import logger
from halfbyte.models.load import choose_dtype
from halfbyte.models.packed_folder import storage_of
from halfbyte.plan.decide import Choice, Decision, RowsSeen, applied, decide, operations, require_room, with_time
from halfbyte.plan.hardware import Hardware, accelerator, processor
from halfbyte.plan.rates import Rates, is_busy, measure, nearest_rates, read_all, threads_of, widths_of
from halfbyte.shape import ModelShape
from halfbyte.train.run_folder import RunFolder

LONG_RUN_SECONDS, OPERATIONS_OF_A_CORE = 120.0, 1e11
"""A run that takes longer than this at so many operations a second and core is worth a calibration of a few seconds."""

DECIDED = ("method", "data.max_tokens", "train.micro_batch_size", "train.activations")


def place_of(device: str) -> Hardware:
    """Where this run computes, with the memory that is free there; what this process holds already counts as free."""
    if devices.compute_device(device) == "cpu":
        return processor(host.rss_anon_bytes())
    free, total = torch.cuda.mem_get_info()  # makes the device's context, so what is free is without it
    return accelerator(torch.cuda.get_device_name(), int(free), int(total), host.rss_anon_bytes())


def rows_of(data: TrainData) -> RowsSeen:
    """The rows as a plan sees them."""
    report = data.report
    return RowsSeen(
        tuple(len(example.input_ids) for example in data.train), max((len(example.input_ids) for example in data.eval), default=0),
        report.trained_tokens / report.tokens if report.tokens else 1.0, report.max_tokens,
    )  # fmt: skip


def as_begun(config: RunConfig, folder: RunFolder) -> RunConfig:
    """A resumed run's settings with what its start chose for `auto`, where its config.yaml is there.  Raises ConfigError."""
    if not folder.config.is_file():
        return config
    begun = load_config(folder.config)
    open_keys = [key for key in DECIDED if value_at(config, key) == "auto"]
    return applied(config, [Choice(key, value_at(begun, key), "as at the start of the run") for key in open_keys])


def with_packed_base(config: RunConfig, folder: Path) -> RunConfig:
    """Method auto on a base that is already packed is qlora; anything else stays."""
    if config.method != "auto" or storage_of(folder) is None:
        return config
    logger().info("method=qlora: the base is already packed")
    return config.model_copy(update={"method": "qlora"})


def plan_of(config: RunConfig, folder: Path, data: TrainData, *, resume: bool = False) -> Decision | None:
    """The run's plan; None where the model is not known to a plan.  Raises DoesNotFitError unless resuming."""
    try:
        shape = ModelShape.read(folder)
        dtype = str(choose_dtype(config.model.dtype)[0]).removeprefix("torch.")
        decision = decide(config, shape, place_of(config.model.device), rows_of(data), dtype)
    except (ModelError, UnsupportedError) as fault:
        if config.method == "auto":
            raise
        logger().info("no plan for this run: %s", fault.rule)
        return None
    if not resume and decision.certain:
        require_room(decision)
    try:
        rates = rates_for(decision, dtype)
    except EnvironmentFault as fault:  # times are an extra: a damaged or unwritable cache stops no run
        logger().warning("no times for this run: %s (%s: %s)", fault.rule, fault.place, fault.found)
        rates = None
    return with_time(decision, rates)


def rates_for(decision: Decision, dtype: str) -> Rates | None:
    """This machine's rates for the run; measured now where there are none at the model's widths, the run is long and the machine idle."""
    if decision.place.kind != "cpu":
        return None
    threads = threads_of(decision.config.train.threads)
    found = nearest_rates(decision.shape, dtype, read_all(), threads)
    exact = found is not None and found.widths == widths_of(decision.shape)
    cores = host.usable_cores()
    if exact or operations(decision) < LONG_RUN_SECONDS * OPERATIONS_OF_A_CORE * cores:
        return found
    if is_busy():
        logger().info("no rates of this machine, and it is busy now: `halfbyte plan MODEL --calibrate` measures them once it is idle")
        return found
    logger().info("measuring this machine once, for the times of plans")
    measure(decision.shape, dtype, threads)
    return nearest_rates(decision.shape, dtype, read_all(), threads)
