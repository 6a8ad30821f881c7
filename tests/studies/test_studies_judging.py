"""What is judged is found to be possible before the training, belongs to each judgement, and ends where the model's limit does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config import load_config
from halfbyte.errors import ConfigError, DataError
from halfbyte.studies import judging, rows, runs
from halfbyte.studies.arms import arms_of
from halfbyte.studies.compare import Score, Study
from halfbyte.studies.judging import Asked, Reader
from tests.end_to_end import tiny_world

NONE = Asked(None, None, 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees 256 tokens, and rows of about 110, 200 and 300 of them."""
    folder = tmp_path_factory.mktemp("judging")
    tiny_world.write_model(folder / "tiny")
    made = [{"prompt": "a" * length, "completion": "on"} for length in (60, 150, 250)]
    tiny_world.write_rows(folder / "rows.jsonl", made)
    return folder


def reader(world: Path, *more: str) -> Reader:
    return Reader(load_config(None, [f"model={world / 'tiny'}", f"data={world / 'rows.jsonl'}", "method=lora", *more]))


def test_an_answer_ends_where_the_models_limit_does(world: Path) -> None:
    """# T72 a long prompt at the end of a study ends no study: its answer is shorter, and it is said of how many."""
    from halfbyte.evaluate.opened import open_model
    from halfbyte.evaluate.rows import answer_rows

    opened = open_model(world / "tiny")
    found = answer_rows(opened, world / "rows.jsonl", max_rows=3, max_new_tokens=96, to_limit=True)
    assert len(found.answers) == len(found.prompts) == 2 and found.left_out == 1 and found.short == 1
    assert "a" * 150 in found.prompts[1] and found.references == ["on\n", "on\n"]
    with pytest.raises(ConfigError, match="E-CONF-062"):
        answer_rows(opened, world / "rows.jsonl", max_new_tokens=96)


@pytest.mark.parametrize(
    "lines,code", [(['{"text": ""}', '{"text": "a lamp"}'], "E-DATA-060"), ([json.dumps({"text": "a" * 300})], "E-DATA-061"),
                   (['{"text": "a", "label": "b"}', '{"text": "c", "label": "d"}'], "E-DATA-092")]
)  # fmt: skip
def test_general_text_that_cannot_be_judged_is_refused_at_once(lines: list[str], code: str, world: Path, tmp_path: Path) -> None:
    """# T72 an empty text, texts over the model's limit, rows of a classifier."""
    general = tmp_path / "general.jsonl"
    general.write_text("\n".join(lines) + "\n")
    config = load_config(None, [f"model={world / 'tiny'}", "data=rows.jsonl", "method=lora"])
    with pytest.raises(DataError, match=code):
        judging.check(reader(world), replace(NONE, general=general), world / "rows.jsonl", [("lora", config)])


def test_pieces_of_prose_are_halved_until_the_model_can_see_them(world: Path, tmp_path: Path) -> None:
    at = reader(world)
    path, words = rows.general_text(tmp_path, None, at.fits)
    pieces = [json.loads(line)["text"] for line in path.read_text().split("\n") if line]
    assert all(at.fits(piece) for piece in pieces) and len(pieces) == 40 and f"of {len(pieces[0])} characters" in words
    before = path.stat().st_mtime_ns
    assert rows.general_text(tmp_path, None, at.fits) == (path, words) and path.stat().st_mtime_ns == before
    assert "of 800 characters" in rows.general_text(tmp_path / "other", None, lambda piece: True)[1]


def test_settings_judged_by_other_held_out_rows_are_refused(world: Path, tmp_path: Path) -> None:
    """# T72 a template of its own makes rows longer, and some fall out."""
    (tmp_path / "long.jinja").write_text(tiny_world.CHATML.replace("<|im_start|>", "<|im_start|>" + "b" * 60))
    words = [f"model={world / 'tiny'}", "data=rows.jsonl", "method=lora"]
    own, other = load_config(None, words), load_config(None, [*words, f"model.template={tmp_path / 'long.jinja'}"])
    judging.check(reader(world), NONE, world / "rows.jsonl", [("a", own), ("b", own)])
    with pytest.raises(ConfigError, match=r"E-CONF-424(.*\n)+.*a by 2, b by 1"):
        judging.check(reader(world), NONE, world / "rows.jsonl", [("a", own), ("b", other)])


def study(**changes: Any) -> Study:
    return Study(tuple(arms_of(None, [], {"data": "rows.jsonl"}, methods=["lora"])), **changes)


def test_what_is_judged_is_no_part_of_what_a_study_is() -> None:
    """# T71 after the training another text, other counts, none: the runs stay."""
    first = study().identity()
    assert first == study(general="none").identity() == study(samples=0).identity() == study(score=Score("rougeL", 4, 8)).identity()
    assert first != study(seeds=2).identity() and first != study(sweep_rows=0).identity()


def folder_with_a_judgement(path: Path, general: Path) -> None:
    order = {"run": "x", "threads": 1, "before": True, "general": str(general), "held_out": "y", "score": None, "samples": 3}
    place = path / "judged" / "lora"
    place.mkdir(parents=True)
    runs.write_json(place / "seed-0.order.json", {**order, "general_sha256": judging.digests_of(str(general))[str(general)]})
    runs.write_json(place / "seed-0.json", {"general_after": 3.0})


def test_a_judgement_is_kept_while_the_same_is_asked(tmp_path: Path) -> None:
    """# T71 the same file with another text is asked again."""
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "one"}\n')
    folder_with_a_judgement(tmp_path / "out", general)

    def again(text: str) -> None:
        raise RuntimeError(text)

    at, run = runs.Folder(tmp_path / "out", 0, again), {"threads": 1}
    assert judging.judged(at, Asked(general, None, 3), "lora", 0, run) == {"general_after": 3.0}
    assert judging.judged(at, NONE, "lora", 0, run) == {}
    for other in (Asked(general, None, 2), Asked(None, None, 3), Asked(general, {"metric": "rougeL", "rows": 2, "max_new_tokens": 4}, 3)):
        with pytest.raises(RuntimeError, match="judging lora"):
            judging.judged(at, other, "lora", 0, run)
    general.write_text('{"text": "two"}\n')
    with pytest.raises(RuntimeError, match="judging lora"):
        judging.judged(at, Asked(general, None, 3), "lora", 0, run)


def test_what_was_left_out_of_the_judging_is_said_once() -> None:
    one = {"general_rows": 1, "general_left_out": 9, "asked_left_out": 2, "asked_short": 3}
    said = judging.notes([one, {**one, "asked_short": 0}])
    assert len(said) == 3 and "9 of 10 texts" in said[0] and "2 of the held-out rows" in said[1] and "3 had room" in said[2]
    assert judging.notes([{"general_rows": 4, "general_left_out": 0, "asked_short": 0}, {}]) == []


def test_a_classifier_is_given_no_general_text(world: Path, tmp_path: Path) -> None:
    """It writes none, so the page names none."""
    from halfbyte.studies import compare

    data = tmp_path / "labels.jsonl"
    data.write_text("".join(json.dumps({"text": f"lamp {n}", "label": "on" if n % 2 else "off"}) + "\n" for n in range(30)))
    made = arms_of(None, ["model.task=sequence-classification"], {"model": str(world / "tiny"), "data": str(data)}, methods=["lora"])
    rows.prepare(tmp_path / "out", made[0].config, sweep_rows=0)
    assert compare._asked(Study(tuple(made), samples=0), tmp_path / "out") == (NONE, "")
    assert not (tmp_path / "out" / "rows" / "general.jsonl").exists()


def test_a_short_sweep_counts_the_rows_that_its_steps_saw(tmp_path: Path) -> None:
    """One step of eight rows saw eight of the 24."""
    from halfbyte.studies import learning_rate

    config = load_config(None, ["data=rows.jsonl", "method=lora", "train.max_steps=1", "train.global_batch_size=8"])
    for name, rate, loss in (("x1", 1e-3, 2.0), ("x0.3", 3e-4, 2.5), ("x3", 3e-3, 2.5)):
        kept = dict.fromkeys(runs.NEEDED, 1) | {"rate": rate, "first_eval_loss": 3.0, "last_eval_loss": loss, "train_rows": 24, "jobs": 1}
        (tmp_path / "out" / "points").mkdir(parents=True, exist_ok=True)
        runs.write_json(tmp_path / "out" / "points" / f"{name}.json", {"status": "finished", **kept})
    at = runs.Folder(tmp_path / "out", 0, lambda text: None)
    found = learning_rate.find(at, "points", config, rows=tmp_path / "a", count=24, held_out=tmp_path / "b", planned_rows=24)
    assert (found.steps, found.rows, found.rate, found.edge) == (1, 8, 1e-3, "")


def test_what_cuts_cost_a_classifier_is_told_per_row() -> None:
    from halfbyte.studies.rank_adapter import Cost, Costs
    from halfbyte.studies.rank_text import costs_text

    found = Costs(1.0, 2.0, 20, 18, (Cost("rank 2", 100, 0.1, 1.1, 0.01, 1.2),))
    assert "nats/row on 20 rows;" in costs_text(found, "row") and "18 other rows" in costs_text(found, "row")
    assert "nats/token on 20 tokens of these rows;" in costs_text(found) and "  squared norm left out  " in costs_text(found)
