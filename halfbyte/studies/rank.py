"""Which rank?  The three stages on a model and its rows, the decision, and what r / 2, r and 2 r cost.

    capacity   how many bits the rows ask for                      forward only
    gradient   which directions of the first gradient come back    three backward passes, each over half of up to `rows` rows
    probe      a short run of a large rank, cut to smaller ones    as many steps as a tenth of the planned run, at least 30; as many again
                                                                   for each small rank that is run: up to three, four from a probe of
                                                                   rank 256 on

Each stage may be left out.  What is trained, on what base and at which rate is a run's own settings (RunConfig); dropout, DoRA and
whatever else is in rank_problem.PLAIN are left out of the trial, and a base that would be calibrated is the plain one.  With data.packing
a step is one of packed rows, in the run as in the probe; capacity, gradient and the held-out loss look at rows one by one.

Bytes of a parameter follow the types (`training_bytes`): 4 in the file and 16 while training in float32, fewer in 16 bits or with an
int8 state; those while training are computed, an estimate.  Seconds a step are an estimate too: measured at one rank, and scaled by the
operations of another.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic

import torch

from halfbyte import host
from halfbyte.config.run import RunConfig
from halfbyte.data.batches import Batch, Batches
from halfbyte.data.load import TrainData, load_data, require_task
from halfbyte.data.tokenize import Example
from halfbyte.errors import ConfigError, DataError, nearest
from halfbyte.log import logger
from halfbyte.models.assemble import Assembled, assemble
from halfbyte.models.load import load_tokenizer, token_limit
from halfbyte.models.source import resolve
from halfbyte.optim.schedules import of_another_length
from halfbyte.plan.memory import bytes_of_state
from halfbyte.quant.storage_cost import WIDTHS
from halfbyte.studies.rank_capacity import TASKS, Capacity, capacity
from halfbyte.studies.rank_decision import MOST, Decision, decide
from halfbyte.studies.rank_gradient import Gradient, gradient_spectrum, module_ranks
from halfbyte.studies.rank_probe import Point, Probe, powers, probe_run
from halfbyte.studies.rank_problem import PLAIN, Problem, adapt, token_loss
from halfbyte.studies.rows import spread_evenly
from halfbyte.train.resolve import learning_rate, total_steps
from halfbyte.train.training import Items, items_of

STAGES = ("capacity", "gradient", "probe")
TOKENS_AT_ONCE, HELD_OUT_ROWS, PIECE = 1024, 96, 4
PROBE_SHARE, PROBE_LEAST = 0.1, 30


@dataclass(frozen=True)
class Ask:
    """stages to run; what the rows teach (a name of TASKS); rank and steps of the probe (None: a share of the run); rows of the others."""

    stages: tuple[str, ...] = STAGES
    task: str = "instructions"
    probe_rank: int = 64
    probe_steps: int | None = None
    rows: int = 256


@dataclass(frozen=True)
class Choice:
    """What a rank costs: parameters, bytes of the file and while training (estimate), seconds a step (estimate), loss after the probe's
    steps (estimate) and how far it is above the best of the probe (estimate), both in nats a token."""

    rank: int
    parameters: int
    file_bytes: int
    training_bytes: int
    step_seconds: float | None
    loss: float | None
    gap: float | None


@dataclass(frozen=True)
class Recommendation:
    """The answer; `modules` are the ranks of single modules with the same sum of parameters, empty without the gradient stage."""

    decision: Decision
    choices: tuple[Choice, ...]
    capacity: Capacity | None
    gradient: Gradient | None
    probe: Probe | None
    modules: dict[str, int]
    alpha: float
    rslora: bool
    planned_steps: int
    setting: str
    seconds: float

    def lora_settings(self) -> dict[str, object]:
        """The `lora` group with ranks and alphas of modules, alpha / rank constant."""
        rank = self.decision.rank
        ranks = {name: own for name, own in self.modules.items() if own != rank}
        power = 0.5 if self.rslora else 1.0
        return {"rank": rank, "alpha": self.alpha, "ranks": ranks,
                "alphas": {name: round(self.alpha * (own / rank) ** power, 6) for name, own in ranks.items()}}  # fmt: skip


def check(ask: Ask) -> None:
    """Raise ConfigError for an unknown stage or task, and for numbers out of range."""
    for name in ask.stages or ("",):
        if name not in STAGES:
            raise ConfigError("a stage is one of three", code="E-CONF-540", place="--stages", found=name[:40] or "none",
                              expected=", ".join(STAGES), remedy=nearest(name, STAGES), nothing_done="Nothing was measured.")  # fmt: skip
    if ask.task not in TASKS:
        raise ConfigError("what the rows teach is one of four", code="E-CONF-541", place="--task", found=ask.task[:40],
                          expected=", ".join(TASKS), remedy=nearest(ask.task, TASKS), nothing_done="Nothing was measured.")  # fmt: skip
    for place, value, least, most in (("--probe-rank", ask.probe_rank, 2, MOST), ("--probe-steps", ask.probe_steps, 2, 10**6),
                                      ("--rows", ask.rows, 8, 10**6)):  # fmt: skip
        if value is not None and not least <= value <= most:
            raise ConfigError("a number must be in its range", code="E-CONF-542", place=place, found=str(value),
                              expected=f"{least:,} to {most:,}", nothing_done="Nothing was measured.")  # fmt: skip


def recommend(config: RunConfig, ask: Ask) -> Recommendation:
    """Measure and decide.  Raises ConfigError, DataError, ModelError, TargetError and UnsupportedError."""
    check(ask)
    if config.method not in ("qlora", "lora"):  # also auto: a plan compares methods at a rank
        raise ConfigError("only an adapter has a rank", code="E-CONF-543", place="method", found=config.method, expected="qlora or lora",
                          nothing_done="Nothing was measured.")  # fmt: skip
    if config.model.task != "causal-lm":
        raise ConfigError("the rank is measured for language models", code="E-CONF-544", place="model.task", found=config.model.task,
                          expected="causal-lm", nothing_done="Nothing was measured.")  # fmt: skip
    source = resolve(config.model.name, revision=config.model.revision, allow_download=config.model.allow_download)
    data = load_data(config.data, load_tokenizer(source), model_limit=token_limit(source), template=config.model.template)
    require_task(data, classify=False, place=config.data.path)
    if "probe" in ask.stages and not data.eval:
        raise DataError("a probe is judged by rows it was not trained on", code="E-DATA-093", place=config.data.path,
                        found="no held-out rows", remedy="set data.eval_path or data.eval_rows, or leave the probe out of --stages",
                        nothing_done="Nothing was measured.")  # fmt: skip
    if len(data.train) < 4:
        raise DataError("a rank needs rows to be measured on", code="E-DATA-094", place=config.data.path,
                        found=f"{len(data.train)} rows", expected="4 or more", nothing_done="Nothing was measured.")  # fmt: skip
    plain = config.lora.model_copy(update={"rank": 1, "ranks": {}, "alphas": {}, "init": "default", "dora": False})
    assembled = assemble(config.model_copy(update={"lora": plain}))
    return measure(config, ask, data, assembled)


def measure(config: RunConfig, ask: Ask, data: TrainData, assembled: Assembled) -> Recommendation:
    """The stages on rows and a model that are here.  Raises DataError for rows that have no two halves for the gradient."""
    began = monotonic()
    pad = assembled.tokenizer.pad_token_id or 0
    sample = pieces([data.train[number] for number in spread_evenly(data.train, ask.rows)], pad)
    if "gradient" in ask.stages and len(sample) < 2:
        raise DataError("the gradient stage compares two halves of the rows", code="E-DATA-096", place=config.data.path,
                        found=f"{len(data.train)} rows, one piece of up to {PIECE}", expected=f"{PIECE + 1} rows or more",
                        remedy="give more rows, or leave gradient out of --stages", nothing_done="Nothing was measured.")  # fmt: skip
    items = items_of(config, data)
    problem = problem_of(config, data, items, assembled)
    sides = [side for layer in adapt(problem, 1).values() for side in (layer.lora_a.shape[1], layer.lora_b.shape[0])]
    rank_one = sum(sides)
    steps = total_steps(config, len(items))
    problem = replace(problem, optim=of_another_length(config.optim, steps))
    held, gradient, probe = None, None, None
    if "capacity" in ask.stages:
        logger().info("rank: capacity, what the rows hold")
        held = capacity(problem, data.train, sample, rank_one, ask.task)
    if "gradient" in ask.stages:
        logger().info("rank: gradient, over %d pieces of the rows", len(sample))
        gradient = gradient_spectrum(problem, sample[::2], sample[1::2], sketch=sketch_for(problem), seed=config.train.seed)
    if "probe" in ask.stages:
        length = ask.probe_steps or min(steps, max(PROBE_LEAST, math.ceil(PROBE_SHARE * steps)))
        logger().info("rank: probe, a short run of %d steps", length)
        probe = probe_run(problem, rank=ask.probe_rank, steps=length, rate=rate_of(config, assembled))
        held = held.with_gain(probe.gain) if held is not None else None
    most = largest_rank(config, sides, free_bytes(problem.device) // 2)
    decision = decide(held, gradient, probe, planned_steps=steps, most=most)
    trained = sum(sum(label != -100 for label in example.labels[1:]) for example in data.train)
    per_step = trained / len(items) * config.train.global_batch_size
    timing = timing_of(gradient, probe, rank_one, assembled.total_params, per_step)
    ranks = sorted({max(1, decision.rank // 2), decision.rank, decision.rank * 2})
    choices = tuple(choice(config, rank, sides, probe, timing) for rank in ranks)
    modules = module_ranks(gradient, decision.rank) if gradient is not None else {}
    return Recommendation(
        decision, choices, held, gradient, probe, modules, config.lora.alpha, config.lora.rslora, steps,
        setting_text(config, data, assembled, steps), monotonic() - began,
    )  # fmt: skip


def setting_text(config: RunConfig, data: TrainData, assembled: Assembled, steps: int) -> str:
    """On what it was measured, and for which run, in one line."""
    packed = f"packed rows of up to {data.report.max_tokens:,} tokens" if config.data.packing else "rows"
    shorter = ", fewer tokens where training finds too little memory" if config.data.packing and config.data.max_tokens == "auto" else ""
    return (
        f"{assembled.source.name}, {config.method}, {len(data.train)} training and {min(len(data.eval), HELD_OUT_ROWS)} held-out rows of "
        f"{config.data.path}, alpha {config.lora.alpha:g}, for a run of {steps} {'step' if steps == 1 else 'steps'} of "
        f"{config.train.global_batch_size} {packed}{shorter}, seed {config.train.seed}{left_out(config)}"
    )


def left_out(config: RunConfig) -> str:
    """The settings that were given and have no part in the trial, in words; empty without any."""
    given = [f"lora.{name}" for name, plain in PLAIN.items() if getattr(config.lora, name) != plain]
    given += ["quant.calibrate"] if config.quant.calibrate else []
    return f"; left out of the trial: {', '.join(given)}" if given else ""


def rate_of(config: RunConfig, assembled: Assembled) -> float:
    """The run's learning rate."""
    rate = config.optim.learning_rate
    return learning_rate(config.method, assembled.total_params) if isinstance(rate, str) else rate


def sketch_for(problem: Problem) -> int:
    """128 directions, or fewer where the widest module has fewer."""
    widths = [min(layer.lora_a.shape[1], layer.lora_b.shape[0]) for layer in adapt(problem, 1).values()]
    return min(128, max(widths))


def pieces(examples: Sequence[Example], pad: int) -> list[Batch]:
    """Batches of a few rows, the shortest first."""
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    made = Batches(ordered, micro_batch_size=PIECE, global_batch_size=PIECE, seed=0, pad_id=pad, shuffle=False)
    return [batch for window in made.epoch(0) for batch in window]


def problem_of(config: RunConfig, data: TrainData, items: Items, assembled: Assembled) -> Problem:
    """The rows as training would see them, `items` in its steps; the micro-batch keeps to what a processor does at full rate."""
    pad = assembled.tokenizer.pad_token_id or 0
    longest = max(len(item.input_ids) for item in items)
    size = config.train.micro_batch_size
    micro = max(1, min(config.train.global_batch_size, TOKENS_AT_ONCE // longest)) if isinstance(size, str) else size

    def windows() -> Iterator[list[Batch]]:
        batches = Batches(
            items, micro_batch_size=micro, global_batch_size=config.train.global_batch_size, seed=config.train.seed, pad_id=pad
        )
        epoch = 0
        while True:
            yield from batches.epoch(epoch)
            epoch += 1

    device = next(iter(assembled.model.parameters())).device
    held_out = pieces(data.eval[:HELD_OUT_ROWS], pad) if data.eval else []
    return Problem(
        assembled.model, config.lora, windows, held_out, token_loss(assembled.model), config.optim, config.train.seed, device
    )  # fmt: skip


def timing_of(
    gradient: Gradient | None, probe: Probe | None, rank_one: int, total_params: int, tokens_per_step: float
) -> Callable[[int], float] | None:
    """rank -> seconds of an optimizer step: measured at one rank, scaled by 4 N + 6 P1 r operations a token; None where nothing ran."""
    if probe is not None:
        measured, at = probe.seconds_per_token, probe.rank
    elif gradient is not None:
        measured, at = gradient.seconds_per_token, gradient.directions
    else:
        return None
    return lambda rank: measured * tokens_per_step * (4 * total_params + 6 * rank_one * rank) / (4 * total_params + 6 * rank_one * at)


def training_bytes(config: RunConfig, tensors: Iterable[int]) -> int:
    """Adapter weights of these sizes while they train: themselves, gradients, optimizer state and, of 16 bits, masters."""
    tensors = list(tensors)
    return 2 * WIDTHS[config.lora.dtype] * sum(tensors) + bytes_of_state(tensors, config.optim.state, config.lora.dtype)


def free_bytes(device: torch.device) -> int:
    """What is free for this process where the model lies; on a GPU with what PyTorch keeps there and does not use."""
    if device.type != "cuda":
        return host.memory_bytes()[1]
    return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def largest_rank(config: RunConfig, sides: Iterable[int], room: int) -> int:
    """The largest power of two up to MOST that trains in `room` bytes, 1 where none does; each rank by its own tensors' sizes."""
    sides = list(sides)
    fits = [rank for rank in powers(MOST) if training_bytes(config, (rank * side for side in sides)) <= room]
    return max(fits, default=1)


def choice(config: RunConfig, rank: int, sides: Sequence[int], probe: Probe | None, timing: Callable[[int], float] | None) -> Choice:
    """What one rank costs and is predicted to reach; `sides` are the inputs and outputs of all layers that are adapted."""
    point = predicted(probe.points, rank) if probe is not None else None
    parameters = rank * sum(sides)
    return Choice(
        rank, parameters, WIDTHS[config.lora.dtype] * parameters, training_bytes(config, (rank * side for side in sides)),
        None if timing is None else timing(rank), point, None if point is None or probe is None else point - probe.loss,
    )  # fmt: skip


def predicted(points: Mapping[int, Point], rank: int) -> float:
    """Loss of a rank; between two powers of two the straight line in log2(rank), above the probe's rank the loss of that."""
    known = sorted((number, point.loss) for number, point in points.items())
    below = max(entry for entry in known if entry[0] <= rank)
    above = min((entry for entry in known if entry[0] >= rank), default=below)
    if above[0] == below[0]:
        return below[1]
    share = math.log2(rank / below[0]) / math.log2(above[0] / below[0])
    return below[1] + share * (above[1] - below[1])
