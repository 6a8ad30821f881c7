"""Every "auto" of the training settings as a number, from the model and the data; the result is what is logged and saved.

    learning rate      adapters: 5e-4 below 3 billion parameters, 2e-4 above; full: a tenth of that
    micro-batch        the largest divisor of the global batch whose longest rows stay within the device's token budget; where a plan was
                       made (plan/decide.py), what it chose, as for activations
    evaluate, save     about eight times a run
    threads            what OMP_NUM_THREADS says, else one for each core
"""

import math
from typing import Any

import torch

from halfbyte import host
from halfbyte.config.run import RunConfig
from halfbyte.log import logger
from halfbyte.plan.decide import divisors
from halfbyte.plan.rates import threads_of
from halfbyte.plan.search import BATCH_TOKENS

EVALUATIONS = 8
LARGE_MODEL = 3_000_000_000


def total_steps(config: RunConfig, items: int) -> int:
    """Optimizer steps of the whole run; a last, shorter window counts as one."""
    per_epoch = math.ceil(items / config.train.global_batch_size)
    return config.train.max_steps or max(1, math.ceil(per_epoch * config.train.epochs - 1e-9))


def learning_rate(method: str, total_params: int) -> float:
    """The default rate.

    >>> learning_rate("qlora", 135_000_000), learning_rate("full", 7_000_000_000)
    (0.0005, 2e-05)
    """
    rate = 5e-4 if total_params < LARGE_MODEL else 2e-4
    return rate / 10 if method == "full" else rate


def auto_threads() -> int:
    """One for each core, unless OMP_NUM_THREADS asks for another number; that is told."""
    threads, cores = threads_of(), host.usable_cores()
    if threads != cores:
        logger().info("train.threads=%d: OMP_NUM_THREADS is set; there are %d cores", threads, cores)
    return threads


def resolve(config: RunConfig, *, total_params: int, items: int, eval_items: int, longest: int, device: torch.device) -> RunConfig:
    """`config` without "auto" in `optim` and `train`; `longest` is the longest row in tokens."""
    steps = total_steps(config, items)
    every = math.ceil(steps / EVALUATIONS)
    train: dict[str, Any] = {}
    if config.train.micro_batch_size == "auto":
        most = BATCH_TOKENS["cpu" if device.type == "cpu" else "gpu"]
        train["micro_batch_size"] = divisors(config.train.global_batch_size, longest, most)[0]
    if config.train.activations == "auto":
        train["activations"] = "keep"
    if config.train.eval_every_steps == "auto":
        train["eval_every_steps"] = every
    if eval_items == 0:
        train["eval_every_steps"] = None
    if config.train.save_every_steps == "auto":
        train["save_every_steps"] = every
    if config.train.threads == "auto":
        train["threads"] = auto_threads()
    optim: dict[str, Any] = {}
    if config.optim.learning_rate == "auto":
        optim["learning_rate"] = learning_rate(config.method, total_params)
    return config.model_copy(update={"train": config.train.model_copy(update=train), "optim": config.optim.model_copy(update=optim)})
