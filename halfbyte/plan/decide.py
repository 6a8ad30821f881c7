"""The plan of a run: what was left `auto` is chosen, each with its reason, and what cannot fit is refused before a weight is loaded.

    method                   lora where a setting fits with a fifth of the memory to spare, else qlora; full is never chosen for somebody
    data.max_tokens          with packing: the length of a row, the longest that fits and still takes every sample
    train.micro_batch_size   the largest divisor of the global batch that keeps to BATCH_TOKENS tokens and fits
    train.activations        the first policy that fits: keep, recompute_mlp, recompute, offload

What was written down stays; the search goes on around it (search.py).  A smaller micro-batch is tried before something is computed twice:
it changes neither gradient nor arithmetic.  What is within the memory, but not by the margin of error, is let through with a word.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from halfbyte.config.run import RunConfig
from halfbyte.errors import DoesNotFitError
from halfbyte.plan.activations import POLICIES, own_layers
from halfbyte.plan.four_bits import advice
from halfbyte.plan.hardware import Hardware
from halfbyte.plan.rates import Rates
from halfbyte.plan.search import BATCH_TOKENS, NOT, TIGHT, Option, best_of_each, divisors, first_change, least, needed_text, options, roomy
from halfbyte.plan.setting import Setting
from halfbyte.plan.speed import Rows, seconds_of_step, work_of
from halfbyte.shape import ModelShape
from halfbyte.units import bytes_text, percent_text, seconds_text

AUTO_METHODS = ("lora", "qlora")


@dataclass(frozen=True)
class Choice:
    """One setting that was `auto`: its dotted key, what it became, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class RowsSeen:
    """What is known of the rows once they are tokenized: tokens of each sample to train on and of the longest held-out one, the share of
    tokens that carry a label, and the longest row that the settings allow."""

    lengths: tuple[int, ...]
    held_out: int
    trained_share: float
    max_tokens: int


@dataclass(frozen=True)
class Decision:
    """The settings without `auto` in what a plan decides, why, and the plan that stands behind them."""

    config: RunConfig
    choices: tuple[Choice, ...]
    option: Option
    place: Hardware
    shape: ModelShape
    rows: RowsSeen
    seconds_per_step: float | None = None
    measured: str = ""

    @property
    def certain(self) -> bool:
        """Whether the plan knows this run's layers: own ones, for which activations are counted to the byte."""
        return self.config.model.layers == "auto" and own_layers(self.shape)

    def as_dict(self) -> dict[str, Any]:
        """What is kept in the run's folder."""
        memory = self.option.memory
        return {
            "estimate": True, "place": self.place.name, "available_bytes": self.place.memory_bytes, "predicted_peak_bytes": memory.total,
            "verdict": self.option.verdict, "short_of": self.option.short or None, "peak": memory.peak,
            "terms": [asdict(term) for term in memory.at(memory.peak)],
            "seconds_per_step": self.seconds_per_step, "seconds_from": self.measured,
            "chosen": [asdict(choice) for choice in self.choices],
        }  # fmt: skip


def row_lengths(config: RunConfig, rows: RowsSeen) -> list[int]:
    """Lengths of the longest row to plan for; more than one only where packing leaves it open.

    Packed rows of a length that takes the longest sample take all of them, so no sample is lost by a shorter row.
    """
    longest = max(rows.lengths)
    if not config.data.packing:
        return [max(longest, rows.held_out)]
    full = min(rows.max_tokens, sum(rows.lengths))
    if config.data.max_tokens != "auto":
        return [max(full, rows.held_out)]
    lengths = [rows.max_tokens]
    while lengths[-1] // 2 >= max(longest, rows.held_out, 2):
        lengths.append(lengths[-1] // 2)
    return lengths


def with_method(config: RunConfig, method: str) -> RunConfig:
    """The settings with the method decided."""
    return config.model_copy(update={"method": method})


def tried(config: RunConfig, shape: ModelShape, place: Hardware, rows: RowsSeen, dtype: str) -> list[Option]:
    """All settings of the run's method that its open values allow, in the order of preference."""
    train, found = config.train, []
    fixed = {"state"} | ({"policy"} if train.activations != "auto" else set())
    for tokens in row_lengths(config, rows):
        given = train.micro_batch_size
        sizes = divisors(train.global_batch_size, tokens, BATCH_TOKENS[place.kind]) if given == "auto" else [int(given)]
        policy = "keep" if train.activations == "auto" else train.activations
        base = Setting.of(
            config, dtype=dtype, tokens=tokens, micro_batch_size=sizes[0], policy=policy, device=place.kind,
            trained_share=rows.trained_share,
        )  # fmt: skip
        found += options(shape, base, place, frozenset(fixed), sizes)
    return found


def decide(config: RunConfig, shape: ModelShape, place: Hardware, rows: RowsSeen, dtype: str) -> Decision:
    """The settings to train with; whether they fit says the decision's option.  Raises TargetError for targets that match nothing."""
    methods = AUTO_METHODS if config.method == "auto" else (config.method,)
    every = {method: tried(with_method(config, method), shape, place, rows, dtype) for method in methods}
    found = best_of_each(every, place)
    room = None if config.method != "auto" else roomy(every["lora"], place)
    method = config.method if config.method != "auto" else "qlora" if room is None else "lora"
    one, choices = found[method], []
    if config.method == "auto":
        choices.append(Choice("method", method, _why_method(room, every["lora"], place)))
    if config.data.packing and config.data.max_tokens == "auto":
        choices.append(Choice("data.max_tokens", one.setting.tokens, _why_length(one.setting.tokens, rows)))
    if config.train.micro_batch_size == "auto":
        choices.append(Choice("train.micro_batch_size", one.setting.micro_batch_size, _why_size(config, one, place, room is not None)))
    if config.train.activations == "auto":
        choices.append(Choice("train.activations", one.setting.policy, _why_policy(one, every[method], place)))
    return Decision(applied(config, choices), tuple(choices), one, place, shape, rows)


def rows_at_once(decision: Decision) -> Rows:
    """The rows that the batches are made of."""
    lengths = decision.rows.lengths
    return Rows.packed(lengths, decision.option.setting.tokens) if decision.config.data.packing else Rows.of(lengths)


def operations(decision: Decision) -> float:
    """Operations of the whole run, about."""
    train, setting, rows = decision.config.train, decision.option.setting, rows_at_once(decision)
    passes = train.epochs * rows.count if train.max_steps is None else train.max_steps * train.global_batch_size
    return passes / setting.micro_batch_size * work_of(decision.shape, setting, rows).total


def with_time(decision: Decision, rates: Rates | None) -> Decision:
    """The decision with the time of a step, where the rates of this machine are known."""
    if rates is None or decision.place.name != rates.device:
        return decision
    seconds = seconds_of_step(
        decision.shape, decision.option.setting, rates, decision.config.train.global_batch_size, rows_at_once(decision)
    )
    return replace(decision, seconds_per_step=seconds, measured=f"this machine's rates, measured on {rates.date}")


def applied(config: RunConfig, choices: Sequence[Choice]) -> RunConfig:
    """The settings with these values in the place of their `auto`."""
    update: dict[str, Any] = {}
    for choice in choices:
        group, _, name = choice.key.rpartition(".")
        if group:
            update[group] = update.get(group, getattr(config, group)).model_copy(update={name: choice.value})
        else:
            update[name] = choice.value
    return config.model_copy(update=update)


def _why_method(room: Option | None, lora: Sequence[Option], place: Hardware) -> str:
    there = bytes_text(place.memory_bytes)
    if room is not None:
        return f"it needs {bytes_text(room.memory.total)} of {there} (estimate), a fifth or more is left, and nothing is lost to 4 bits"
    return f"lora would need {bytes_text(least(lora).memory.total)} of {there} at the least (estimate), which does not leave a fifth"


def _why_length(tokens: int, rows: RowsSeen) -> str:
    if tokens == rows.max_tokens:
        return "the model's limit, at most 1,024 tokens"
    return f"packed rows of {rows.max_tokens:,} tokens do not fit, and the longest sample has {max(rows.lengths):,}"


def _why_size(config: RunConfig, one: Option, place: Hardware, with_room: bool) -> str:
    size, most, tokens = one.setting.micro_batch_size, BATCH_TOKENS[place.kind], one.setting.tokens
    if size < divisors(config.train.global_batch_size, tokens, most)[0]:
        return f"larger ones of {tokens:,} tokens a row {'leave less than a fifth of the memory' if with_room else 'do not fit'} (estimate)"
    if size == config.train.global_batch_size:
        return f"the whole global batch; its longest row has {tokens:,} tokens"
    return f"the largest divisor of {config.train.global_batch_size} that keeps to {most:,} tokens at once, {tokens:,} in the longest row"


def _why_policy(one: Option, every: Sequence[Option], place: Hardware) -> str:
    policy = one.setting.policy
    if policy == "keep":
        return "what the backward pass needs fits, so nothing is computed twice"
    kept = min(other.memory.total for other in every if other.setting.policy == "keep")
    there = bytes_text(place.memory_bytes)
    return f"keeping all needs {bytes_text(kept)} and {percent_text(place.margin)} to spare, of {there} (estimate); {POLICIES[policy].cost}"


def require_room(decision: Decision) -> None:
    """Raise DoesNotFitError where the plan needs more than is there: what it needs, the largest term, the first thing to change."""
    one, place = decision.option, decision.place
    if one.verdict != NOT:
        return
    owner = "the host" if one.short == "host" else place.name
    term, change = one.largest, first_change(decision.shape, one, place)
    remedy = "take a smaller model, or a machine with more memory"
    if change is not None:
        then = needed_text(change.option)
        enough = f"the plan is {then} then" if change.option.verdict != NOT else f"that alone is not enough: {then} are needed then"
        remedy = f"{change.text}, which saves {bytes_text(change.saved)}; {enough}"
    raise DoesNotFitError(
        "a run must fit into memory before it starts", code="E-FIT-401",
        place=f"method {one.setting.method}, {one.setting.micro_batch_size} x {one.setting.tokens:,} tokens at once,"
        f" activations {one.setting.policy}",
        found=f"{needed_text(one)} at the peak (estimate); the largest term is {term.name},"
        f" {bytes_text(term.bytes)}: {term.formula}",
        expected=f"at most {bytes_text(one.there(place))}, what is free on {owner}", remedy=remedy,
        nothing_done="Nothing was loaded.",
    )  # fmt: skip


def lines(decision: Decision) -> list[tuple[str, str]]:
    """What the header of a run says about its plan: (label, text)."""
    one, place = decision.option, decision.place
    term = one.memory.largest
    peak = (
        f"{bytes_text(one.memory.total)} at the peak of {bytes_text(place.memory_bytes)} free (estimate),"
        f" the most of it {term.name} ({percent_text(term.bytes / one.memory.total)})"
    )
    if one.verdict == TIGHT:
        peak += f"; that is within the margin of error, {percent_text(place.margin)}"
    if one.verdict == NOT:
        peak += f"; {needed_text(one)} is more than is there" if one.short == "host" else "; more than is there"
    if not decision.certain:
        peak += "; high for transformers' own layers"
    chosen = [("chosen", f"{choice.key}={choice.value}: {choice.reason}") for choice in decision.choices]
    config = decision.config
    plain = config.method == "qlora" and config.quant.calibrate is False and config.lora.init == "default"
    if plain and (better := advice(decision.shape, config.quant_format)):
        chosen.append(("4 bits", better))
    if config.optim.learning_rate == "auto":
        chosen.append(("rate", "the method's default; `halfbyte lr` with the same settings measures one for these rows"))
    if decision.seconds_per_step is None:
        return [("plan", peak), *chosen]
    epoch = decision.seconds_per_step * -(-rows_at_once(decision).count // decision.config.train.global_batch_size)
    time = f"{seconds_text(decision.seconds_per_step)} a step, {seconds_text(epoch)} an epoch (estimate from {decision.measured})"
    return [("plan", peak), ("time", time), *chosen]
