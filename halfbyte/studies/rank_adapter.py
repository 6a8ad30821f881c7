"""What rank a trained adapter uses, and what a smaller one would cost: predicted on some rows, measured on others.

    spectrum     per kind of module: singular values of scaling B A, how many hold 90 % of the squared norm
    predicted    loss of the adapter + what the cut costs on the calibration rows: every other batch
    measured     the cut on the rest of the rows

The cost of a cut is a difference between two models on the same rows, so it varies far less from row to row than a loss does: a few dozen
rows predict it, with the standard error that is printed.  The share of norm that a cut leaves out does not: two cuts with equal shares
differ, because modules differ in what their norm does.  A prediction is an estimate; the rows it was made on are
never those it is compared on.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from halfbyte.adapters.truncate import Cut, Whole
from halfbyte.data.batches import Batch
from halfbyte.errors import DataError
from halfbyte.evaluate.loss import evaluate_loss
from halfbyte.evaluate.opened import Opened
from halfbyte.lora.inject import updates
from halfbyte.lora.truncate import Spectrum
from halfbyte.models.heads import head_of
from halfbyte.studies.rank_problem import HeldOut

MOST_NORM = 0.9
FEWEST_ROWS = 16


@dataclass(frozen=True)
class Group:
    """Modules with the same last name: how many, their rank, medians of effective rank and of the rank that holds 90 % of the squared norm,
    and their share of the squared norm of the whole adapter."""

    name: str
    count: int
    rank: int
    effective_rank: float
    rank_for_most: int
    share: float


def groups(whole: Whole) -> list[Group]:
    """The adapter by kinds of modules, in the order of the file."""
    members: dict[str, list[str]] = defaultdict(list)
    for name in whole.spectra:
        members[name.rpartition(".")[2]].append(name)
    squared = {name: float(part.values.square().sum()) for name, part in whole.spectra.items()}
    total = sum(squared.values()) or 1.0
    return [
        Group(
            kind, len(names), max(whole.ranks[name] for name in names), middle([whole.spectra[name].effective_rank for name in names]),
            round(middle([rank_for(whole.spectra[name]) for name in names])), sum(squared[name] for name in names) / total,
        ) for kind, names in members.items()
    ]  # fmt: skip


def left_out(whole: Whole, rank: int) -> float:
    """Share of the squared norm of the whole adapter that a cut of every module to `rank` leaves out, 0 to 1.

    It is known from the spectra alone, also of an adapter that must not be cut (init loftq).
    """
    total = sum(float(part.values.square().sum()) for part in whole.spectra.values())
    return sum(float(part.values[rank:].square().sum()) for part in whole.spectra.values()) / total if total else 0.0


def middle(values: Sequence[float]) -> float:
    """The median, the upper one of two."""
    return sorted(values)[len(values) // 2]


def rank_for(part: Spectrum, share: float = MOST_NORM) -> int:
    """Smallest rank whose truncation leaves out at most 1 - share of the squared norm."""
    return next(rank for rank in range(part.values.numel() + 1) if part.left_out(rank) <= 1 - share + 1e-12)


@dataclass(frozen=True)
class Cost:
    """A cut: share of squared norm left out, parameters of its factors, loss predicted (estimate) with the standard error of its cost (None
    where one batch predicts), and loss measured, in nats a token."""

    name: str
    parameters: int
    left_out: float
    predicted: float
    error: float | None
    measured: float


@dataclass(frozen=True)
class Costs:
    """full and base: loss with the whole adapter and without its low-rank part, on `tokens` tokens of the rows that measure."""

    full: float
    base: float
    tokens: int
    calibration_tokens: int
    cuts: tuple[Cost, ...]


def place(opened: Opened, cut: Cut | None) -> None:
    """Give the opened model's adapter the values of a cut, zeros beyond its rank; None switches it off.  The scales do not change."""
    with torch.no_grad():
        for name, layer in updates(opened.model).items():
            layer.lora_b.zero_()
            if cut is not None:
                kept = cut.ranks[name]
                layer.lora_a.zero_()[:kept].copy_(cut.tensors[f"{name}.lora_a"])
                layer.lora_b[:, :kept].copy_(cut.tensors[f"{name}.lora_b"])


def costs(opened: Opened, whole: Whole, batches: Sequence[Batch], cuts: Mapping[str, Cut]) -> Costs:
    """Predict the loss of each cut, and measure it; the model has the whole adapter again afterwards.  DataError for few rows."""
    rows = sum(len(batch.rows) for batch in batches)
    if rows < FEWEST_ROWS or len(batches) < 2:
        raise DataError("a prediction is checked on other rows than it was made on", code="E-DATA-095", place="--data",
                        found=f"{rows} rows in {len(batches)} batches", expected=f"{FEWEST_ROWS} rows or more in two batches or more",
                        remedy="name a file with more rows, or leave --data out")  # fmt: skip
    calibration, measuring = list(batches[::2]), list(batches[1::2])
    own = whole.cut(max(whole.ranks.values()))
    head = head_of(opened.model)

    def losses(cut: Cut | None, rows: Sequence[Batch]) -> HeldOut:
        place(opened, cut)
        seen = [evaluate_loss(opened.model, [batch], head=head) for batch in rows if batch.trained_tokens]
        return HeldOut(tuple(one.loss * one.tokens for one in seen), tuple(one.tokens for one in seen))

    known, full, base = losses(own, calibration), losses(own, measuring), losses(None, measuring)
    found = []
    for name, cut in cuts.items():
        gap, error = losses(cut, calibration).gap(known)
        found.append(Cost(name, cut.parameters, cut.left_out, full.loss + gap, error, losses(cut, measuring).loss))
    place(opened, own)
    return Costs(full.loss, base.loss, sum(full.counts), sum(known.counts), tuple(found))
