"""A comparison of real runs of a tiny model: the same settings for all, and the same table after a kill as without one."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config import load_config
from halfbyte.errors import CheckpointError, ConfigError, DataError, DoesNotFitError, HalfbyteError, StorageError
from halfbyte.models.calibrated_base import START
from halfbyte.studies import arms, compare, comparison, comparison_files, judge, runs
from halfbyte.studies.arms import arms_of
from halfbyte.studies.compare import Score, Study
from halfbyte.studies.identity import digests_of, models_of
from tests.end_to_end import tiny_world

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["lora.rank=2", "train.global_batch_size=8", "train.threads=1", "optim.learning_rate=0.003"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, 24 rows and two lines of general text."""
    folder = tmp_path_factory.mktemp("compare")
    tiny_world.write_model(folder / "tiny")
    tiny_world.write_rows(folder / "rows.jsonl")
    (folder / "general.jsonl").write_text('{"text": "a lamp in the hall"}\n{"text": "the garden is dark"}\n')
    return folder


def study(world: Path, **changes: Any) -> Study:
    made = arms_of(None, SETTINGS, {"model": str(world / "tiny"), "data": str(world / "rows.jsonl")}, methods=["full", "lora"])
    return Study(tuple(made), **{"seeds": 1, "sweep_rows": 0, "general": "none", "samples": 0, **changes})


def words(world: Path, out: Path, *more: str) -> list[str]:
    given = ["--model", str(world / "tiny"), "--data", str(world / "rows.jsonl"), "--methods", "full,lora", "--out", str(out)]
    return [sys.executable, "-m", "halfbyte", "compare", *SETTINGS, *given, *more]


def environment() -> dict[str, str]:
    return dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HALFBYTE_KERNELS="reference", PYTHONPATH=str(ROOT))


def wait_for(path: Path, process: "subprocess.Popen[bytes]", seconds: float = 400.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def test_killed_and_started_again_it_ends_with_the_same_table(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """# T70 kill -9 of the command while a run it began is at work: the run is waited for, nothing is repeated, the table is the same."""
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    whole = comparison.numbers(compare.run(study(world), tmp_path / "whole", lambda text: None))
    out = tmp_path / "killed"
    command = words(world, out, "--seeds", "1", "--sweep-rows", "0", "--general", "none", "--samples", "0")
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(out / "runs" / "lora" / "seed-0.log", process)  # the second of the two runs has begun
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = (out / "runs" / "full" / "seed-0.json").stat().st_mtime_ns
    said: list[str] = []
    again = comparison.numbers(compare.run(study(world), out, said.append))
    assert any(text.startswith("waiting") for text in said)
    assert (out / "runs" / "full" / "seed-0.json").stat().st_mtime_ns == first
    log = (out / "runs" / "lora" / "seed-0.log").read_text()
    assert log.count("step 0  held-out loss") == log.count("finished at step") == 1  # the run went on, and was not done twice
    assert "error E-" not in log and "Traceback" not in log
    assert again["arms"][0]["values"]["eval_loss"] != again["arms"][1]["values"]["eval_loss"]
    assert comparison.without_times(again) == comparison.without_times(whole)
    texts = [comparison_files.lines(comparison.without_times(made)) for made in (whole, again)]
    assert texts[0] == texts[1] and len(texts[0]) >= 5


@pytest.mark.slow
def test_killed_at_any_moment_with_all_its_runs_it_ends_with_the_same_table(world: Path, tmp_path: Path) -> None:
    """Command and runs killed together at moments spread over the whole study, sweep and judging included."""
    more = ["--seeds", "2", "--sweep-rows", "8", "--general", str(world / "general.jsonl"), "--score-rows", "2", "--max-new-tokens", "6",
            "--samples", "1"]  # fmt: skip
    began = time.monotonic()
    subprocess.run(words(world, tmp_path / "whole", *more), env=environment(), check=True, timeout=3000)
    took = time.monotonic() - began
    for number in range(6):
        command = words(world, tmp_path / "killed", *more)
        process = subprocess.Popen(command, env=environment(), start_new_session=True)
        time.sleep(took * (0.1 + 0.07 * number))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(words(world, tmp_path / "killed", *more), env=environment(), check=True, timeout=3000)
    made = [json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("whole", "killed")]
    assert comparison.without_times(made[0]) == comparison.without_times(made[1])
    assert made[1]["arms"][0]["sweep"] and made[1]["samples"] and made[1]["arms"][1]["values"]["forgotten"] is not None


def test_other_settings_or_other_rows_do_not_go_on_in_the_same_folder(world: Path, tmp_path: Path) -> None:
    """# T71 a kept outcome belongs to its settings and its rows."""
    runs.write_json(tmp_path / "study.json", study(world).identity())
    runs.require_same(tmp_path / "study.json", study(world).identity())
    (tmp_path / "runs" / "full" / "seed-0").mkdir(parents=True)
    metrics = tmp_path / "runs" / "full" / "seed-0" / "metrics.jsonl"
    metrics.write_text('{"step": 0, "eval_loss": 3.0}\n{"step": 1, "loss": 2.5}\n')
    with pytest.raises(CheckpointError, match="other seeds"):
        runs.require_same(tmp_path / "study.json", study(world, seeds=2).identity())
    from halfbyte.studies import rows

    data = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(30))
    config = load_config(None, [f"data={data}"])
    rows.prepare(tmp_path, config, sweep_rows=10)
    rows.prepare(tmp_path, config, sweep_rows=10)
    tiny_world.write_rows(data, tiny_world.rows(30, seed=1))
    with pytest.raises(CheckpointError, match="rows it began with"):
        rows.prepare(tmp_path, config, sweep_rows=10)


def test_a_first_command_that_was_refused_can_be_corrected(world: Path, tmp_path: Path) -> None:
    """# T71 nothing was trained yet, so the folder holds no outcome that could pass for one of other settings; what it made goes."""
    wrong = arms_of(None, SETTINGS, {"model": str(tmp_path / "typo"), "data": str(world / "rows.jsonl")}, methods=["full", "lora"])
    with pytest.raises(HalfbyteError):
        compare.run(replace(study(world), arms=tuple(wrong)), tmp_path / "out", lambda text: None)
    left = tmp_path / "out" / "bases" / "qlora-calibrated.json"
    left.parent.mkdir()
    left.write_text("{}")
    runs.require_same(tmp_path / "out" / "study.json", study(world).identity())
    assert runs.read_json(tmp_path / "out" / "study.json") == study(world).identity()
    assert not left.exists() and not (tmp_path / "out" / "rows").exists()


def test_all_runs_get_the_same_rows_and_evaluation_and_each_its_seed_and_rate(world: Path, tmp_path: Path) -> None:
    """# T72 compared at the same steps: the last weights, not each one's best."""
    whole = study(world, seeds=3)
    made = [compare.settings_of(whole, tmp_path, arm, seed, rate) for seed in range(3) for arm, rate in zip(whole.arms, (1e-4, 1e-3))]
    assert len({(one.data.path, one.data.eval_path, one.train.epochs, one.train.eval_every_steps, one.data.max_rows) for one in made}) == 1
    assert [one.train.seed for one in made] == [0, 0, 1, 1, 2, 2] and [one.optim.learning_rate for one in made[:2]] == [1e-4, 1e-3]
    assert not any(one.train.keep_best for one in made) and {one.method for one in made} == {"full", "lora"}
    assert all(one.train.save_every_steps is None for one in made)


def test_what_is_given_for_all_goes_where_it_has_an_effect() -> None:
    """# T44 a setting given for all rests where it means nothing; one that a named setting gives itself is never dropped."""
    made = {one.name: one.config for one in arms_of(
        None, ["lora.rank=8", "quant.blocksize=128", "optim.lora_plus_ratio=4", "train.epochs=2"], {"data": "rows.jsonl"},
        methods=["full", "lora", "qlora"],
    )}  # fmt: skip
    assert made["lora"].lora.rank == made["qlora"].lora.rank == 8 and "rank" not in made["full"].lora.model_fields_set
    assert made["qlora"].quant.blocksize == 128 and made["lora"].quant_format == "none"
    assert {config.train.epochs for config in made.values()} == {2.0} and made["full"].optim.lora_plus_ratio == 1.0


def test_named_settings_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text("r8: {method: lora, lora.rank: 8}\nr64:\n  method: lora\n  lora: {rank: 64, alpha: 128}\n")
    made = arms_of(None, ["train.epochs=2"], {"data": "rows.jsonl"}, methods=["full"], file=file)
    assert [one.name for one in made] == ["full", "r8", "r64"] and [one.config.lora.rank for one in made[1:]] == [8, 64]
    assert made[2].config.lora.alpha == 128 and made[1].config.train.epochs == 2
    for text, code in (("../x: {method: lora}", "E-CONF-412"), ("r8: lora", "E-CONF-412"), ("full: {method: lora}", "E-CONF-413"),
                       ("r: {method: full, lora.rank: 8}", "E-CONF-170")):  # fmt: skip
        file.write_text(text + "\n")
        with pytest.raises(ConfigError) as caught:
            arms_of(None, [], {"data": "rows.jsonl"}, methods=["full"], file=file)
        assert code in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean qlora"):
        arms_of(None, [], {"data": "rows.jsonl"}, methods=["qlorra"])
    with pytest.raises(ConfigError, match="at least one setting"):
        arms_of(None, [], {"data": "rows.jsonl"})
    assert set(arms.METHODS) == {"full", "lora", "qlora", "qlora-calibrated"}


def test_a_study_that_could_not_be_read_is_refused_before_it_begins(world: Path, tmp_path: Path) -> None:
    blind = arms_of(None, ["train.eval_every_steps=null"], {"data": str(world / "rows.jsonl")}, methods=["lora"])
    with pytest.raises(ConfigError, match="nothing is evaluated"):
        compare.run(Study(tuple(blind)), tmp_path, lambda text: None)
    with pytest.raises(ConfigError, match="at least one seed"):
        compare.run(study(world, seeds=0), tmp_path, lambda text: None)
    assert list(tmp_path.iterdir()) == []


def test_what_was_forgotten_is_judged_with_and_without_the_adapter(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """# T67 before is the base with the adapter switched off, after is with it; both in the storage of the run."""
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")
    from halfbyte.evaluate.opened import open_model
    from halfbyte.evaluate.rows import evaluate_rows
    from halfbyte.train.from_config import train_from_config

    general, rows = world / "general.jsonl", world / "rows.jsonl"
    flags = {"model": str(world / "tiny"), "data": str(rows), "method": "lora", "out": str(tmp_path / "run")}
    train_from_config(load_config(None, [*SETTINGS, "train.max_steps=6", "train.sample_prompts=0"], flags))
    order = {"run": str(tmp_path / "run"), "threads": 1, "general": str(general), "before": True, "held_out": str(rows), "samples": 2,
             "score": {"metric": "rougeL", "rows": 4, "max_new_tokens": 8}}  # fmt: skip
    found = judge.judged(order)
    assert found["general_before"] == pytest.approx(evaluate_rows(open_model(world / "tiny"), general)["loss"], abs=1e-3)
    trained = evaluate_rows(open_model(tmp_path / "run"), general)["loss"]
    assert found["general_after"] == pytest.approx(trained, abs=1e-3) and abs(found["general_after"] - found["general_before"]) > 1e-3
    scored = evaluate_rows(open_model(tmp_path / "run"), rows, metrics=["rougeL"], max_rows=4, max_new_tokens=8)
    assert found["score"] == pytest.approx(scored["rougeL"]) and len(found["answers"]) == 2
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "no prompt here"}\n')
    assert judge.judged({**order, "held_out": str(texts), "score": None, "general": None}) == {}


@pytest.mark.parametrize(
    "given,wanted", [((), "calibrated"), (("lora.init=default",), "default"), (("quant.calibrate=auto",), "calibrated")]
)
def test_a_calibrated_setting_begins_from_its_start(
    given: tuple[str, ...], wanted: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """# T44 also behind the settings file of a run, which names every setting; an init that the user wrote stays."""
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rows = str(world / "rows.jsonl")
    method = "qlora" if "quant.calibrate=auto" in given else "qlora-calibrated"
    made = arms_of(None, [*SETTINGS, *given], {"model": str(world / "tiny"), "data": rows}, methods=[method])
    found = compare.run(Study(tuple(made), seeds=1, sweep_rows=0, general="none", samples=0), tmp_path / "out", lambda text: None)
    assert load_config(tmp_path / "out" / "runs" / method / "seed-0" / "config.yaml").lora.init == wanted
    base = str(tmp_path / "out" / "bases" / method / "base")
    plain = arms_of(None, SETTINGS, {"model": base, "data": rows}, methods=["qlora"])
    bare = compare.run(Study(tuple(plain), seeds=1, sweep_rows=0, general="none", samples=0), tmp_path / "bare", lambda text: None)
    begun, without = (one.outcomes[0].runs[0]["first_eval_loss"] for one in (found, bare))
    assert (begun == pytest.approx(without, abs=1e-6)) is (wanted == "default")


def test_before_is_where_the_training_began(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """# T67 on a calibrated base the low-rank start belongs to it: what the start repairs has not been un-forgotten by the training."""
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")
    from halfbyte.evaluate.opened import open_model
    from halfbyte.evaluate.rows import evaluate_rows
    from halfbyte.train.from_config import train_from_config

    general, rows = world / "general.jsonl", world / "rows.jsonl"
    order = {"threads": 1, "general": str(general), "before": True, "held_out": str(rows), "samples": 0, "score": None}
    words = [*SETTINGS[:-1], "optim.learning_rate=1e-9", "train.max_steps=1", "train.sample_prompts=0"]
    flags = {"model": str(world / "tiny"), "data": str(rows), "method": "qlora"}
    run = tmp_path / "calibrated"
    train_from_config(load_config(None, [*words, "quant.calibrate=true"], {**flags, "out": str(run)}))
    found = judge.judged({**order, "run": str(run)})
    bare = evaluate_rows(open_model(run / "base"), general)["loss"]
    assert found["general_before"] == pytest.approx(found["general_after"], abs=1e-5)
    assert abs(found["general_before"] - bare) > 1e-4
    run = tmp_path / "loftq"
    train_from_config(load_config(None, [*words, "lora.init=loftq"], {**flags, "out": str(run)}))
    assert "general_before" not in judge.judged({**order, "run": str(run)})


def test_a_setting_that_runs_out_of_memory_is_a_line_of_the_table(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other seeds are not trained; the table stands though nothing in it finished."""
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HALFBYTE_FAULTS", "train.micro_batch:memory:*")
    flags = {"model": str(world / "tiny"), "data": str(world / "rows.jsonl"), "data.packing": True, "data.max_tokens": 64}
    alone = Study(tuple(arms_of(None, SETTINGS, flags, methods=["lora"])), seeds=2, sweep_rows=0, general="none", samples=0)
    made = comparison.numbers(compare.run(alone, tmp_path / "out", lambda text: None))
    assert made["arms"][0]["status"] == "does not fit" and made["reference"] is None
    comparison_files.write(made, tmp_path / "out")
    table = (tmp_path / "out" / "comparison.txt").read_text()
    assert "lora: does not fit. Seed 0: " in table and "packed into 64 tokens" in table
    assert [log.name for log in (tmp_path / "out" / "runs" / "lora").glob("*.log")] == ["seed-0.log"]
    monkeypatch.delenv("HALFBYTE_FAULTS")
    again = comparison.numbers(compare.run(alone, tmp_path / "out", lambda text: None))
    assert again["arms"][0]["status"] == "finished"  # there is more room now: it is tried again


def test_a_run_that_diverges_or_does_not_fit_is_an_outcome_and_any_other_fault_ends_the_study(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("step 1\nerror E-NUM-301: the loss must be finite\n  found:    nan\n")
    assert runs.last_words(log).startswith("error E-NUM-301") and "nan" in runs.last_words(log)
    failed = runs.failure(2, log)
    assert failed.exit_code == 2 and "E-NUM-301" in failed.found
    assert "signal 9" in runs.failure(-9, log).found
    with runs.opened(tmp_path / "study", lambda text: None) as folder:
        missing = load_config(None, ["model=/no/such/model", "data=/no/such/rows.jsonl"])
        with pytest.raises(ConfigError, match="a run of the study failed"):
            runs.train(folder, "runs/x", missing)
        assert not (tmp_path / "study" / "runs" / "x.json").exists()
    outcome = runs.unfinished(runs.RunFolder(tmp_path / "none"), "diverged", "why")
    assert outcome == {"status": "diverged", "error": "why"}
    log.write_text("error E-DATA-099: a base is calibrated on enough rows\n  found:    3 rows\n")
    assert isinstance(runs.failure(2, log), DataError) and "E-DATA-099" in runs.failure(2, log).found


def test_a_study_is_not_written_over_other_files(world: Path, tmp_path: Path) -> None:
    """The rows of a study would take the place of somebody's rows, and its runs that of somebody's runs."""
    data = tmp_path / "rows" / "train.jsonl"
    data.parent.mkdir()
    data.write_bytes((world / "rows.jsonl").read_bytes())
    before = data.read_bytes()
    with pytest.raises(StorageError, match=r"E-STORE-412(.*\n)+.*rows"):
        compare.run(study(world), tmp_path, lambda text: None)
    assert data.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_file_of_a_study_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"E-CKPT-413(.*\n)+.*study\.json"):
        runs.require_same(tmp_path / "study.json", {"settings": {}})
    assert (tmp_path / "study.json").read_text() == text


def test_what_only_the_end_would_find_wrong_is_refused_at_the_start(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scores = ({"score": Score("rougeL", -1, 8)}, {"score": Score("rougeL", 4, 0)})
    for wrong in ({"sweep_rows": -1}, {"samples": -1}, {"jobs": -5}, {"jobs": 0}, *scores):
        with pytest.raises(ConfigError, match="E-CONF-418"):
            compare.run(study(world, **wrong), out, lambda text: None)
    with pytest.raises(DataError, match="E-DATA-411"):
        compare.run(study(world, general=str(tmp_path / "none.txt")), out, lambda text: None)
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "code"),
    [(["--score", "bleu"], "E-CONF-417"), (["--max-new-tokens", "128"], "E-CONF-417"),
     (["--score", "bleu", "--score-rows", "0"], "E-CONF-417"), (["--score", "blue", "--score-rows", "2"], "E-CONF-086")],
)  # fmt: skip
def test_options_of_a_score_that_nobody_asked_for_are_refused(
    given: list[str], code: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfbyte.cli.main import run as command

    line = ["compare", "--model", str(world / "tiny"), "--data", str(world / "rows.jsonl"), "--out", str(tmp_path / "out")]
    assert command([*line, *given]) == 2
    told = capsys.readouterr().err
    assert code in told and given[0] in told and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{lora: 3, lora.rank: 2}", "{lora: {rank: 2}, lora.rank: 3}", "{lora.rank: 3, lora: {rank: 2}}"])
def test_a_setting_that_is_given_twice_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "arms.yaml").write_text(f"a: {text}\n")
    with pytest.raises(ConfigError, match="E-CONF-420"):
        arms_of(None, [], {"data": "rows.jsonl"}, file=tmp_path / "arms.yaml")


@pytest.mark.parametrize("text", ["method=lora", "out=elsewhere", " out =elsewhere"])
def test_what_the_comparison_chooses_is_not_given_for_all(text: str) -> None:
    with pytest.raises(ConfigError, match="E-CONF-421"):
        arms_of(None, [text], {"data": "rows.jsonl"}, methods=["full", "lora"])


def test_what_only_the_judging_would_find_is_refused_before_training(world: Path, tmp_path: Path) -> None:
    """# T72 a task score of rows without prompts, general text that cannot be read: not after hours of training."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"body": "a lamp in hall {n}"}}\n' for n in range(90)))
    made = arms_of(None, ["data.text_field=body"], {"model": str(world / "tiny"), "data": str(texts)}, methods=["lora"])
    plain = Study(tuple(made), seeds=1, sweep_rows=0, samples=0)
    with pytest.raises(DataError, match="E-DATA-412"):
        compare.run(replace(plain, general="none", score=Score("rougeL", 4, 8)), tmp_path / "a", lambda text: None)
    broken = tmp_path / "general.jsonl"
    broken.write_text('{"other": 3}\n')
    with pytest.raises(DataError, match="E-DATA-0"):
        compare.run(replace(plain, general=str(broken)), tmp_path / "b", lambda text: None)
    assert not (tmp_path / "a" / "runs").exists() and not (tmp_path / "b" / "runs").exists()


def test_a_file_that_changed_under_a_study_is_noticed(world: Path, tmp_path: Path) -> None:
    """# T71 a template is part of what a study is, not only its path."""
    template = tmp_path / "own.jinja"
    template.write_text(tiny_world.CHATML)
    flags = {"model": str(world / "tiny"), "data": str(world / "rows.jsonl"), "model.template": str(template)}
    made = Study(tuple(arms_of(None, SETTINGS, flags, methods=["lora"])))
    before = made.identity()
    template.write_text(tiny_world.CHATML + " ")
    assert made.identity() != before
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    told = digests_of(str(folder))
    (folder / "b.jsonl").write_text('{"text": "two"}\n')
    assert digests_of(str(folder)) != told


def test_a_model_that_changed_under_a_study_is_noticed(world: Path, tmp_path: Path) -> None:
    """# T71 by its contents and those of its low-rank start; a copy is the same model, the name of the folder says nothing."""
    model = tmp_path / "model"
    (model / START).mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "notes.md").write_text("a")
    (model / "model.safetensors").write_bytes(bytes(64))
    (model / START / "adapter_model.safetensors").write_bytes(b"a")
    seen = [models_of(str(model))]
    (model / "notes.md").write_text("b")
    os.utime(model / "model.safetensors", (1, 1))
    assert models_of(str(model)) == seen[0] and set(seen[0]) == {str(model), str(model / START)}
    assert models_of("starter", "owner/name") == {}
    for change in (
        lambda: (model / "config.json").write_text("[]"), lambda: (model / "model.safetensors").write_bytes(bytes(63) + b"a"),
        lambda: (model / START / "adapter_model.safetensors").write_bytes(b"b"), lambda: (model / "vocab.txt").write_text("a"),
    ):  # fmt: skip
        change()
        seen.append(models_of(str(model)))
        assert seen[-1] != seen[-2]
    assert list(models_of(str(model / "model.safetensors"))) == [str(model / "model.safetensors")]


def test_a_study_of_another_model_does_not_go_on(world: Path, tmp_path: Path) -> None:
    """# T71 where a run has made a step; the message names the folder and both digests."""
    now = study(world).identity()
    assert set(now["models"]) == {str(world / "tiny")}
    metrics = tmp_path / "runs" / "full" / "seed-0" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"step": 1, "loss": 2.5}\n')
    runs.write_json(tmp_path / "study.json", now)
    changed = {**now, "models": {str(world / "tiny"): "another"}}
    with pytest.raises(CheckpointError, match=r"other models\..*tiny \([0-9a-f]{40} before, another now\)"):
        runs.require_same(tmp_path / "study.json", changed)
    assert runs.read_json(tmp_path / "study.json") == now


def test_settings_that_would_not_see_the_same_rows_are_refused(world: Path, tmp_path: Path) -> None:
    for text in ("data.eval_path: other.jsonl", "data: other.jsonl", "model: other", "data.eval-path: other.jsonl"):
        (tmp_path / "arms.yaml").write_text(f"a: {{method: lora, {text}}}\n")
        with pytest.raises(ConfigError, match=r"E-CONF-423(.*\n)+.*other"):
            arms_of(None, [], {"data": "rows.jsonl"}, file=tmp_path / "arms.yaml")
    packed = arms_of(None, ["data.packing=true"], {"model": str(world / "tiny"), "data": str(world / "rows.jsonl")}, methods=["lora"])
    with pytest.raises(ConfigError, match="E-CONF-422"):
        compare.run(Study(tuple(packed), seeds=1), tmp_path / "out", lambda text: None)


def test_a_base_that_cannot_be_made_is_a_line_of_the_table(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other settings go on."""

    def fails(*given: Any) -> Any:
        raise DoesNotFitError("a rule", code="E-FIT-402", found="9 GiB of weights")

    monkeypatch.setattr(compare.base, "shared", fails)
    made = comparison.numbers(compare.run(study(world, sweep_rows=0), tmp_path / "out", lambda text: None))
    assert [(arm["status"], arm["error"]) for arm in made["arms"]] == [("does not fit", "9 GiB of weights")] * 2


def test_too_few_rows_to_calibrate_are_enough_for_the_others(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> Any:
        raise DataError("a rule", code="E-DATA-414", found="3 rows")

    monkeypatch.setattr(compare.base, "shared", fails)
    with runs.opened(tmp_path / "out", lambda text: None) as folder:
        found = compare._on_base(folder, study(world).arms[0])
    assert found.out == compare.Out("not calibrated", "3 rows")


def test_mended_rows_take_over_until_a_run_has_made_a_step(tmp_path: Path) -> None:
    """# T71 a first command that was refused for a row of its data; what was made of the old rows goes."""
    from halfbyte.studies import rows

    data = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(30))
    config, out = load_config(None, [f"data={data}"]), tmp_path / "out"
    rows.prepare(out, config, sweep_rows=10)
    left = out / "bases" / "qlora-calibrated.json"
    left.parent.mkdir()
    left.write_text("{}")
    tiny_world.write_rows(data, tiny_world.rows(30, seed=1))
    found = rows.prepare(out, config, sweep_rows=10)
    assert runs.read_json(out / "rows" / "rows.json") == found and not left.exists()
    kept = [json.loads(line) for line in (out / "rows" / "train.jsonl").read_text().splitlines()]
    assert all(row in tiny_world.rows(30, seed=1) for row in kept)


def test_rows_that_are_all_equal_are_named_as_such(tmp_path: Path) -> None:
    from halfbyte.studies import rows

    data = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(1) * 30)
    with pytest.raises(DataError, match=r"E-DATA-410(.*\n)+.*these 30 are 1 different(.*\n)+.*duplicates"):
        rows.prepare(tmp_path / "out", load_config(None, [f"data={data}"]), sweep_rows=10)


@pytest.mark.parametrize(
    "name,text", [("study.json", '{"settings": 3}'), ("runs/lora/seed-0.json", "{}"), ("runs/lora/seed-0.json", '{"status": "finished"}')]
)
def test_a_file_of_a_study_without_what_it_needs_is_named(name: str, text: str, tmp_path: Path) -> None:
    with runs.opened(tmp_path / "out", lambda words: None) as folder:
        file = folder.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        with pytest.raises(CheckpointError, match="E-CKPT-413") as caught:
            runs.require_same(folder.path / "study.json", {"settings": {}})
            runs.train(folder, "runs/lora/seed-0", load_config(None, ["data=rows.jsonl"]))
    assert file.name in str(caught.value)


def test_a_folder_that_cannot_be_written_has_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"E-STORE-411(.*\n)+.*--out"), runs.opened(tmp_path / "file" / "out", lambda text: None):
        pass


def test_last_words_are_those_of_the_newest_process(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text(f"{runs.BEGUN}a\nerror E-FIT-401: too large\n{runs.BEGUN}b\nstep 1\n")
    assert runs.last_words(log) == "step 1"
