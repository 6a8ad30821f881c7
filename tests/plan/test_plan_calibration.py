"""The real measurement on next to no widths, in a process of its own as `plan --calibrate` starts it."""

from pathlib import Path

import pytest

from halfbyte.errors import EnvironmentFault
from halfbyte.plan import rates
from halfbyte.plan.rates import UPDATES, Widths, measure, read_all
from halfbyte.shape import ModelShape
from tests.plan.asked import SMALL

TINY = {**SMALL, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512}


def test_a_calibration_is_kept_for_the_models_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.plan.calibration.SECONDS", 0.0)  # one run of each
    from halfbyte.plan import calibration

    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "UPDATED", 1 << 12)
    monkeypatch.setattr(calibration.devices, "set_threads", lambda count: None)
    shape = ModelShape.from_config(TINY)
    made = calibration.calibrate(rates.widths_of(shape), shape.vocab, shape.hidden, "float32")
    rates.keep(made)
    (found,) = read_all()
    assert found == made and found.widths == Widths(32, 32, 16, 64, 16) and found.dtype == "float32"
    assert [size for size, _ in found.layer.points] == [64, 256, 1024] and set(found.update) == set(UPDATES)
    assert all(rate > 1e4 for curve in (found.layer, found.trained, found.attention, found.head) for _, rate in curve.points)


def test_a_calibration_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "LONGEST_SECONDS", 120.0)
    with pytest.raises(EnvironmentFault, match="E-ENV-402"):
        measure(ModelShape.from_config(TINY), "no_such_type", 1)
