"""The learning rate of every step in closed form."""

import math

import pytest

from halfbyte.config.optim import OptimConfig
from halfbyte.errors import ConfigError
from halfbyte.optim.schedules import SCHEDULES, share_at, warmup_steps


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize(("total", "warmup"), [(1, None), (1, 0), (2, None), (2, 1), (7, None), (7, 0), (7, 5), (100, None), (100, 5)])
def test_rates_equal_the_closed_form(schedule: str, total: int, warmup: int | None) -> None:
    """T45."""
    config = OptimConfig(schedule=schedule, warmup_steps=warmup, final_lr_share=0.1)
    first = min(math.ceil(0.03 * total), total - 1) if warmup is None else warmup
    for step in range(1, total + 1):
        if step <= first:
            expected = step / first
        else:
            x = (step - first) / (total - first)
            expected = {"constant": 1.0, "linear": 1 - 0.9 * x, "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2}[schedule]
        assert share_at(config, step, total) == pytest.approx(expected, rel=1e-12)


def test_no_step_trains_at_rate_zero_and_the_last_is_at_the_final_share() -> None:
    """T45: the first step of a warm-up is not lost, and the schedule ends when the run does."""
    for schedule in ("linear", "cosine"):
        config = OptimConfig(schedule=schedule, final_lr_share=0.25, warmup_steps=10)
        shares = [share_at(config, step, 50) for step in range(1, 51)]
        assert min(shares) == 0.1
        assert max(shares) == shares[9] == 1.0
        assert shares[-1] == pytest.approx(0.25)


def test_warmup_acts_under_the_constant_schedule_too() -> None:
    """T44."""
    assert share_at(OptimConfig(schedule="constant", warmup_steps=4), 1, 10) == 0.25


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        warmup_steps(OptimConfig(warmup_steps=10), 10)
    assert caught.value.code == "E-CONF-301"
