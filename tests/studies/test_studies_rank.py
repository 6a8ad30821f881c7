"""The recommender: each stage against what it should find, the decision, the command."""

import io
import json
import math
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.bench_rank import judged, prepare
from benchmarks.rank_planted import planted
from benchmarks.record import RESULTS
from halfbyte.cli.main import run
from halfbyte.config import DataConfig, load_config
from halfbyte.data.batches import Batch
from halfbyte.data.load import load_data
from halfbyte.data.tokenize import Example
from halfbyte.lora.inject import updates
from halfbyte.models.load import load_tokenizer
from halfbyte.models.source import resolve
from halfbyte.studies import rank_problem
from halfbyte.studies.rank import Recommendation, free_bytes, largest_rank, left_out, timing_of, training_bytes
from halfbyte.studies.rank_capacity import Capacity, counted, new_share, without_repeats
from halfbyte.studies.rank_decision import MOST, decide
from halfbyte.studies.rank_gradient import Gradient, ModuleGradient, gradient_spectrum, module_ranks
from halfbyte.studies.rank_probe import Point, Probe, Trial, powers, probe_run, smallest
from halfbyte.studies.rank_text import reasons_of, recommendation_dict, recommendation_text, stages_text
from halfbyte.train.from_config import train_from_config
from tests.end_to_end.tiny_world import rows, write_model, write_rows

SMALL = {"layers": 2, "width": 32, "held_out": 4}


def command(*words: object) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = run(["rank", *map(str, words)])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("rank", [1, 4])
def test_a_planted_rank_is_found(rank: int) -> None:
    probe = probe_run(planted(rank, 0, **SMALL), rank=16, steps=60, rate=8e-3)
    found = decide(None, None, probe, planned_steps=probe.steps)
    assert rank / 2 <= found.rank <= 2 * rank and found.stage == "probe"
    assert probe.loss < probe.base_loss and probe.points[rank].loss < probe.base_loss
    assert powers(16) == list(probe.points)


def test_a_rank_is_worth_the_better_of_its_cut_and_its_run() -> None:
    """Runs are made below the smallest rank whose cut is enough, never above; a rank is needed where the next smaller is not enough."""
    problem = planted(4, 1, **SMALL)
    probe = probe_run(problem, rank=16, steps=30, rate=8e-3)
    points = list(probe.points.values())
    for point in points:
        assert point.loss == min(loss for loss in (point.cut_loss, point.run_loss) if loss is not None)
        assert point.gap == pytest.approx(point.loss - probe.loss) and point.error is not None
    assert min(point.loss for point in points) == probe.loss
    run = [point.rank for point in points if point.run_loss is not None and point.rank < 16]
    seen = [(point.rank, point.gap, point.error or 0.0) for point in points if point.rank not in run]
    enough = [rank for rank, gap, error in seen if gap + error <= probe.tolerance or gap <= min(error, 0.05 * probe.gain)]
    assert run and max(run) < min(enough) and probe.needed // 2 in run
    known = trial({1: (1.5, 1.5), 2: (1.0, 1.0)}, 2.0)
    known.runs = {1: rank_problem.HeldOut((0.9, 0.9), (1, 1)), 2: rank_problem.HeldOut((1.1, 1.1), (1, 1))}
    assert known.needed == 1 and (known.point(1).loss, known.point(2).loss) == (0.9, 1.0)
    direct = rank_problem.adapt(problem, run[0])
    rank_problem.train(problem, 30, 8e-3)
    assert rank_problem.held_out(problem).loss == pytest.approx(probe.points[run[0]].run_loss, abs=1e-6) and direct


def trial(losses: dict[int, tuple[float, ...]], base: float) -> Trial:
    """What a probe knows when all cuts were judged; each batch has one token."""
    made = Trial(planted(1, 0, **SMALL), 1, 1e-3, base)
    made.cuts = {rank: rank_problem.HeldOut(each, (1,) * len(each)) for rank, each in losses.items()}
    return made


def test_enough_is_judged_against_the_best_rank_and_noise_excuses_little() -> None:
    """Shown to be within the tolerance, or not told from the best and less than a twentieth of the gain above it."""
    assert trial({1: (1.02, 1.02), 2: (1.0, 1.0), 4: (1.03, 1.03)}, 2.0).needed == 2  # the largest is not the best
    assert trial({1: (1.008, 1.008), 2: (1.0, 1.0)}, 2.0).needed == 1  # within a hundredth of the loss
    assert trial({1: (1.008, 1.008), 2: (1.0, 1.0)}, 1.1).needed == 2  # and yet a twelfth of what was learnt
    assert trial({1: (0.99, 1.05), 2: (1.0, 1.0)}, 2.0).needed == 1  # +0.02, not told from 0 by two batches
    assert trial({1: (0.8, 1.4), 2: (1.0, 1.0)}, 2.0).needed == 2  # +0.1: two batches do not tell it, but more than a twentieth of the gain
    assert trial({1: (1.002, 1.008), 2: (1.0, 1.0)}, 2.0).needed == 1  # +0.005, give or take 0.003: shown to be within a hundredth
    assert trial({1: (1.005, 1.011), 2: (1.0, 1.0)}, 2.0).needed == 2  # +0.008, give or take 0.003: neither


def test_cuts_are_at_one_scale() -> None:
    """# T28: alpha is the same for every rank, so a cut at another rank has another scale and yet the same update."""
    problem = planted(2, 0, **SMALL)
    layers = rank_problem.adapt(problem, 8)
    rank_problem.train(problem, 3, 1e-2)
    parts = rank_problem.spectra_of(layers)
    rank_problem.put(layers, parts, 2)
    in_place = rank_problem.held_out(problem).loss
    small = rank_problem.adapt(problem, 2, start=False)
    rank_problem.put(small, parts, 2)
    assert {layer.rank for layer in small.values()} == {2}
    assert rank_problem.held_out(problem).loss == pytest.approx(in_place, abs=1e-5)


def test_one_held_out_batch_has_no_standard_error() -> None:
    """None and a dash, never 0; the tolerance alone decides, and with a second batch the error is the one of two differences."""
    problem = planted(2, 0, **SMALL)
    probe = probe_run(replace(problem, held_out=problem.held_out[:1]), rank=4, steps=4, rate=8e-3)
    assert all(point.error is None for point in probe.points.values())
    one, other = rank_problem.HeldOut((3.0,), (10,)), rank_problem.HeldOut((2.0,), (10,))
    assert one.gap(other) == (pytest.approx(0.1), None)
    two, both = rank_problem.HeldOut((3.0, 5.0), (10, 10)), rank_problem.HeldOut((2.0, 2.0), (10, 10))
    assert two.gap(both) == (pytest.approx(0.2), pytest.approx(0.1))  # of 0.1 and 0.3: their spread / sqrt(2)
    found = Recommendation(decide(None, None, probe, planned_steps=4), (), None, None, probe, {}, 32.0, False, 4, "rows", 1.0)
    lines = stages_text(found)
    assert "one held-out batch has no standard error" in lines[0]
    assert all(line.split()[-1] == "-" for line in lines[3:]) and len(lines) == 3 + len(probe.points)


def test_the_gradient_is_that_of_the_dense_weights() -> None:
    """Sketches against gradients that are stored: norms, what rank r of one half explains of the other, and the median."""
    problem = planted(2, 0, **SMALL)
    windows = problem.windows()
    half_1, half_2 = [next(windows)[0]], [next(windows)[0]]
    found = gradient_spectrum(problem, half_1, half_2, sketch=32)
    problem.model.requires_grad_(True)
    dense = []
    for half in (half_1, half_2):
        rank_problem.gradient(problem, half)
        dense.append({name: module.weight.grad.clone() for name, module in problem.model.named_modules() if isinstance(module, nn.Linear)})
    assert not updates(problem.model)
    for name, seen in found.modules.items():
        first, second = (grads[name].double() for grads in dense)
        u, s, vh = torch.linalg.svd(first, full_matrices=False)
        assert seen.stable_rank == pytest.approx(float(first.square().sum() / s[0] ** 2), rel=0.02)
        assert seen.norm == pytest.approx(float(second.norm()), rel=0.4)  # a norm from 32 random directions
        energy = second.square().sum()
        for rank in (1, 4, 16):
            exact = float((u[:, :rank].T @ second @ vh[:rank].T).square().sum() / energy) - rank**2 / second.numel()
            found_share = seen.shares[rank - 1] * seen.norm**2 / float(energy)
            # what is taken off for random bases is known as well as the norm is
            assert found_share == pytest.approx(exact, rel=0.02, abs=0.5 * rank**2 / second.numel() + 1e-3), (name, rank)


def test_noise_that_does_not_repeat_has_no_rank() -> None:
    """What half 1 saw is not in half 2: nothing is explained, where a spectrum of one half would name a rank."""
    from halfbyte.studies.rank_gradient import OVER, _compared, _leading

    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(60, 50, generator=generator) for _ in range(2))
    basis = torch.linalg.qr(torch.randn(50, 40, generator=generator))[0]
    parts = _leading(first @ basis, basis, 40)
    seen = torch.cat([second @ parts[2], second @ torch.randn(50, OVER, generator=generator)], 1)
    assert _compared(seen, parts, 40, generator).shares[8] < 0.02
    shared = torch.outer(torch.randn(60, generator=generator), torch.randn(50, generator=generator))
    parts = _leading((first + 3 * shared) @ basis, basis, 40)
    both = second + 3 * shared
    seen = torch.cat([both @ parts[2], both @ torch.randn(50, OVER, generator=generator)], 1)
    assert _compared(seen, parts, 40, generator).rank == 1


def test_module_ranks_keep_the_sum_and_the_cap() -> None:
    deep = tuple(min(1.0, 0.05 * (r + 1)) for r in range(32))
    flat = tuple(1.0 for _ in range(32))
    found = Gradient({"a": ModuleGradient(deep, 1.0, 5.0, 100), "b": ModuleGradient(flat, 1.0, 1.0, 100)}, 10, 0.1, 32)
    ranks = module_ranks(found, 8)
    assert ranks["a"] > ranks["b"] >= 1 and ranks["a"] <= 16 and sum(ranks.values()) <= 16
    assert module_ranks(found, 1) == {"a": 1, "b": 1}
    assert module_ranks(found, 31) and module_ranks(found, 32) == {}  # more directions were not looked at: nothing to choose between


def test_capacity_counts_bits_and_repeated_rows() -> None:
    held = Capacity(trained_tokens=1000, new_share=0.5, base_loss=2 * math.log(2), floor=math.log(2), task="style", rank_one=100)
    assert held.bits == pytest.approx(500) and held.rank == math.ceil(2 * 500 / 200)
    assert replace(held, task="knowledge").rank == 40
    assert held.with_gain(-0.5).rank == 1
    assert held.with_gain(0.25 * math.log(2)).bits == pytest.approx(125)  # of the gain alone, on whatever rows that was measured
    assert held.with_gain(9.0).floor == 0.0
    generator = torch.Generator().manual_seed(0)
    unlike = [torch.randint(0, 40000, (30,), generator=generator).tolist() for _ in range(200)]
    assert new_share([unlike[0]] * 200) < 0.2 < 0.75 < new_share(unlike)


def test_a_row_that_is_there_twice_counts_once() -> None:
    """Two rows with the same answer to other prompts are two rows."""
    generator = torch.Generator().manual_seed(0)
    unlike = [torch.randint(0, 40000, (30,), generator=generator).tolist() for _ in range(20)]
    made = [Example(row, [-100] * 10 + row[10:], number) for number, row in enumerate(unlike * 100)]
    assert counted(made) == (40_000, pytest.approx(0.01)) and counted(made[:20]) == (400, 1.0)
    answers = [Example([number, 7, 8], [-100, 7, 8], number) for number in range(40)]
    assert counted(answers) == (80, 1.0) and without_repeats(made) == made[:20]


def test_the_rank_that_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 state is counted on the tensors of each rank: at rank 1 they are too small for it; a GPU's own memory caps it there."""
    config = load_config(None, ["optim.state=int8", "data=rows.jsonl"])
    sides = [1024] * 10
    assert training_bytes(config, sides) == 16 * 10240 and training_bytes(config, [64 * side for side in sides]) < 10.1 * 64 * 10240
    assert largest_rank(config, sides, 64 * 16 * 10240) == 64
    assert largest_rank(config, sides, 64 * 10240 * 11) == 64 and largest_rank(config, sides, 64 * 10240 * 10) == 32
    assert largest_rank(config, sides, 10) == 1 and largest_rank(config, sides, 2**50) == MOST
    assert 0 < free_bytes(torch.device("cpu")) < 2**50
    for name, value in (("mem_get_info", (1000, 5000)), ("memory_reserved", 700), ("memory_allocated", 300)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 1400


def test_a_rank_that_only_the_standard_error_makes_enough_says_so() -> None:
    """From the probe's own points; shown to be within the tolerance, or where nothing is known of it, no such words."""
    told = [(0.03, 0.04, True), (0.009, 0.04, True), (0.006, 0.003, False), (0.0, 0.0, False)]
    for gap, error, doubtful in told:
        probe = replace(probe_of(4), points={4: Point(4, 1.1, None, 1.0 + gap, gap, error), 8: Point(8, 1.0, None, 1.0, 0.0, 0.0)})
        found = Recommendation(decide(None, None, probe, planned_steps=30), (), None, None, probe, {}, 32.0, False, 30, "rows", 1.0)
        noisy = [line for line in recommendation_dict(found)["reasons"] if "standard error" in line]
        assert bool(noisy) is doubtful
        assert ("with a standard error of 0.0400: not told from the best" in " ".join(recommendation_text(found).split())) is doubtful
    assert reasons_of(replace(found, probe=probe_of(4))) == list(found.decision.reasons)


def probe_of(needed: int, steps: int = 30) -> Probe:
    return Probe(64, steps, 1e-3, 2.0, 1.0, 100, 0.01, needed, {}, 1.0, 0.01)


def test_decisions() -> None:
    """The stage that decides, the doubling of a long run, the step of the gradient, the cap."""
    held = Capacity(10**6, 1.0, 3.0, 1.5, "instructions", 305_280)
    gradient = Gradient({"a": ModuleGradient((0.2, 0.9), 1.0, 2.0, 10)}, 10, 0.1, 2)
    assert decide(None, None, probe_of(4), planned_steps=60).rank == 4
    assert decide(None, None, probe_of(4), planned_steps=600).rank == 8
    assert decide(held, None, probe_of(4), planned_steps=60).stage == "capacity"
    assert decide(held, gradient, probe_of(64), planned_steps=60).rank == 64
    alone = decide(held, None, None, planned_steps=60)
    assert alone.rank == 32 and alone.stage == "capacity"
    assert decide(held, gradient, None, planned_steps=60).rank == 16
    assert decide(replace(held, trained_tokens=10), None, None, planned_steps=60).rank == 8
    assert decide(None, gradient, None, planned_steps=60) == decide(None, gradient, None, planned_steps=9999)
    capped = decide(None, None, probe_of(64), planned_steps=60, most=20)
    assert capped.rank == 16 and capped.stage == "memory"


def test_halving_asks_few() -> None:
    asked: list[tuple[int, int]] = []
    for answer in powers(64):
        assert smallest(powers(64), lambda rank, answer=answer: asked.append((answer, rank)) is None and rank >= answer) == answer
    assert len(asked) == len(set(asked)) <= 3 * 7


def test_the_benchmark_judges_by_its_rule() -> None:
    losses = {1: 1.2, 4: 1.009, 16: 1.0, 64: 1.002, 128: 1.005, 8: 1.003}
    assert judged(losses, 8)["passed"] and judged(losses, 8)["smallest"] == 4
    assert not judged(losses, 16)["passed"] and not judged(losses, 1)["passed"]
    assert judged(losses, 8)["score"] < judged(losses, 8)["score_always_16"] == pytest.approx(2.0)


@pytest.mark.parametrize("dtype,state,wanted", [
    ("float32", "float32", 16 * 9000), ("bfloat16", "float32", 16 * 9000), ("float32", "int8", 8 * 9000 + 8 * 1000 + 2 * 8000 + 8 * 32),
    ("bfloat16", "int8", 8 * 9000 + 8 * 1000 + 2 * 8000 + 8 * 32),
])  # fmt: skip
def test_bytes_follow_the_types_of_adapter_and_optimizer(dtype: str, state: str, wanted: int) -> None:
    """Weight and gradient, moments of 4 bytes or of 1 and a scale for 256 in tensors of 4,096 and more, masters beside 16-bit weights."""
    config = load_config(None, [f"lora.dtype={dtype}", f"optim.state={state}", "data=rows.jsonl"])
    assert training_bytes(config, [1000, 8000]) == wanted


def test_settings_without_a_part_in_the_trial_are_named() -> None:
    plain = load_config(None, ["method=qlora", "data=rows.jsonl"])
    assert left_out(plain) == ""
    some = load_config(None, ["method=qlora", "data=rows.jsonl", "lora.dropout=0.1", "lora.init=pissa", "quant.calibrate=true"])
    assert left_out(some) == "; left out of the trial: lora.dropout, lora.init, quant.calibrate"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("world")
    return write_model(place / "model"), write_rows(place / "rows.jsonl", rows(48))


@pytest.mark.parametrize("stages", ["capacity", "gradient", "probe", "capacity,gradient,probe"])
def test_every_stage_alone_and_all(stages: str, world: tuple[Path, Path]) -> None:
    model, data = world
    names = stages.split(",")
    probe = ["--probe-rank", 4, "--probe-steps", 3] if "probe" in names else []
    code, text, err = command("--model", model, "--data", data, "--method", "lora" if stages == "gradient" else "qlora", "--stages", stages,
                              *probe, "--json", "model.device=cpu", "train.epochs=3", "optim.warmup_steps=4")  # fmt: skip
    assert code == 0, err  # a warm-up longer than the probe is the same share of it
    found = json.loads(text)
    assert [name for name in ("capacity", "gradient", "probe") if found[name] is not None] == names
    rank = found["rank"]
    assert [one["rank"] for one in found["choices"]] == sorted({max(1, rank // 2), rank, 2 * rank})
    for one in found["choices"]:
        assert one["file_bytes"] == 4 * one["parameters"] and one["training_bytes"] == 16 * one["parameters"]
        assert (one["loss_estimate"] is not None) <= ("probe" in names)
        assert (one["seconds_per_step_estimate"] is None) == (stages == "capacity")
    assert bool(found["lora"]["ranks"]) <= ("gradient" in names)
    if {"capacity", "probe"} <= set(names):
        held, short = found["capacity"], found["probe"]
        assert held["base_loss"] - held["floor"] == pytest.approx(max(0.0, short["base_loss"] - short["loss"]))


def test_the_text_and_the_settings_to_paste(world: tuple[Path, Path], tmp_path: Path) -> None:
    """# T29: alpha / rank is the same in every module, and the text is a settings file that is read."""
    model, data = world
    code, text, err = command("--model", model, "--data", data, "--stages", "capacity,gradient", "--modules")
    assert code == 0, err
    header = next(line for line in text.splitlines() if "adapter file" in line)
    assert "to the best, nats/token (estimate)" in header and "while training (estimate)" in header
    assert all(len(line) <= 140 for line in text.replace(str(model), "M").replace(str(data), "D").splitlines())
    assert "(estimate)" in text and "decided by the stage" in text and "nats/token" in text and "adapter file" in text
    pasted = tmp_path / "run.yaml"
    pasted.write_text("lora:" + text.split("\nlora:")[1] + f"\ndata: {data}\nmodel: {model}\n")
    lora = load_config(pasted).lora
    assert all(lora.alphas[name] / rank == pytest.approx(lora.alpha / lora.rank) for name, rank in lora.ranks.items())
    assert lora.ranks and max(lora.ranks.values()) <= 2 * lora.rank


def test_the_rows_measured_are_spread_over_all(tmp_path: Path) -> None:
    """24 of 40 rows, the last twenty of them longer: by their tokens, rows of the whole file, not its first 24."""
    made = [{**row, "completion": row["completion"] + "!" * (number // 20 * 30)} for number, row in enumerate(rows(40))]
    model, data = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", made)
    code, text, err = command("--model", model, "--data", data, "--stages", "gradient", "--rows", 24, "data.eval_rows=0", "--json")
    assert code == 0, err
    examples = load_data(DataConfig(path=str(data), eval_rows=0), load_tokenizer(resolve(str(model)))).train
    tokens = [sum(label != -100 for label in example.labels[1:]) for example in examples]
    assert json.loads(text)["gradient"]["tokens"] == sum(tokens[number * 40 // 24] for number in range(24))


def test_the_rows_of_the_benchmark_are_spread_over_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.record.SHARED", tmp_path)
    for name in ("e2e_nlg", "gsm8k"):
        (tmp_path / name).mkdir()
        for part in ("train", "test"):
            write_rows(tmp_path / name / f"{part}.jsonl", rows(30))
    prepare(tmp_path, 20)
    chosen = [json.loads(line)["prompt"] for line in (tmp_path / "gsm8k-train.jsonl").read_text().splitlines()]
    assert chosen == [rows(30)[number * 30 // 20]["prompt"] for number in range(20)]


def test_packed_rows_make_the_steps_of_the_run(world: tuple[Path, Path], tmp_path: Path) -> None:
    """Steps planned and steps of the probe are those that training takes."""
    model, data = world
    words = ["data.packing=true", "data.max_tokens=200", "train.global_batch_size=2", "train.sample_prompts=0", "model.device=cpu"]
    code, text, err = command("--model", model, "--data", data, "--stages", "probe", "--probe-rank", 2, "--json", *words)
    assert code == 0, err
    found = json.loads(text)
    flags = {"model": str(model), "data": str(data), "method": "qlora", "out": str(tmp_path / "run")}
    ran = train_from_config(load_config(None, words, flags))
    assert found["planned_steps"] == found["probe"]["steps"] == ran.total_steps < 44 / 2 / 1.5  # 44 rows, two and more in a packed one
    assert f"for a run of {ran.total_steps} steps of 2 packed rows of up to 200 tokens" in found["setting"]


def test_seconds_are_scaled_from_the_rank_that_was_run() -> None:
    """The gradient's passes carry more directions than its sketch."""
    problem, ranks = planted(2, 0, **SMALL), set()

    def watched(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
        ranks.update(layer.rank for layer in updates(model).values())
        return problem.loss_sum(model, batch)

    windows = problem.windows()
    found = gradient_spectrum(replace(problem, loss_sum=watched), next(windows), next(windows), sketch=16)
    assert ranks == {found.directions}
    seconds = timing_of(found, None, 100, 1000, 50.0)
    assert seconds is not None and seconds(found.directions) == pytest.approx(50 * found.seconds_per_token)
    assert seconds(16) < seconds(found.directions)


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--stages", "gradeint"), "E-CONF-540"), (("--stages", ","), "E-CONF-540"), (("--task", "poems"), "E-CONF-541"),
     (("--probe-rank", 1), "E-CONF-542"), (("--rows", 2), "E-CONF-542"), (("--method", "full"), "E-CONF-543"),
     (("--method", "auto"), "E-CONF-543"), (("--stages", "capacity", "--modules"), "E-CONF-546"),
     (("--stages", "capacity", "--probe-rank", 128), "E-CONF-546"), (("--stages", "capacity,gradient", "--probe-steps", 9), "E-CONF-546"),
     (("--stages", "probe", "--rows", 64), "E-CONF-546"), (("--stages", "gradient,probe", "--task", "style"), "E-CONF-546"),
     (("--stages", "capacity", "--rows", 2), "E-CONF-542"),
     (("data.eval_rows=0",), "E-DATA-093"), (("data.max_rows=3", "data.eval_rows=0", "--stages", "capacity"), "E-DATA-094"),
     (("data.max_rows=4", "data.eval_rows=0", "--stages", "capacity,gradient"), "E-DATA-096")],
)  # fmt: skip
def test_refusals(words: tuple[object, ...], code: str, world: tuple[Path, Path]) -> None:
    model, data = world
    ended, _, text = command("--model", model, "--data", data, *words)
    assert ended == 2 and code in text


def test_the_page_has_the_figures_of_the_result() -> None:
    """docs/rank.md against the committed result."""
    result = json.loads((RESULTS / "rank.json").read_text())
    planted, sets = result["planted"], result["sets"]
    page = (RESULTS.parents[1] / "docs" / "rank.md").read_text()
    for rank in sorted({case["planted"] for case in planted["cases"]}):
        found = ", ".join(str(case["recommended"]) for case in planted["cases"] if case["planted"] == rank)
        assert f"| {rank} | {found} |" in page
    assert f"{planted['within_factor_2']} of {planted['draws']} are within a factor of two" in page
    for one in [*sets["sets"], *result["fresh"]["sets"]]:
        losses = " | ".join(f"{one['losses'][str(rank)]:.4f}" for rank in sets["ranks"])
        found = f"{one['smallest']} | {one['recommended']} | {one['losses'][str(one['recommended'])]:.4f}"
        assert f"| {one['set']} | {losses} | {found} | {one['above_best_percent']:+.2f} % |" in page
    assert f"{sets['passed']} of {len(sets['sets'])}" in page
    assert f"{sets['sum']:.2f} against {sets['sum_always_16']:.2f} for always 16" in page
