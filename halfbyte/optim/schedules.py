"""The learning rate of each optimizer step, as a pure function of the step number.

Steps count from 1 and are *optimizer* updates, never micro-batches.  With W warm-up steps of N:

    share(s) = s / W                                   for s <= W
             = shape((s - W) / (N - W))                after, from 1 at s = W to the final share at s = N

so the first step already trains, step W runs at the full rate, and step N at exactly `final_lr_share` of it ("constant" stays at 1).
A schedule is a function, so resuming needs nothing but the step number.
"""

import math
from collections.abc import Callable

from halfbyte.config.optim import OptimConfig
from halfbyte.errors import ConfigError

SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, final: 1.0,
    "linear": lambda progress, final: 1.0 + (final - 1.0) * progress,
    "cosine": lambda progress, final: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""name -> (progress in 0..1, final share) -> share of the full rate."""


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Number of warm-up steps; raises ConfigError when warming up would take the whole run."""
    if config.warmup_steps is None:
        return min(math.ceil(config.warmup_share * total_steps), total_steps - 1)
    if config.warmup_steps >= total_steps:
        raise ConfigError(
            "warming up must end before the run does", code="E-CONF-301", place="optim.warmup_steps", found=str(config.warmup_steps),
            expected=f"less than the {total_steps} optimizer steps of this run", remedy="set optim.warmup_steps lower or train longer",
            nothing_done="Nothing was trained.",
        )
    return config.warmup_steps


def of_another_length(config: OptimConfig, total_steps: int) -> OptimConfig:
    """The schedule of a run of `total_steps`, for one of another length: warm-up in steps becomes its share.  Raises ConfigError.

    >>> of_another_length(OptimConfig(warmup_steps=50), 1000).warmup_share
    0.05
    """
    if config.warmup_steps is None:
        return config
    return config.model_copy(update={"warmup_steps": None, "warmup_share": warmup_steps(config, total_steps) / total_steps})


def share_at(config: OptimConfig, step: int, total_steps: int) -> float:
    """Share of the full learning rate at optimizer step `step` (1 .. total_steps).

    >>> config = OptimConfig(schedule="linear", warmup_steps=2, final_lr_share=0.0)
    >>> [share_at(config, step, 6) for step in range(1, 7)]
    [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warmup = warmup_steps(config, total_steps)
    if step <= warmup:
        return step / warmup
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return SCHEDULES[config.schedule](progress, config.final_lr_share)
