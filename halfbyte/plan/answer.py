"""A question about a model, and the whole answer: what `halfbyte plan` prints and what --json gives.

Everything that is an estimate says so; memory is a prediction from shapes (memory.py), rows are counted by data/lengths.py.  Time comes
from rates measured on this machine (rates.py); for a card that is known by name alone, a lower bound from its published peak.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte import env, host
from halfbyte.data.lengths import Lengths
from halfbyte.errors import ConfigError
from halfbyte.plan.activations import own_layers
from halfbyte.plan.four_bits import advice
from halfbyte.plan.hardware import PROCESSOR, Hardware, known_as
from halfbyte.plan.rates import PEAKS, Rates, nearest_rates, read_all, threads_of, widths_of
from halfbyte.plan.search import FITS, GLOBAL_BATCH_SIZE, NOT, TIGHT, Change, Option, best_of_each, first_change, least, options, order
from halfbyte.plan.setting import METHODS, Setting, trained_params
from halfbyte.plan.speed import Rows, seconds_of_step, work_of
from halfbyte.shape import ModelShape

AUTO_TOKENS = 1024  # data.max_tokens auto: the model's limit, at most this


@dataclass(frozen=True)
class Asked:
    """What was written on the command line, for commands that go on from a plan: model, settings file, rows and method, where they were
    given, and all other settings as key=value."""

    model: str | None = None
    file: str | None = None
    data: str | None = None
    method: str | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What is known: the model's shape, where to train, the settings that were given (`fixed` names those the search leaves alone).

    packing   samples share rows of base.tokens
    here      the place is this machine
    threads   that a run would compute with on this machine's processor
    """

    name: str
    shape: ModelShape
    hardware: Hardware
    base: Setting
    fixed: frozenset[str] = frozenset()
    methods: tuple[str, ...] = METHODS
    rows: Lengths | None = None
    global_batch_size: int = GLOBAL_BATCH_SIZE
    packing: bool = False
    here: bool = False
    asked: Asked = Asked()
    threads: int = field(default_factory=threads_of)


@dataclass(frozen=True)
class Answer:
    """found: method -> best setting; least: method -> the one that needs the least memory; ranking: (method, why) best first; changes: for
    methods that do not fit; listed: all that fit."""

    question: Question
    found: dict[str, Option]
    least: dict[str, Option]
    ranking: tuple[tuple[str, str], ...]
    changes: dict[str, Change | None]
    listed: tuple[Option, ...]
    rates: Rates | None


def shape_of(name: str, *, revision: str | None = None, allow_download: bool = False) -> tuple[ModelShape, Path | None]:
    """(shape, the model's tokenizer.json where there is one) of a config.json, a folder, or whatever else names a model.

    With `allow_download` config and tokenizer of a hub id are fetched, its weights are not.
    """
    path = env.at_home(name)
    if path.suffix == ".json" or path.is_dir():
        folder = path.parent if path.suffix == ".json" else path
        shape = ModelShape.read(path)
    else:
        from halfbyte.models.source import resolve

        folder = resolve(name, revision=revision, allow_download=allow_download, weights=False).folder
        shape = ModelShape.read(folder)
    tokenizer = folder / "tokenizer.json"
    return shape, tokenizer if tokenizer.is_file() else None


def compute_dtype(hardware: Hardware) -> str:
    """bfloat16 where it is multiplied natively, elsewhere float32: what a run takes (models/load.py)."""
    native = hardware.native_bf16 if hardware.kind == "gpu" else bool(host.native_bf16())
    return "bfloat16" if native else "float32"


def row_tokens(shape: ModelShape, asked: int | None, rows: Lengths | None, packing: bool = False) -> int:
    """Tokens of the longest row that training would see; raises ConfigError for more than the model was made for."""
    if asked is not None and asked > shape.max_positions:
        raise ConfigError(
            "a row is at most as long as the model was made for", code="E-CONF-403", place="data.max_tokens", found=f"{asked:,} tokens",
            expected=f"2 to {shape.max_positions:,} tokens", nothing_done="Nothing was planned.",
        )  # fmt: skip
    most = asked or min(shape.max_positions, AUTO_TOKENS)
    return most if rows is None else max(2, min(most, sum(rows.tokens) if packing else rows.longest))


def answer(question: Question) -> Answer:
    """Plan all methods that were asked for."""
    shape, hardware = question.shape, question.hardware
    tried = {name: options(shape, question.base.with_method(name), hardware, question.fixed) for name in question.methods}
    found = best_of_each(tried, hardware)
    ranking = order(found, hardware)
    changes = {method: first_change(shape, one, hardware) for method, one in found.items() if one.verdict == NOT}
    places = {method: place for place, (method, _) in enumerate(ranking)}
    listed = [one for every in tried.values() for one in every if one.verdict != NOT]
    listed.sort(key=lambda one: (one.verdict == TIGHT, places[one.setting.method]))
    rates = nearest_rates(shape, question.base.dtype, read_all(), question.threads) if hardware.name == PROCESSOR else None
    cost = (advice(shape, question.base.format) if question.base.init == "default" else "") or "its few bits cost a little held-out loss"
    reasons = tuple((method, f"{why}; {cost}" if method == "qlora" else why) for method, why in ranking)
    smallest = {method: least(every) for method, every in tried.items()}
    return Answer(question, found, smallest, reasons, changes, tuple(listed), rates)


def kept_rows(question: Question) -> Rows | None:
    """The rows that are not longer than planned for; None without data, or where none is left."""
    lengths = [count for count in question.rows.tokens if count <= question.base.tokens] if question.rows else []
    if not lengths:
        return None
    return Rows.packed(lengths, question.base.tokens) if question.packing else Rows.of(lengths)


def peak_of(hardware: Hardware) -> float | None:
    """The published peak of a card by its name in the table or its driver's, operations per second; None where there is none."""
    return PEAKS.get(known_as(hardware.name) or "") if hardware.kind == "gpu" else None


def seconds_per_step(given: Answer, one: Option) -> float | None:
    """Estimated seconds of the mean optimizer step; None without measured rates of this place or a published peak."""
    question = given.question
    if given.rates is not None:
        return seconds_of_step(question.shape, one.setting, given.rates, question.global_batch_size, kept_rows(question))
    peak = peak_of(question.hardware)
    if peak is None:
        return None
    work = work_of(question.shape, one.setting, kept_rows(question))
    return question.global_batch_size / one.setting.micro_batch_size * work.total / peak


def time_source(given: Answer) -> str:
    """Where the times come from, in words; "not measured" where there are none."""
    rates, hardware = given.rates, given.question.hardware
    if rates is not None:
        near = "" if rates.widths == widths_of(given.question.shape) else f" at the widths of another model ({rates.widths.hidden:,})"
        return f"estimate from the rates of this machine, measured on {rates.date}{near}"
    peak = peak_of(hardware)
    if peak is not None:
        return f"at the least: estimate from the published peak, {peak / 1e12:,.0f} TFLOP/s, of which runs reach a part"
    return "not measured"


def steps_per_epoch(given: Answer) -> int | None:
    """Optimizer steps of one pass over the rows; None without data."""
    kept = kept_rows(given.question)
    return None if kept is None else -(-kept.count // given.question.global_batch_size)


def as_dict(given: Answer) -> dict[str, Any]:
    """The answer as plain values, bytes as whole numbers."""
    question = given.question
    return {
        "model": {"name": question.name, "family": question.shape.model_type, "parameters": question.shape.total_params,
                  "layers": question.shape.layers, "own_layers": own_layers(question.shape)},
        "hardware": {**asdict(question.hardware), "program_bytes": question.hardware.program_bytes, "margin": question.hardware.margin},
        "tokens": question.base.tokens,
        "rows": None if question.rows is None else {
            "count": len(question.rows.tokens), "longest_tokens_estimate": question.rows.longest,
            "tokens_estimate": sum(question.rows.tokens), "counted_by": question.rows.how, "steps_per_epoch": steps_per_epoch(given)},
        "methods": {method: _option(given, one) for method, one in found_with_change(given)},
        "best_first": [{"method": method, "why": why} for method, why in given.ranking],
        "settings_that_fit": [_settings(one) for one in given.listed],
        "time": time_source(given),
    }  # fmt: skip


def found_with_change(given: Answer) -> list[tuple[str, Option]]:
    """(method, option) in the order asked."""
    return [(method, given.found[method]) for method in given.question.methods]


def _settings(one: Option) -> dict[str, Any]:
    now = one.setting
    return {
        "method": now.method, "policy": now.policy, "state": now.state, "paged": now.paged, "micro_batch_size": now.micro_batch_size,
        "predicted_bytes": one.memory.total, "verdict": one.verdict,
    }  # fmt: skip


def _option(given: Answer, one: Option) -> dict[str, Any]:
    shape, method = given.question.shape, one.setting.method
    change = given.changes.get(method)
    return {
        **_settings(one), "host_bytes": one.memory.host, "peak": one.memory.peak, "trained_params": trained_params(shape, one.setting),
        "terms": [asdict(term) | {"at_peak": term in one.memory.at(one.memory.peak)} for term in one.memory.terms],
        "largest_term": one.largest.name, "short_of": one.short or None, "operations_per_micro_batch": work_of(shape, one.setting).total,
        "seconds_per_step_estimate": seconds_per_step(given, one),
        "first_change": None if change is None else {
            "change": change.text, "saves_bytes": change.saved, "then": change.option.verdict, "then_bytes": change.option.needed},
        "fits": one.verdict == FITS,
        "least": {**_settings(given.least[method]), "host_bytes": given.least[method].memory.host},
    }  # fmt: skip
