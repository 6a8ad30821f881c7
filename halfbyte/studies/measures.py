"""The arithmetic of a comparison: mean, spread and interval over seeds, and how soon a curve reaches a loss.

    spread      sample standard deviation, sqrt(sum (x - mean)^2 / (n - 1))
    interval    half width of the 95 % confidence interval of the mean, t(0.975, n - 1) * spread / sqrt(n)

A spread of one value does not exist and is None, never 0.  Student's t is from the usual table (two-sided 95 %); beyond 30 values the
last entry is kept, which errs on the wide side.  Source: https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm
"""

import math
from collections.abc import Sequence

T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip
"""t(0.975, df) for df = 1, 2, ..."""

Curve = Sequence[tuple[float, float]]


def mean(values: Sequence[float]) -> float:
    """
    >>> mean([1.0, 2.0, 6.0])
    3.0
    """
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> float | None:
    """
    >>> spread([1.0, 2.0, 3.0]), spread([1.0])
    (1.0, None)
    """
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def interval(values: Sequence[float]) -> float | None:
    """
    >>> round(interval([1.0, 2.0, 3.0]), 3)
    2.484
    """
    deviation = spread(values)
    if deviation is None:
        return None
    return T_975[min(len(values) - 1, len(T_975)) - 1] * deviation / math.sqrt(len(values))


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """The mean of several curves at the steps that all of them have.

    >>> mean_curve([[(0, 3.0), (4, 1.0)], [(0, 5.0), (4, 2.0), (8, 1.0)]])
    [(0, 4.0), (4, 1.5)]
    """
    values = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(one) for one in values))) if values else []
    return [(step, mean([one[step] for one in values])) for step in shared]


def steps_to_reach(curve: Curve, target: float) -> float | None:
    """Where a curve of (step, loss) first comes down to `target`, on straight lines between its points; None where it never does.

    >>> steps_to_reach([(0, 3.0), (10, 2.0), (20, 1.0)], 1.5), steps_to_reach([(0, 3.0), (10, 2.0)], 1.5)
    (15.0, None)
    """
    for number, (step, loss) in enumerate(curve):
        if loss <= target:
            if number == 0:
                return float(step)
            before, higher = curve[number - 1]
            return before + (step - before) * (higher - target) / (higher - loss)
    return None
