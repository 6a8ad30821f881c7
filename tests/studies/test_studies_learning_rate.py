"""Which rate is chosen and why: the rules on points, and on real short runs of a tiny model."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from halfbyte.config import load_config
from halfbyte.errors import CheckpointError, ConfigError, DoesNotFitError
from halfbyte.evaluate.opened import locate
from halfbyte.studies import learning_rate
from halfbyte.studies.learning_rate import Found, Point, judge, next_rate
from halfbyte.studies.rows import prepare, python_prose, spread_evenly
from halfbyte.studies.runs import drop_weights, require_same
from tests.end_to_end import tiny_world

ROOT = Path(__file__).resolve().parents[2]


def points(*after: float | None, before: float = 3.0) -> list[Point]:
    return [Point(10.0 ** (number - 5), before, loss) for number, loss in enumerate(after)]


def chosen(*after: float | None) -> float | None:
    best = judge(points(*after))[1]
    return best.after if best else None


def test_the_highest_stable_rate_is_the_one_with_the_lowest_loss() -> None:
    assert chosen(2.5, 2.0, 1.8) == 1.8
    assert chosen(2.5, 2.0, 2.1) == 2.0
    assert chosen(2.5, 2.0, 3.1) == 2.0
    assert judge(points(2.0, 2.0))[1] == points(2.0, 2.0)[1]  # equal: the higher rate


def test_what_lies_above_an_unstable_rate_is_out_though_its_loss_is_low() -> None:
    """A run that survived by luck at a rate above one that diverged is not stable."""
    for broken in (None, math.nan, math.inf):
        reasons, best = judge(points(2.5, broken, 1.0))
        assert best is not None and best.after == 2.5
        assert reasons[1:] == ["out: diverged", "out: a lower rate is unstable"]


def test_a_rate_that_is_no_better_rules_out_itself_alone() -> None:
    """A rate too low to move the loss ends a hair above it; the rates above are as good as they are."""
    reasons, best = judge(points(3.0001, 2.9, 2.5))
    assert best is not None and best.after == 2.5
    assert reasons == ["out: worse than before the training", "stable, not the lowest",
                       "chosen: the lowest held-out loss, at the highest rate tried"]  # fmt: skip
    assert next_rate(points(3.0001, 2.9, 2.5)) == pytest.approx(3e-3)
    assert chosen(2.5, 3.5, 1.0) == 1.0


def test_where_none_is_better_the_next_rate_is_above_those_that_moved_nothing_and_below_the_others() -> None:
    assert next_rate(points(3.0001, 3.0003, 3.0002)) == pytest.approx(3e-3)
    assert next_rate(points(3.1, 3.5, 4.0)) == next_rate(points(3.0001, 3.0002, None)) == pytest.approx(1e-5 / 3, rel=1e-2)


def test_no_stable_rate_is_no_choice() -> None:
    assert judge(points(None, None))[1] is None
    assert judge(points(3.4, 3.2))[1] is None


def test_every_point_has_its_reason() -> None:
    reasons, _ = judge(points(2.5, 2.7, 2.0, None))
    assert reasons == [
        "stable, not the lowest", "out: worse than its lower neighbour 1e-05", "chosen: the lowest held-out loss", "out: diverged",
    ]  # fmt: skip
    assert judge(points(3.2))[0] == ["out: worse than before the training"]


def test_the_edge_is_left_once_more_and_five_points_are_the_end() -> None:
    assert next_rate(points(2.5, 2.0, 1.8)) == pytest.approx(3e-3)
    assert next_rate(points(1.8, 2.0, 2.5)) == pytest.approx(1e-5 / 3, rel=1e-2)
    assert next_rate(points(2.5, 1.8, 2.0)) is None
    assert next_rate(points(2.5, 2.4, 2.3, 2.2, 2.1)) is None
    assert next_rate(points(None, None, None)) == pytest.approx(1e-5 / 3, rel=1e-2)  # all unstable: lower
    assert next_rate([Point(0.2, 3.0, 2.5), Point(0.6, 3.0, 2.0)]) is None  # no rate above 1


def test_a_chosen_rate_at_the_edge_of_what_was_tried_is_called_so() -> None:
    """# T0 a better one may lie beyond; above one that diverged nothing does."""
    for losses, edge in (((2.5, 2.0, 1.8), "highest"), ((1.8, 2.0, 2.5), "lowest"), ((2.5, 1.8, 2.0), ""), ((2.5, 1.8, None), "")):
        tried = points(*losses)
        reasons, best = judge(tried)
        assert best is not None
        found = Found(tried, reasons, best.rate, 16, 2)
        assert found.edge == edge and found.as_dict()["edge"] == (edge or None)
        assert any(f"at the {edge} rate tried" in reason for reason in reasons) is bool(edge)


def test_a_found_rate_survives_json() -> None:
    found = Found(points(2.5, None), judge(points(2.5, None))[0], 1e-5, 16, 2)
    again = json.loads(json.dumps(found.as_dict()))
    assert Found([Point(**one) for one in again["points"]], *(again[name] for name in ("reasons", "rate", "rows", "steps"))) == found
    assert found.lines()[1][2] == "not finite"


def test_the_rates_rows_are_apart_from_what_judges_the_comparison(tmp_path: Path) -> None:
    """# T72 (the selection must not see what it is judged by) sweep rows and their judges are training rows, and disjoint."""
    data = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(60))
    config = load_config(None, [f"data={data}"])
    found = prepare(tmp_path, config, sweep_rows=20)
    parts = {name: (tmp_path / "rows" / f"{name}.jsonl").read_text().splitlines() for name in
             ("train", "held-out", "sweep-train", "sweep-held-out")}  # fmt: skip
    assert {name: len(rows) for name, rows in parts.items()} == {name: found[name] for name in parts}
    assert found["train"] + found["held-out"] == 60 and found["sweep-train"] == 20 and found["sweep_apart"]
    assert set(parts["sweep-train"]) | set(parts["sweep-held-out"]) <= set(parts["train"])
    assert not set(parts["sweep-train"]) & set(parts["sweep-held-out"])
    assert not set(parts["train"]) & set(parts["held-out"])


def test_rows_are_written_as_they_came(tmp_path: Path) -> None:
    """Training rows are data: what looks like a secret in them is not blanked, letters are not changed."""
    made = [{"prompt": f"{n} token=abc12345 ünï\u2028", "completion": "hf_abcdefghijklmNopqrstuv"} for n in range(30)]
    data = tiny_world.write_rows(tmp_path / "rows.jsonl", made)
    prepare(tmp_path, load_config(None, [f"data={data}"]), sweep_rows=5)
    with (tmp_path / "rows" / "train.jsonl").open(encoding="utf-8", newline="\n") as file:
        kept = [json.loads(line) for line in file]
    assert kept and all(row in made for row in kept)


def test_rows_are_spread_over_all_of_them() -> None:
    assert spread_evenly(range(10), 10) == spread_evenly(range(10), 99) == list(range(10))
    assert spread_evenly(range(1000), 4) == [0, 250, 500, 750]
    assert len(python_prose()) == 40 and all(len(piece) == 800 for piece in python_prose())


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], "subprocess.CompletedProcess[str]"]:
    """`halfbyte lr` on a tiny model, from a rate so high that the sweep has to look both ways."""
    folder = tmp_path_factory.mktemp("lr")
    tiny_world.write_model(folder / "tiny")
    data = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(64))
    words = ["lr", "--model", str(folder / "tiny"), "--data", str(data), "--method", "lora", "--out", str(folder / "out"), "--rows", "16",
             "lora.rank=2", "train.global_batch_size=8", "train.threads=1", "optim.learning_rate=0.3"]  # fmt: skip
    return folder, words, run(words)


def run(words: list[str]) -> "subprocess.CompletedProcess[str]":
    environment = dict(os.environ, OMP_NUM_THREADS="1", NO_COLOR="1", HF_HUB_OFFLINE="1", HALFBYTE_KERNELS="reference",
                       PYTHONPATH=str(ROOT))  # fmt: skip
    command = [sys.executable, "-m", "halfbyte", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000, check=False)


@pytest.mark.slow
def test_real_runs_are_tried_judged_and_kept(swept: tuple[Path, list[str], "subprocess.CompletedProcess[str]"]) -> None:
    folder, words, done = swept
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "out" / "learning-rate.json").read_text())
    rates = [point["rate"] for point in found["points"]]
    assert 3 <= len(rates) <= 5 and rates == sorted(rates) and {0.09, 0.3, 0.9} <= set(rates)
    made = [Point(**point) for point in found["points"]]
    assert judge(made)[0] == found["reasons"] and found["rate"] == judge(made)[1].rate  # type: ignore[union-attr]
    assert f"optim.learning_rate={found['rate']:.3g}" in done.stdout and "held-out loss" in done.stdout
    assert not list((folder / "out" / "points").glob("*/adapter"))
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "points").glob("*.json")}
    again = run(words)
    assert again.returncode == 0 and again.stdout.splitlines()[-6:] == done.stdout.splitlines()[-6:]
    assert {path: path.stat().st_mtime_ns for path in (folder / "out" / "points").glob("*.json")} == before
    other = run([*words, "lora.alpha=8"])
    assert other.returncode == 4 and "other settings" in other.stderr


def test_a_short_run_is_one_pass_and_judged_at_its_end(tmp_path: Path) -> None:
    config = load_config(None, ["data=rows.jsonl", "train.epochs=3", "train.global_batch_size=16", "method=lora"])
    made = learning_rate.short(config, tmp_path / "a", 300, tmp_path / "b", 1e-3)
    assert (made.train.epochs, made.train.max_steps, made.optim.learning_rate) == (1.0, None, 1e-3)
    assert made.train.eval_every_steps is not None and made.train.save_every_steps is None
    few = load_config(None, ["data=rows.jsonl", "train.max_steps=5"])
    assert learning_rate.short(few, tmp_path, 300, tmp_path, "auto").train.max_steps == 5
    many = load_config(None, ["data=rows.jsonl", "train.max_steps=500"])
    assert learning_rate.short(many, tmp_path, 300, tmp_path, "auto").train.max_steps is None


def test_a_sweep_that_did_not_fit_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may be free by then; what diverged is kept, for it would diverge again."""
    for name, value in (("HALFBYTE_KERNELS", "reference"), ("PYTHONPATH", str(ROOT)), ("HALFBYTE_FAULTS", "train.micro_batch:memory:*")):
        monkeypatch.setenv(name, value)
    data = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(24))
    model = tiny_world.write_model(tmp_path / "tiny")
    config = load_config(None, [f"model={model}", f"data={data}", "method=lora", "lora.rank=2", "train.threads=1",
                                "train.global_batch_size=1", "optim.warmup_steps=10", "data.eval_rows=4"])  # fmt: skip
    with pytest.raises(DoesNotFitError, match="E-FIT-410"):
        learning_rate.alone(config, tmp_path / "out", 8, lambda text: None)
    told = load_config(tmp_path / "out" / "points" / "x1.yaml").optim
    assert told.warmup_steps is None and told.warmup_share == 0.5  # 10 of the run's 20 steps, not 10 of these 8
    assert (tmp_path / "out" / "points" / "x1.log").is_file() and not (tmp_path / "out" / "points" / "x1.json").exists()


def test_a_sweep_needs_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="E-CONF-419"):
        learning_rate.alone(load_config(None, ["data=rows.jsonl", "method=lora"]), tmp_path / "out", 0, lambda text: None)
    assert not (tmp_path / "out").exists()


def test_few_steps_are_an_upper_bound_in_text_and_in_json() -> None:
    few = Found(points(2.5, 2.0, 2.1), ["", "", ""], 1e-4, 16, 2)
    assert few.caution.startswith("after 2 steps: take it as an upper bound") and few.as_dict()["note"] == few.caution
    assert Found(few.points, few.reasons, 1e-4, 300, 19).as_dict()["note"] is None


def test_a_study_that_is_terminated_ends_its_run_and_says_so_once(tmp_path: Path) -> None:
    """The run of the study reads rows from a pipe that never ends; SIGTERM reaches the study alone."""
    program = (
        "import sys; from pathlib import Path; from halfbyte.cli import main; from halfbyte.studies import runs\n"
        "def work(*_, **__):\n"
        "    with runs.opened(Path(sys.argv[1]), print) as folder:\n"
        "        print('begun', flush=True)\n"
        "        runs.call(folder, ['http.server', '0'], Path(sys.argv[1]) / 'x.log')\n"
        "main.command = lambda: type('Command', (), {'main': staticmethod(work)})\n"
        "sys.exit(main.run(['lr']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "s")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        for _ in range(100):
            if children := psutil.Process(process.pid).children():
                break
            time.sleep(0.05)
        time.sleep(0.3)
        process.terminate()
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 143 and err.startswith("error E-STOP-410") and err.count("E-STOP") == 1
    assert children and not any(child.is_running() for child in children)


def test_a_point_whose_weights_were_dropped_says_so_in_its_log_and_when_it_is_opened(tmp_path: Path) -> None:
    run = tmp_path / "points" / "x9"
    (run / "adapter").mkdir(parents=True)
    (tmp_path / "study.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    (run / "config.yaml").write_text("data: rows.jsonl\n")
    run.with_name("x9.log").write_text("next halfbyte chat points/x9\n")
    drop_weights(run)
    drop_weights(run)
    assert run.with_name("x9.log").read_text().splitlines()[1:] == [
        "a point of a study: its record is kept, its weights are not, so there is nothing to chat with or to merge"
    ]
    with pytest.raises(ConfigError, match=r"E-CONF-095(.*\n)+.*a point of a study") as caught:
        locate(run)
    assert "--resume" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "code", "remedy"),
    [("sweep/lora/x0.3", "E-CONF-095", "halfbyte train "), ("points/x1", "E-CONF-095", "halfbyte train "),
     ("runs/lora/seed-0", "E-CONF-081", "repeat the comparison's command, with --out ")],
)  # fmt: skip
def test_a_run_of_a_comparison_that_did_not_finish_is_no_short_run(place: str, code: str, remedy: str, tmp_path: Path) -> None:
    """Nor is it one that `halfbyte train --resume` may go on with beside the comparison."""
    run = tmp_path / place
    run.mkdir(parents=True)
    (tmp_path / "study.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    (run / "config.yaml").write_text("data: rows.jsonl\n")
    with pytest.raises(ConfigError, match=code) as caught:
        locate(run)
    assert remedy in str(caught.value) and "--resume" not in str(caught.value)


def test_what_differs_from_the_study_there_is_named_with_both_values(tmp_path: Path) -> None:
    now = {"settings": {"train": {"seed": 0, "epochs": 1}}, "rows": 16}
    require_same(tmp_path / "study.json", now)
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(CheckpointError, match=r"E-CKPT-412(.*\n)+.*settings\.train\.seed \(0 before, 1 now\)") as caught:
        require_same(tmp_path / "study.json", {"settings": {"train": {"seed": 1, "epochs": 1}}, "rows": 16})
    assert "epochs" not in str(caught.value)
