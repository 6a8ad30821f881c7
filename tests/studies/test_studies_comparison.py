"""The table: its arithmetic on outcomes written by hand, its four forms that must agree, and foreign text that stays text."""

import csv
import io
import json
import math
import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from halfbyte.config import load_config
from halfbyte.pages import comparison_plots
from halfbyte.studies import arms, comparison, comparison_files
from halfbyte.studies.arms import Arm
from halfbyte.studies.compare import Outcome
from tests.pages.test_pages_report import ALLOWED_TAGS, HOSTILE
from tests.studies import study_outcomes
from tests.studies.study_outcomes import judged, outcome, results, run

UNITS = re.compile(r"nats/token|tokens/s|\bMiB\b|\bGiB\b|\bKiB\b|%|\bs\b|\bmin\b|learning rate|rows|rougeL|steps")


def arm(made: dict[str, object], name: str) -> dict[str, object]:
    return next(one["values"] for one in made["arms"] if one["name"] == name)  # type: ignore[index, attr-defined, no-any-return]


def test_the_numbers_of_a_setting_over_its_seeds() -> None:
    made = comparison.numbers(results())
    full, qlora = arm(made, "full"), arm(made, "qlora")
    assert full["eval_loss"] == pytest.approx(2.0) and full["eval_loss_spread"] == pytest.approx(0.1)
    assert full["score"] == pytest.approx(0.6)
    assert full["score_interval"] == pytest.approx(4.303 * statistics.stdev([0.5, 0.6, 0.7]) / math.sqrt(3))
    assert full["general_before"] == 3.0 and full["general_after"] == pytest.approx(3.6) and full["forgotten"] == pytest.approx(0.6)
    assert qlora["peak_memory_bytes"] == 2**30 + 2  # the largest, not the mean
    assert qlora["against_reference"] == pytest.approx(0.2) and full["against_reference"] == 0.0
    shares = [2.4 / other - 1 for other in (1.9, 2.0, 2.1)]
    assert qlora["against_reference_interval"] == pytest.approx(4.303 * statistics.stdev(shares) / math.sqrt(3))
    assert full["against_reference_interval"] is None
    assert made["reference"] == "full" and made["target"] == "qlora"


def test_what_a_seed_does_to_both_is_no_doubt_about_their_difference() -> None:
    """The runs are paired: with the same distance in every seed the interval is nothing, however far the seeds lie apart."""
    one = results()
    apart = outcome("apart", [run([3.0, 2.0, 1.1 * loss]) for loss in (1.9, 2.0, 2.1)], [judged(1.0, None)] * 3)
    made = comparison.numbers(type(one)(one.study, one.rows, one.general, [*one.outcomes, apart]))
    assert arm(made, "apart")["against_reference"] == pytest.approx(0.1) and arm(made, "apart")["eval_loss_spread"] > 0.1  # type: ignore[operator]
    assert arm(made, "apart")["against_reference_interval"] == pytest.approx(0.0, abs=1e-9)
    line = next(line for line in comparison_files.lines(made) if line[0].startswith("95 % interval of that"))
    assert line[1] == "-" and line[-1] == "± 0.00 %" and line[3].startswith("± 14.9")
    for each in made["arms"]:
        each["values"].pop("against_reference_interval")  # as older comparisons are
    assert not [line for line in comparison_files.lines(made) if line[0].startswith("95 % interval")]


def test_what_a_seed_changes_is_said_for_each_setting() -> None:
    """A start that is not drawn is the same for all seeds; a comparison of before knows it by its calibrated base."""
    one = results()
    assert "order of the rows and start of the adapter, not which rows" in comparison_files.text(comparison.numbers(one))
    config = load_config(None, ["method=qlora", "lora.init=pissa", "data=rows.jsonl"])
    fixed = replace(one.outcomes[2], arm=Arm("fixed", {}, config))
    base = {"seconds": 9.0, "peak_memory_bytes": 1, "init": "calibrated"}
    based = [replace(one.outcomes[2], base=base), replace(one.outcomes[2], base={**base, "init": "default"})]
    assert [each["shared_start"] for each in comparison.numbers(replace(one, outcomes=based))["arms"]] == [True, False]
    made = comparison.numbers(replace(one, outcomes=[*one.outcomes, fixed]))
    assert [each["shared_start"] for each in made["arms"]] == [False, False, False, True]
    told = "order of the rows and start of the adapter (of fixed the order alone: one start for all seeds), not which rows"
    assert told in comparison_files.text(made)
    del made["arms"][3]["shared_start"]
    assert told not in comparison_files.text(made)
    made["arms"][3]["values"]["preparation_seconds"] = 9.0
    assert told in comparison_files.text(made)
    made["arms"] = [made["arms"][0], made["arms"][3]]
    assert "order of the rows alone, not which rows" in comparison_files.text(made)


def test_steps_to_the_targets_loss_seed_against_the_same_seed() -> None:
    made = comparison.numbers(results())
    # full comes from 3.0 to 2.1 in ten steps and passes 2.4 on the way; qlora reaches its own end at its end
    assert arm(made, "full")["steps_to_target"] == pytest.approx(10 * 0.6 / 0.9)
    assert arm(made, "full")["steps_to_target_share"] == pytest.approx(0.5 * 0.6 / 0.9)
    assert arm(made, "lora")["steps_to_target"] == pytest.approx(5.0)
    assert arm(made, "qlora")["steps_to_target_share"] == 1.0
    slow = outcome("slow", [run([3.0, 2.3, 2.3]), run([3.0, 2.3, 2.3]), run([3.0, 2.5, 2.5])], [judged(1.0, None)] * 3)
    one = results()
    with_slow = comparison.numbers(type(one)(one.study, one.rows, one.general, [*one.outcomes, slow]))
    assert arm(with_slow, "slow")["steps_to_target"] is None  # its third seed never comes there


def test_without_full_and_qlora_there_is_a_reference_and_no_target() -> None:
    made = comparison.numbers(results(names=("a", "b", "c")))
    assert made["reference"] == "a" and made["target"] is None
    assert "steps to" not in comparison_files.text(made) and "against a" in comparison_files.text(made)


def test_a_setting_that_did_not_fit_is_told_and_the_others_stand() -> None:
    one = results()
    broken = Outcome(one.outcomes[0].arm, "does not fit", None, [], [], "needed 90 GiB")
    made = comparison.numbers(type(one)(one.study, one.rows, one.general, [broken, *one.outcomes[1:]]))
    text = comparison_files.text(made)
    assert "does not fit" in text and "needed 90 GiB" in text and made["reference"] == "lora"
    assert csv_rows(made)["full"]["outcome"] == "does not fit" and csv_rows(made)["full"]["seconds"] == ""


def csv_rows(made: dict[str, object]) -> dict[str, dict[str, str]]:
    return {row["setting"]: row for row in csv.DictReader(io.StringIO(comparison_files.csv_text(made)))}


def test_text_json_csv_and_page_say_the_same(tmp_path: Path) -> None:
    page = study_outcomes.write_page(tmp_path)
    made = json.loads((tmp_path / "comparison.json").read_text())
    text, rows = (tmp_path / "comparison.txt").read_text(), csv_rows(made)
    assert (tmp_path / "comparison.csv").read_text() == comparison_files.csv_text(made)
    for number, one in enumerate(made["arms"], start=1):
        values = {**one["values"], "delivered": one["values"]["adapter_bytes"] or one["values"]["model_bytes"]}
        for measure in comparison_files.MEASURES:
            if values.get(measure.key) is None:
                continue
            for column, key in measure.columns:
                found = rows[one["name"]][column]
                assert (float(found) if found else None) == values[key]
            cell = measure.write(values)
            assert any(line[number] == cell for line in comparison_files.lines(made))
            assert cell in text and cell in page.read_text()


def test_every_number_has_its_unit_its_setting_and_the_word_estimate_where_it_is_one() -> None:
    made = comparison.numbers(results())
    for line in comparison_files.lines(made):
        for cell in line[1:]:
            assert cell == "-" or UNITS.search(line[0]) or UNITS.search(cell) or cell[-1] == "x", line
    text = comparison_files.text(made)
    assert "(estimate)" in next(line for line in text.splitlines() if line.startswith("steps to qlora's"))
    resting_on = (
        "800 to train on, 100 held out", "16 rows a step", "optimizer steps", "3 (0, 1, 2)", "300 of the rows", "2 threads", "40 rows",
    )  # fmt: skip
    assert [words for words in resting_on if words not in text] == []
    names = [name for measure in comparison_files.MEASURES for name, _ in measure.columns]
    assert len(set(names)) == len(names)


def test_one_seed_says_that_it_says_nothing_about_the_spread() -> None:
    one = results()
    alone = [Outcome(each.arm, each.status, each.sweep, each.runs[:1], each.judged[:1]) for each in one.outcomes]
    made = comparison.numbers(type(one)(type(one.study)(one.study.arms, seeds=1), one.rows, one.general, alone))
    assert arm(made, "full")["eval_loss_spread"] is None and "One seed" in comparison_files.text(made)
    assert "2.4000" in comparison_files.text(made) and "2.4000 ±" not in comparison_files.text(made)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("word", HOSTILE)
def test_no_text_from_outside_becomes_markup(tmp_path: Path, word: str) -> None:
    seen, plain = Tags(), Tags()
    page = study_outcomes.write_page(tmp_path, word).read_text()
    seen.feed(page)
    (tmp_path / "plain").mkdir()
    plain.feed(study_outcomes.write_page(tmp_path / "plain", "plain").read_text())
    assert [tag for tag, _ in seen.tags] == [tag for tag, _ in plain.tags] and {tag for tag, _ in seen.tags} <= ALLOWED_TAGS
    assert not any(name.startswith("on") or name in ("href", "action") for _, attributes in seen.tags for name in attributes)
    assert "http" not in [(a.get("src") or "")[:4] for _, a in seen.tags]
    if word.isprintable() and "&" not in word:
        assert word in seen.text
    assert "\x1b" not in (tmp_path / "comparison.txt").read_text()


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\tx", "a\n"])
def test_no_name_of_a_setting_is_a_formula_for_a_spreadsheet(name: str) -> None:
    assert not arms.NAME.match(name)


def test_the_pictures_are_pngs_of_what_they_are_given() -> None:
    curves = {"$x_1$": [[[0, 3.0], [5, 2.0]], [[0, 3.1], [5, 2.2], [9, 1.0]]], "b": [[[0, 3.0]]]}
    first = comparison_plots.loss_curves(curves)
    assert first[:8] == b"\x89PNG\r\n\x1a\n" and first == comparison_plots.loss_curves(curves)
    assert first != comparison_plots.loss_curves({"b": [[[0, 3.0]]]}) and comparison_plots.loss_curves({})[:4] == b"\x89PNG"
    points = {"a": (2**30, 2.0, 0.1), "b": (2**29, 2.1, None)}
    assert comparison_plots.loss_against_memory(points) != comparison_plots.loss_against_memory({"a": (2**30, 2.0, 0.1)})


def test_times_are_left_out_where_equal_studies_are_compared() -> None:
    made = comparison.numbers(results())
    other = results()
    other.outcomes[1].runs[0]["seconds"] = 1.0
    other.outcomes[1].runs[0]["peak_memory_bytes"] = 1
    assert comparison.numbers(other) != made
    assert comparison.without_times(comparison.numbers(other)) == comparison.without_times(made)
    other.outcomes[1].runs[0]["last_eval_loss"] = 1.0
    assert comparison.without_times(comparison.numbers(other)) != comparison.without_times(made)


def test_a_classifiers_loss_is_that_of_a_row() -> None:
    made = comparison.numbers(study_outcomes.results())
    assert "held-out loss, nats/token" in comparison_files.text(made)
    made["setting"]["per"] = "row"
    assert "held-out loss, nats/row" in comparison_files.text(made) and "nats/token" not in comparison_files.text(made)
    columns = comparison_files.csv_text(made).splitlines()[0]
    assert "held_out_loss_nats_per_row" in columns and "nats_per_token" not in columns


def test_rows_are_counted_as_the_runs_saw_them_and_what_they_said_of_them_is_said_once() -> None:
    one = results()
    for each in one.outcomes:
        for trained in each.runs:
            trained |= {"train_rows": 16, "eval_rows": 2, "data_notes": ["20 of 36 rows exceed 57 tokens; dropped"]}
        for seed in each.judged:
            seed |= {"general_rows": 1, "general_left_out": 9, "score_rows": 2}
    made = comparison.numbers(one)
    text = comparison_files.text(made)
    assert "16 to train on, 2 held out" in text and "2 rows)" in text
    assert text.count("20 of 36 rows exceed 57 tokens") == 1 == text.count("9 of 10 texts")
    assert json.loads(json.dumps(made))["setting"]["train_rows"] == 16


def test_a_rate_at_the_edge_of_its_sweep_is_noted() -> None:
    one = results()
    assert "may lie beyond" in (text := comparison_files.text(comparison.numbers(one))) and "lora: its learning rate is the lowest" in text
    swept = {"points": [{"rate": rate, "before": 3.0, "after": after} for rate, after in ((1e-4, 2.5), (3e-4, 2.0), (1e-3, 2.2))],
             "reasons": ["", "", ""], "rate": 3e-4, "rows": 300, "steps": 19}  # fmt: skip
    inside = [replace(each, sweep=swept) for each in one.outcomes]
    assert "may lie beyond" not in comparison_files.text(comparison.numbers(replace(one, outcomes=inside)))
