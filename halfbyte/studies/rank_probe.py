"""Stage C: one short run of a large rank, then its adapter cut to smaller ranks: one run tells the loss of all of them.

    probe            train `rank` for `steps`, alpha fixed                        -> loss(R)
    cut to r         the nearest update of rank r in every module, forward only   -> loss of the cut, an upper bound
    recover          the cut trained on for `recover` steps, R among them         -> loss(r)

A cut alone is too dark a view of a small rank: what a trained adapter of that rank would do otherwise is lost.  A few steps give it back,
so they are taken for the ranks that matter, found by halving the interval between the smallest rank and the probe's.

    enough(r)  loss(r) - loss(R) <= max(1 standard error of this difference, min(0.01 loss, 0.05 gain)), and the same of 2 r

One held-out batch has no standard error: then the tolerance decides alone.

The gain is what the probe learnt: loss of the base - loss(R).  A hundredth of the loss is what nobody would notice, unless little was to
be learnt; then it is a twentieth of that.  The double is asked too, since the probe's own rank may have had too few steps to be the best.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic

from halfbyte.lora.truncate import Spectrum
from halfbyte.studies.rank_problem import HeldOut, Problem, adapt, held_out, put, spectra_of, train

OF_LOSS, OF_GAIN = 0.01, 0.05
RECOVER_SHARE = 0.4


@dataclass(frozen=True)
class Point:
    """One rank: held-out loss of the cut; where it was tried, the loss after recovering, how far that is from the loss of the rank that is
    needed, and the standard error of this distance, None with one held-out batch (nats a token)."""

    rank: int
    cut_loss: float
    loss: float | None = None
    gap: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Probe:
    """What the probe run measured; losses in nats a token on `tokens` held-out tokens; `needed` is the smallest rank that is enough."""

    rank: int
    steps: int
    recover_steps: int
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


def probe_run(problem: Problem, *, rank: int, steps: int, recover_steps: int, rate: float) -> Probe:
    """Stage C; the model carries no adapter of use afterwards."""
    layers = adapt(problem, rank)
    base = held_out(problem)
    began = monotonic()
    seen = train(problem, steps, rate)
    per_token = (monotonic() - began) / max(1, seen)
    parts = spectra_of(layers)
    cuts = {rank: held_out(problem).loss}
    for less in powers(rank)[:-1]:
        put(layers, parts, less)
        cuts[less] = held_out(problem).loss
    trial = Trial(problem, parts, recover_steps, rate)
    reached = trial.at(rank).loss
    tolerance = max(0.0, min(OF_LOSS * reached, OF_GAIN * (base.loss - reached)))
    needed = smallest(powers(rank), lambda less: trial.enough(less, rank, tolerance))
    while needed < rank and not trial.enough(needed, min(2 * needed, rank), tolerance):
        needed = min(2 * needed, rank)
    points = {less: trial.point(less, loss, needed) for less, loss in sorted(cuts.items())}
    best = trial.at(rank)
    return Probe(
        rank, steps, recover_steps, rate, base.loss, best.loss, sum(best.counts), tolerance, needed, points, monotonic() - began, per_token
    )  # fmt: skip


class Trial:
    """The cuts of one probe, each recovered once and remembered."""

    def __init__(self, problem: Problem, parts: Mapping[str, Spectrum], recover_steps: int, rate: float) -> None:
        self.problem, self.parts, self.recover_steps, self.rate = problem, parts, recover_steps, rate
        self.seen: dict[int, HeldOut] = {}

    def at(self, rank: int) -> HeldOut:
        """Held-out loss of the cut to `rank` after recovering."""
        if rank not in self.seen:
            put(adapt(self.problem, rank, start=False), self.parts, rank)
            if self.recover_steps:
                train(self.problem, self.recover_steps, self.rate)
            self.seen[rank] = held_out(self.problem)
        return self.seen[rank]

    def enough(self, rank: int, larger: int, tolerance: float) -> bool:
        """Whether `rank` does as well as `larger`, within the tolerance or, where it is known, the standard error of their difference."""
        gap, error = self.at(rank).gap(self.at(larger))
        return gap <= max(tolerance, error or 0.0)

    def point(self, rank: int, cut_loss: float, needed: int) -> Point:
        """What is known of a rank; its distance is to the rank that is needed."""
        if rank not in self.seen:
            return Point(rank, cut_loss)
        return Point(rank, cut_loss, self.seen[rank].loss, *self.seen[rank].gap(self.seen[needed]))


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
