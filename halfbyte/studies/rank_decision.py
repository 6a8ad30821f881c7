"""From what the stages found to one rank, with the reason in words.

    a probe ran       r = what it needed, doubled where the planned run is more than LONG times the probe; at least the rank of capacity
    else              r = rank of capacity (at least FLOOR, a value to start from when nothing was trained)
    only a gradient   r = its median rank
    both              the gradient moves capacity's guess: one step down where its median is below r / 4, one step up where r directions
                      explain less than half; it does not move what a probe has measured

The rank of a first gradient says little about what a run will use, therefore its small part; its shares choose between modules.
Ranks are powers of two.  A long run uses more directions than a short probe shows; a probe as
long as the run needs no such allowance.  The result is held to what memory allows.  `benchmarks/bench_rank.py` tries the rule on models
whose right rank is known.
"""

from dataclasses import dataclass

from halfbyte.studies.rank_capacity import Capacity
from halfbyte.studies.rank_gradient import Gradient
from halfbyte.studies.rank_probe import Probe
from halfbyte.units import count_text

FLOOR = 8
LONG = 4
MOST = 1024


@dataclass(frozen=True)
class Decision:
    """The rank, the stage that decided, and the reasons in the order they were applied."""

    rank: int
    stage: str
    reasons: tuple[str, ...]


def power_of_two(value: float) -> int:
    """The next power of two, at least 1.

    >>> power_of_two(5), power_of_two(8), power_of_two(0.3)
    (8, 8, 1)
    """
    return 1 << max(0, (max(1, -int(-value // 1)) - 1).bit_length())


def decide(
    capacity: Capacity | None, gradient: Gradient | None, probe: Probe | None, *, planned_steps: int, most: int = MOST
) -> Decision:
    """The recommended rank; at least one stage must be given, `most` is what memory holds."""
    rank, stage, reasons = _start(capacity, gradient, probe, planned_steps)
    if gradient is not None and probe is None and capacity is not None:
        if gradient.median_rank < rank / 4 and rank > 1:
            rank //= 2
            reasons.append(f"gradient: half of its energy lies in modules of rank {gradient.median_rank} or less, one step down to {rank}")
        elif gradient.explained(rank) < 0.5:
            rank *= 2
            reasons.append(f"gradient: {rank // 2} directions explain less than half of what repeats, one step up to {rank}")
    if rank > most:
        rank, stage = 1 << (max(1, most).bit_length() - 1), "memory" if most < MOST else "limit"
        reasons.append(f"half of the free memory holds rank {most} at most (estimate)" if most < MOST else f"{MOST} is the most")
    return Decision(rank, stage, tuple(reasons))


def _start(capacity: Capacity | None, gradient: Gradient | None, probe: Probe | None, planned_steps: int) -> tuple[int, str, list[str]]:
    if probe is not None:
        long = planned_steps > LONG * probe.steps
        rank, stage = power_of_two(probe.needed * (2 if long else 1)), "probe"
        reasons = [f"probe: rank {probe.needed} is enough after {probe.steps} steps"
                   + (f", doubled to {rank} for a run of {planned_steps} steps" if long else "")]  # fmt: skip
        if probe.needed == probe.rank:
            reasons.append(f"probe: no smaller rank than its own {probe.rank} was enough; the need may be larger")
        if capacity is not None and power_of_two(capacity.rank) > rank:
            rank, stage = power_of_two(capacity.rank), "capacity"
            reasons.append(f"capacity: the rows hold more bits than that, rank {rank}")
        return rank, stage, reasons
    if capacity is not None:
        rank = max(FLOOR, power_of_two(capacity.rank))
        reasons = [f"capacity: {count_text(capacity.bits)} bits (estimate) take rank {capacity.rank}"
                   + (f"; {FLOOR} is the least without a probe" if rank > power_of_two(capacity.rank) else "")]  # fmt: skip
        return rank, "capacity", reasons
    assert gradient is not None
    rank = power_of_two(gradient.median_rank)
    return rank, "gradient", [f"gradient: half of its energy lies in modules of rank {gradient.median_rank} or less"]
