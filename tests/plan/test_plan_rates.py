"""Rates of a machine: kept, read back, refused when damaged; the time of a step as a sum of parts, each with its own rate."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte import host
from halfbyte.errors import EnvironmentFault, StorageError
from halfbyte.plan import speed
from halfbyte.plan.hardware import CARDS
from halfbyte.plan.rates import LARGEST_LAYER, PEAKS, Curve, Rates, Widths, keep, nearest_rates, rates_path, read_all, threads_of, widths_of
from halfbyte.plan.setting import Setting
from halfbyte.shape import ModelShape
from tests.plan.asked import SMALL
from tests.plan.test_plan_memory import LLAMA_8B

SHAPE = ModelShape.from_config(SMALL)
WIDTHS = Widths(576, 576, 192, 1536, 64)
RATES = Rates(
    device="x", date="2026-11-02", dtype="bfloat16", threads=2, widths=WIDTHS, layer=Curve(((64.0, 1e11), (1024.0, 3e11))),
    trained=Curve(((64.0, 2e11),)), adapter=5e10, attention=Curve(((256.0, 4e10),)), head=Curve(((64.0, 2e11), (512.0, 4e11))), unpack=2e9,
    update={"float32": 1e9, "int8": 5e8, "master": 2.5e8},
)  # fmt: skip


def test_rates_come_back_as_they_were_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rates.json"
    assert read_all(path) == []
    other = replace(RATES, dtype="float32")
    keep(RATES, path)
    keep(other, path)
    keep(replace(RATES, unpack=3e9), path)
    assert read_all(path) == [other, replace(RATES, unpack=3e9)]
    assert [file.name for file in path.parent.iterdir()] == ["rates.json"]


def test_a_file_belongs_to_one_machine_and_its_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    here = rates_path()
    assert here.parent == tmp_path / "rates" and here == rates_path()
    monkeypatch.setattr("halfbyte.plan.rates.metadata.version", lambda name: "another")
    assert rates_path() != here


def _damaged() -> list[dict[str, Any]]:
    wrong: list[dict[str, Any]] = [{"version": 1}, {"entries": {}}, {"entries": [3]}]
    fields = {
        "layer": [[[64, 0]], [], [[64]], [[64, 1e9], [64, 2e9]], [[1024, 1e9], [64, 1e9]], 5, [["64", 1e9]]],
        "unpack": [0, -1, True, "fast", 1e300], "widths": [{}, {"hidden": 0}, None], "update": [{"float32": 1e9}, None],
        "threads": [0, 1.5], "device": ["", None], "date": [5],
    }  # fmt: skip
    return wrong + [{"field": name, "value": value} for name, values in fields.items() for value in values]


@pytest.mark.parametrize("change", _damaged())
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = keep(RATES, tmp_path / "rates.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    if "field" in change:
        values["entries"][0][change["field"]] = change["value"]
    else:
        values.update(change)
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(EnvironmentFault, match="E-ENV-401"):
        read_all(path)


def test_not_even_json(tmp_path: Path) -> None:
    for text in ("", "{", "[" * 100_000):
        (tmp_path / "rates.json").write_text(text, encoding="utf-8")
        with pytest.raises(EnvironmentFault, match="E-ENV-401"):
            read_all(tmp_path / "rates.json")


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match="E-STORE-401"):
        keep(RATES, tmp_path / "file" / "rates.json")


def test_a_curve_is_straight_over_the_logarithm_and_flat_beyond() -> None:
    curve = Curve(((10.0, 1.0), (1000.0, 5.0), (10_000.0, 4.0)))
    assert [curve.at(size) for size in (1, 10, 100, 1000, 10_000, 10**9)] == pytest.approx([1, 1, 3, 5, 4, 4])


def test_the_entry_with_the_nearest_widths_of_the_same_type_serves() -> None:
    wide = replace(RATES, widths=Widths(4096, 4096, 1024, 14336, 128))
    assert nearest_rates(SHAPE, "bfloat16", [wide, RATES], RATES.threads) is RATES
    assert nearest_rates(SHAPE, "float32", [wide, RATES], RATES.threads) is None
    assert nearest_rates(LLAMA_8B, "bfloat16", [wide, RATES], RATES.threads) is wide
    assert nearest_rates(SHAPE, "bfloat16", [wide, RATES], RATES.threads + 1) is None


def test_threads_of_a_run_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (threads_of("auto"), threads_of(5)) == (3, 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "10000")
    assert threads_of() == 1024  # the most that the setting takes
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_of("auto") == host.usable_cores()


def test_widths_are_the_models_own_or_halved_until_a_layer_is_small_enough() -> None:
    assert widths_of(SHAPE) == WIDTHS
    half = widths_of(LLAMA_8B)
    assert half.params <= LARGEST_LAYER < Widths(4096, 4096, 1024, 14336, 128).params
    assert half == Widths(2048, 2048, 512, 7168, 128) and half.queries % half.keys == 0


# By hand: a layer's matrices 3.54 M, 30 of them; 2 rows of 512 tokens; every part at its own rate.
def test_seconds_are_sums_of_parts_at_their_own_rates() -> None:
    setting = Setting(tokens=512, micro_batch_size=2, trained_share=0.25)
    matrices, tokens = SHAPE.params_of("linear"), 1024
    inside = 305_280 * 16
    attention = 3.5 * 2.0 * 30 * 2 * 512**2 * 576
    one = (
        (4 * tokens * matrices + 6 * tokens * inside) / 3e11 + 4 * 256 * 49152 * 576 / RATES.head.at(256)
        + attention / 4e10 + 2 * matrices / 2e9
    )  # fmt: skip
    found = speed.seconds_of_step(SHAPE, setting, RATES, 16)
    assert found == pytest.approx(8 * one + inside / 1e9)


def test_a_higher_rank_costs_what_its_own_rate_says() -> None:
    low, high = (speed.seconds_of_step(SHAPE, Setting(tokens=512, rank=rank), RATES, 1) for rank in (16, 64))
    more = 305_280 * (64 - 16)
    assert high - low == pytest.approx(6 * 512 * more / 5e10 + more / 1e9)


def test_full_has_rates_of_its_own() -> None:
    setting = Setting(tokens=512).with_method("full")
    work = speed.work_of(SHAPE, setting)
    expected = work.linear / 2e11 + work.head / RATES.head.at(512) + work.attention / 4e10 + SHAPE.total_params / 2.5e8
    assert speed.seconds_of_step(SHAPE, setting, RATES, 1) == pytest.approx(expected)
    assert speed.update_kind(replace(setting, state="int8")) == "int8" and speed.update_kind(Setting()) == "float32"


def test_what_a_policy_repeats_takes_time() -> None:
    keep_, mlp, whole = (
        speed.seconds_of_step(SHAPE, Setting(tokens=512, policy=policy), RATES, 1) for policy in ("keep", "recompute_mlp", "recompute")
    )
    assert keep_ < mlp < whole < 1.6 * keep_


def test_rows_of_many_lengths_count_by_their_mean_and_attention_by_the_square() -> None:
    """Padding is not computed: 100 and 300 tokens cost 200 each in the layers, and 50,000 in attention where 40,000 would be wrong."""
    rows = speed.Rows.of([100, 300])
    work = speed.work_of(SHAPE, Setting(tokens=300, micro_batch_size=4), rows)
    assert work.tokens == 832 and 832 % speed.ROUNDED_TO == 0  # 800, rounded up as on a CPU
    assert work.attention == 3.5 * 2.0 * 30 * 4 * 50_000 * 576 and work.segment == 250
    assert speed.work_of(SHAPE, Setting(tokens=300, micro_batch_size=4, device="gpu"), rows).tokens == 800


def test_peaks_are_of_cards_that_the_table_knows() -> None:
    assert set(PEAKS) <= set(CARDS) and all(5e13 < peak < 5e15 and math.isfinite(peak) for peak in PEAKS.values())
