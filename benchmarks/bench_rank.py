"""Does `halfbyte rank` recommend the right rank?  Where it is known, and on real rows where every rank was trained.

(a) planted   a teacher that is its base plus an update of rank k in {1, 4, 16, 64}, DRAWS draws each (rank_planted.py); the student's probe
              of rank 128 decides; right is a recommendation within a factor of 2 of k.
(b) sets      e2e_nlg (meaning to text), the same reversed (text to meaning), gsm8k up to 440 characters; ROWS rows, ranks RANKS, SEEDS
              seeds, method lora on the starter model, one epoch, one rate per set: the best of RATES at rank 16 on SWEEP_ROWS of the rows,
              judged by other training rows; alpha 32 for every rank, so that the rate does not depend on the rank.  The recommender sees
              the training rows only.  A rank it names that is not in RANKS is trained too.
(c) fresh     the same with rows of gsm8k that are not among those of (b), trained and held out, one seed: for a rule that was changed after
              (b) had been seen.

    smallest  the smallest rank of RANKS whose held-out loss (mean over the seeds) is within 1 % of the best of RANKS
    passed    the recommended rank is within 1 % of the best, and at most 2 x smallest
    sum       over the sets, of  percent above the best loss  +  doublings above smallest;  compared with "always 16"

    python -m benchmarks.bench_rank [--part planted|sets|fresh|all] [--work FOLDER] [--jobs 2]   resumes: what has its result is kept
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.bench_methods import MAX_CHARS, TEMPLATE, as_training_row
from benchmarks.bench_train import code_digest
from halfbyte.studies.rows import spread_evenly

PLANTED, DRAWS = (1, 4, 16, 64), 5
PROBE = {"rank": 128, "steps": 100, "rate": 4e-3}
SETS, RANKS, SEEDS = ("e2e_nlg", "e2e_nlg-reversed", "gsm8k"), (1, 4, 16, 64, 128), (0, 1)
FRESH, FRESH_SEEDS = ("gsm8k-fresh",), (0,)
ROWS, HELD_OUT, SWEEP_ROWS, RATES = 600, 200, 300, (5e-4, 1e-3, 2e-3)


def planted_case(work: str, rank: int, draw: int) -> dict[str, Any]:
    """One draw in a process of its own."""
    place = Path(work) / f"planted-{rank}-{draw}-{code_digest()}.json"
    if place.exists():
        return dict(json.loads(place.read_text()))
    import torch

    from benchmarks.rank_planted import planted
    from halfbyte.studies.rank_decision import decide
    from halfbyte.studies.rank_probe import probe_run

    torch.set_num_threads(1)
    began = time.monotonic()
    probe = probe_run(planted(rank, draw), **PROBE)  # type: ignore[arg-type]
    found = decide(None, None, probe, planned_steps=probe.steps)
    base, seen = probe.base_loss, {number: [point.cut_loss, point.run_loss] for number, point in probe.points.items()}
    result = {"planted": rank, "draw": draw, "recommended": found.rank, "base_loss": base, "losses": seen, "tolerance": probe.tolerance,
              "right": 0.5 <= found.rank / rank <= 2, "seconds": time.monotonic() - began}  # fmt: skip
    whole(place, json.dumps(result))
    return result


def whole(place: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    fresh = place.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(place)


def planted_part(work: Path, jobs: int, draws: int) -> dict[str, Any]:
    """All draws; prints one line each."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        cases = [(str(work), rank, draw) for rank in PLANTED for draw in range(draws)]
        found = []
        for case in pool.map(planted_case, *zip(*cases)):
            named = f"planted {case['planted']:>3}  draw {case['draw']}  recommended {case['recommended']:>3}"
            print(f"{named}  {case['seconds']:.0f} s", flush=True)
            found.append(case)
    return {"probe": PROBE, "within_factor_2": sum(case["right"] for case in found), "draws": len(found), "cases": found}


def source_of(name: str) -> str:
    """The folder of a set's rows.

    >>> source_of("e2e_nlg-reversed"), source_of("gsm8k-fresh")
    ('e2e_nlg', 'gsm8k')
    """
    return name.partition("-")[0]


def row_of(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row as this set wants it; reversed: the text is the prompt and the meaning is the answer."""
    row = as_training_row(row)
    return {"prompt": row["completion"], "completion": row["prompt"]} if name.endswith("-reversed") else row


def prepare(work: Path, rows: int) -> None:
    """Write template and rows once: <set>-train, <set>-eval, and the sweep's two."""
    (work / "plain.jinja").write_text(TEMPLATE)
    for name in (*SETS, *FRESH):
        source = source_of(name)
        for part, file, count in (("train", "train", rows), ("eval", "test", min(rows, HELD_OUT))):
            with (record.SHARED / source / f"{file}.jsonl").open(encoding="utf-8") as lines:
                read = [json.loads(line) for line in lines]
            short = [row for row in map(partial(row_of, name), read) if len(json.dumps(row)) <= MAX_CHARS[source]]
            numbers = spread_evenly(short, count)
            if name in FRESH:
                short = [row for number, row in enumerate(short) if number not in {*numbers}]
                numbers = spread_evenly(short, count)
            chosen = [short[number] for number in numbers]
            write_rows(work / f"{name}-{part}.jsonl", chosen)
            if part == "train":
                size = min(SWEEP_ROWS, len(chosen) * 3 // 4)
                write_rows(work / f"{name}-sweep.jsonl", chosen[:size])
                write_rows(work / f"{name}-sweep-eval.jsonl", chosen[size : size + 100])


def write_rows(place: Path, rows: list[dict[str, Any]]) -> None:
    whole(place, "".join(json.dumps(row) + "\n" for row in rows))


def run(work: Path, name: str, words: list[str]) -> str:
    """The command line in a process of its own, unless its result is there; returns what it printed."""
    done = work / f"{name}.out"
    if not done.exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([sys.executable, "-m", "halfbyte", *words], capture_output=True, text=True, env=environment)
        if ended.returncode:
            raise SystemExit(f"{name} failed\n{ended.stdout}\n{ended.stderr}")
        whole(done, ended.stdout)
    return done.read_text()


def settings(work: Path, rate: float) -> list[str]:
    return [f"optim.learning_rate={rate}", "optim.warmup_share=0.05", "lora.alpha=32", f"model.template={work / 'plain.jinja'}",
            "train.micro_batch_size=8", "train.global_batch_size=16", "train.threads=1", "data.max_tokens=512"]  # fmt: skip


def train(work: Path, name: str, rate: float, rank: int, seed: int, sweep: bool = False) -> float:
    """Held-out loss after one epoch."""
    kind = "sweep" if sweep else "train"
    label = f"{kind}-{name}-{rate:g}-r{rank}-s{seed}"
    held = work / (f"{name}-sweep-eval.jsonl" if sweep else f"{name}-eval.jsonl")
    out = work / label
    if not (work / f"{label}.out").exists() and out.exists():
        raise SystemExit(f"{out} is half of a run: remove it")
    run(work, label, [
        "train", "--model", "starter", "--method", "lora", "--data", str(work / f"{name}-{kind}.jsonl"), "--out", str(out),
        f"data.eval_path={held}", *settings(work, rate), f"lora.rank={rank}", f"train.seed={seed}", "train.eval_every_steps=100000",
        "train.save_every_steps=null", "train.sample_prompts=0",
    ])  # fmt: skip
    return float(json.loads((out / "run.json").read_text())["last_eval_loss"])


def judged(losses: dict[int, float], recommended: int) -> dict[str, Any]:
    """How a recommendation does, beside always 16; `losses` are means over the seeds.

    >>> judged({1: 1.2, 4: 1.005, 16: 1.0, 64: 1.0, 128: 1.01}, 8 // 2)["passed"]
    True
    """
    grid = {rank: losses[rank] for rank in RANKS}
    best = min(grid.values())
    smallest = min(rank for rank, loss in grid.items() if loss <= 1.01 * best)

    def score(rank: int) -> float:
        return 100 * (losses[rank] / best - 1) + max(0.0, math.log2(rank / smallest))

    return {"best": best, "smallest": smallest, "recommended": recommended, "above_best_percent": 100 * (losses[recommended] / best - 1),
            "passed": losses[recommended] <= 1.01 * best and recommended <= 2 * smallest, "score": score(recommended),
            "score_always_16": score(16)}  # fmt: skip


def set_of(work: Path, name: str, each: Callable[..., Any]) -> dict[str, Any]:
    """Sweep, recommendation, all runs of one set; `each` maps over the jobs."""
    swept = dict(zip(RATES, each(lambda rate: train(work, name, rate, 16, 0, sweep=True), RATES)))
    rate = min(swept, key=lambda one: swept[one])
    asked = ["rank", "--model", "starter", "--method", "lora", "--data", str(work / f"{name}-train.jsonl"), "--json", *settings(work, rate)]
    found = json.loads(each(lambda words: run(work, f"rank-{name}-{code_digest()}", words), [asked])[0])
    losses = trained(work, name, rate, RANKS, each) | trained(work, name, rate, {found["rank"]} - {*RANKS}, each)
    seeds = seeds_of(name)
    means = {rank: sum(losses[rank, seed] for seed in seeds) / len(seeds) for rank in sorted({rank for rank, _ in losses})}
    return {"set": name, "rate": rate, "sweep": swept, **judged(means, found["rank"]), "losses": means,
            "by_seed": {f"r{rank} seed {seed}": loss for (rank, seed), loss in losses.items()},
            "recommender": {key: found[key] for key in ("decided_by", "reasons", "choices", "probe", "seconds")}}  # fmt: skip


def trained(work: Path, name: str, rate: float, ranks: Iterable[int], each: Callable[..., Any]) -> dict[tuple[int, int], float]:
    """(rank, seed) -> held-out loss."""
    jobs = [(rank, seed) for rank in ranks for seed in seeds_of(name)]
    return dict(zip(jobs, each(lambda job: train(work, name, rate, *job), jobs)))


def seeds_of(name: str) -> tuple[int, ...]:
    return FRESH_SEEDS if name in FRESH else SEEDS


def sets_part(work: Path, jobs: int, rows: int, names: Sequence[str]) -> dict[str, Any]:
    """The sets, `jobs` runs at a time over all of them."""
    prepare(work, rows)
    with ThreadPoolExecutor(jobs) as pool, ThreadPoolExecutor(len(names)) as sets:
        found = list(sets.map(lambda name: set_of(work, name, lambda task, over: list(pool.map(task, over))), names))
    return {"rows": rows, "ranks": RANKS, "seeds": seeds_of(names[0]), "sets": found, "passed": sum(one["passed"] for one in found),
            "sum": sum(one["score"] for one in found), "sum_always_16": sum(one["score_always_16"] for one in found)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("runs/bench-rank"))
    parser.add_argument("--part", choices=("planted", "sets", "fresh", "all"), default="all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="some of them: the result then holds no others")
    options = parser.parse_args()
    # a result of other code or other rows is never used; what trains lies below the studies and does not depend on them
    work = (options.work / f"{code_digest(without='studies')}-{options.rows}-rows").absolute()
    work.mkdir(parents=True, exist_ok=True)
    earlier = record.RESULTS / "rank.json"
    kept = json.loads(earlier.read_text()) if earlier.exists() else {}
    body = {part: kept[part] for part in ("planted", "sets", "fresh") if part in kept}
    if options.part in ("planted", "all"):
        body["planted"] = {"commit": record.commit(), **planted_part(work, options.jobs, options.draws)}
        print(f"within a factor of 2: {body['planted']['within_factor_2']} of {body['planted']['draws']}")
    for part, names in (("sets", options.sets), ("fresh", FRESH)):
        if options.part not in (part, "all"):
            continue
        body[part] = {"commit": record.commit(), **sets_part(work, options.jobs, options.rows, names)}
        for one in body[part]["sets"]:
            print(f"{one['set']:<18} recommended {one['recommended']:>3}  {one['above_best_percent']:+.2f} % of the best  smallest "
                  f"{one['smallest']:>3}  passed {one['passed']}")  # fmt: skip
        print(f"sum {body[part]['sum']:.2f}, always 16: {body[part]['sum_always_16']:.2f}")
    full = options.draws >= DRAWS and options.rows >= ROWS
    print(record.write("rank", body) if full else "a small trial: no result is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
