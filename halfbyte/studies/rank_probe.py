"""Stage C: one short run of a large rank, its adapter cut to all smaller ranks; below what a cut can show, short runs of small ranks.

    probe   train rank R for `steps`, alpha fixed                                              -> loss(R)
    cut     the nearest update of rank r in every module, forward only                         -> what rank r reaches, at the least
    run     rank r from its own start, the same rows and steps, where its cut is not enough     -> what rank r reaches

    loss(r)    the better of cut and run: both are adapters of rank r
    gap(r)     loss(r) - the best loss, e its standard error over the held-out batches
    enough(r)  gap + e <= tolerance: shown to be as good; or gap <= min(e, 0.05 gain): not told from the best
    tolerance  min(0.01 loss, 0.05 gain)

A cut alone is too dark a view of a small rank: a run of that rank would have put its few directions elsewhere.  To train a cut on for some
steps does not mend that: it starts the optimizer anew at the full rate, on rows that were seen, and ends above the loss of the cut
(measured: e2e_nlg and planted models).  The runs go down from the smallest rank whose cut is enough, by halving.

The gain is what the probe learnt: loss of the base - the best loss.  A hundredth of the loss is what nobody would notice, unless little was
to be learnt; then it is a twentieth of that.  A standard error to spare is asked for because too small a rank costs loss, too large a one
little.  One held-out batch has no standard error: then the tolerance decides alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from halfbyte.studies.rank_problem import HeldOut, Problem, adapt, held_out, put, spectra_of, train

OF_LOSS, OF_GAIN = 0.01, 0.05


@dataclass(frozen=True)
class Point:
    """One rank: held-out loss of the cut; of a run of this rank, None where none was made; the better of the two; how far that is above
    the best rank, and the standard error of this distance, None with one held-out batch (nats a token)."""

    rank: int
    cut_loss: float
    run_loss: float | None
    loss: float
    gap: float
    error: float | None


@dataclass(frozen=True)
class Probe:
    """What the probe measured; losses in nats a token on `tokens` held-out tokens, `loss` is the best of all ranks'; `needed` is the
    smallest rank that is enough."""

    rank: int
    steps: int
    rate: float
    base_loss: float
    loss: float
    tokens: int
    tolerance: float
    needed: int
    points: dict[int, Point]
    seconds: float
    seconds_per_token: float

    @property
    def gain(self) -> float:
        """What was learnt, nats a token."""
        return self.base_loss - self.loss


def powers(most: int) -> list[int]:
    """1, 2, 4 .. up to `most`, and `most`.

    >>> powers(6)
    [1, 2, 4, 6]
    """
    return [*(2**n for n in range(most.bit_length()) if 2**n < most), most]


def probe_run(problem: Problem, *, rank: int, steps: int, rate: float) -> Probe:
    """Stage C; the model carries no adapter of use afterwards."""
    ranks = powers(rank)
    layers = adapt(problem, rank)
    base = held_out(problem)
    began = monotonic()
    seen = train(problem, steps, rate)
    per_token = (monotonic() - began) / max(1, seen)
    trial = Trial(problem, steps, rate, base.loss)
    trial.cuts[rank] = trial.runs[rank] = held_out(problem)
    parts = spectra_of(layers)
    for less in ranks[:-1]:
        put(layers, parts, less)
        trial.cuts[less] = held_out(problem)
    smallest([less for less in ranks if less <= trial.needed], trial.reaches)
    return Probe(
        rank, steps, rate, base.loss, trial.best.loss, sum(base.counts), trial.tolerance, trial.needed,
        {number: trial.point(number) for number in ranks}, monotonic() - began, per_token,
    )  # fmt: skip


class Trial:
    """What is known of each rank so far: its cut, and a run where one was made."""

    def __init__(self, problem: Problem, steps: int, rate: float, base_loss: float) -> None:
        self.problem, self.steps, self.rate, self.base_loss = problem, steps, rate, base_loss
        self.cuts: dict[int, HeldOut] = {}
        self.runs: dict[int, HeldOut] = {}

    def at(self, rank: int) -> HeldOut:
        """The better of cut and run."""
        return min((found[rank] for found in (self.cuts, self.runs) if rank in found), key=lambda one: one.loss)

    @property
    def best(self) -> HeldOut:
        """Of the best rank."""
        return min(map(self.at, self.cuts), key=lambda one: one.loss)

    @property
    def gain(self) -> float:
        """What was learnt, nats a token."""
        return self.base_loss - self.best.loss

    @property
    def tolerance(self) -> float:
        """What nobody would notice, nats a token."""
        return max(0.0, min(OF_LOSS * self.best.loss, OF_GAIN * self.gain))

    def enough(self, rank: int) -> bool:
        """Whether `rank` is shown to be as good as the best, or is not told from it."""
        gap, error = self.at(rank).gap(self.best)
        error = error or 0.0
        return gap + error <= self.tolerance or gap <= min(error, OF_GAIN * self.gain)

    def reaches(self, rank: int) -> bool:
        """The same after a run of this rank, where there was none."""
        if not self.enough(rank) and rank not in self.runs:
            adapt(self.problem, rank)
            train(self.problem, self.steps, self.rate)
            self.runs[rank] = held_out(self.problem)
        return self.enough(rank)

    @property
    def needed(self) -> int:
        """The smallest rank that is enough; the best always is."""
        return min(rank for rank in self.cuts if self.enough(rank))

    def point(self, rank: int) -> Point:
        """What is known of a rank."""
        run = self.runs.get(rank)
        return Point(rank, self.cuts[rank].loss, None if run is None else run.loss, self.at(rank).loss, *self.at(rank).gap(self.best))


def smallest(ranks: list[int], good: Callable[[int], bool]) -> int:
    """The smallest of rising ranks that is good, by halving; the last is taken as good and every other is asked at most once.

    >>> asked = []
    >>> smallest([1, 2, 4, 8, 16], lambda rank: asked.append(rank) or rank >= 4), asked
    (4, [4, 2])
    """
    low, high = 0, len(ranks) - 1
    while low < high:
        middle = (low + high) // 2
        if good(ranks[middle]):
            high = middle
        else:
            low = middle + 1
    return ranks[high]
