"""Training speed and memory on the CPU: Halfbyte beside PEFT, bitsandbytes and TRL on the same tokens from the same start.

Model: the starter (SmolLM2-135M); data: `e2e_nlg`, packed into 4 rows of 512 tokens a step; LoRA rank 16 on all linears, alpha 32, no
dropout; AdamW at rate 1e-3, constant, gradients clipped to norm 1; 2 threads.  `train_inputs.py` writes rows, batches and the adapter that
everybody starts from; `train_arms.py` says what an arm is.

Each run of an arm is one process.  A round runs every arm once, in the order given; the first arm is run once more at the very end, so
that a drift of the machine shows (`drift`).  A ratio is the median over rounds of two runs of the same round.  Counted are tokens
without padding, of the steps after two warm-up steps; a step lasts from the end of the one before to its own end, whatever happens between.
Peak memory is the process's, from its start to its end.  Losses must agree with PEFT's, or the command fails (train_results.py).

    python -m benchmarks.bench_train [--steps 6] [--rounds 3] [--modes completion] [--arms train-nf4,peft-nf4] [--peers-only]

Resumable: a run whose result lies in the work folder is not repeated; ours are, when the code of the package has changed since.
With --arms, --peers-only or --smoke nothing is written into results/ or docs/.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import record, train_inputs, train_results
from benchmarks.train_arms import ARMS

ORDER = tuple(f"{kind}-{precision}" for precision in ("nf4", "bf16", "fp32") for kind in ("train", "peft", "loop", "trl"))
PEERS = tuple(arm for arm in ORDER if arm.startswith(("peft", "trl")))
PICTURE = record.ROOT / "docs" / "images" / "train_cpu.png"
SMOKE = train_inputs.Settings(rank=4, alpha=8, rows=2, tokens=96, windows=4)


def code_digest(without: str = "") -> str:
    """Identity of the package's source, but for the folder `without`."""
    digest = hashlib.sha256()
    for path in sorted((record.ROOT / "halfbyte").rglob("*.py")):
        if not without or record.ROOT / "halfbyte" / without not in path.parents:
            digest.update(str(path.relative_to(record.ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def is_done(path: Path, arm: str, options: argparse.Namespace, code: str) -> bool:
    """The run's result is there, from the same settings and, for ours, the same code."""
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    same = found["steps"] == options.steps and found["threads"] == options.threads
    return same and (arm in PEERS or found["code"] == code)


def one_run(arm: str, name: str, mode: str, options: argparse.Namespace, code: str) -> dict[str, Any]:
    """A run in a fresh process, or its result of before."""
    path = options.work / "results" / mode / f"{name}.json"
    if is_done(path, arm, options, code):
        return json.loads(path.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "benchmarks.train_arms", arm, "--work", str(options.work), "--mode", mode,
        "--steps", str(options.steps), "--threads", str(options.threads), "--out", str(path),
    ]  # fmt: skip
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    began = time.time()
    with path.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, cwd=record.ROOT, env=surroundings, stdout=log, stderr=log, timeout=options.timeout)
    if done.returncode != 0:
        print(path.with_suffix(".log").read_text()[-2000:], file=sys.stderr)
        raise SystemExit(f"{arm} failed with {done.returncode}; the whole text is in {path.with_suffix('.log')}")
    found = {**json.loads(path.read_text()), "code": code, "began": round(began)}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def measure(mode: str, arms: list[str], inputs: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of a mode, and what comes of them."""
    tokens, code = inputs["counts"][mode]["tokens"][: options.steps], code_digest()
    by_round: list[dict[str, Any]] = []
    for number in range(options.rounds):
        by_round.append({})
        for arm in arms:
            found = by_round[-1][arm] = one_run(arm, f"{number}-{arm}", mode, options, code)
            rate = train_results.tokens_per_second(found, tokens)
            print(f"{mode} {number} {arm:<12}{rate:8.1f} tokens/s  {found['peak_rss_bytes'] / 2**30:5.2f} GiB", flush=True)
    again = one_run(arms[0], f"last-{arms[0]}", mode, options, code)
    first = train_results.tokens_per_second(by_round[0][arms[0]], tokens)
    figures = {arm: train_results.figures([found[arm] for found in by_round], tokens) for arm in arms}
    return {
        "arms": figures, "ratios": train_results.ratios(by_round, tokens),
        "agreement": train_results.agreement({arm: by_round[0][arm]["losses"] for arm in arms}),
        "drift": {"arm": arms[0], "first": round(first, 1), "last": round(train_results.tokens_per_second(again, tokens), 1)},
        "tokens_per_step": tokens, "trained_tokens_per_step": inputs["counts"][mode]["trained_tokens"][: options.steps],
        "began": [{arm: found["began"] for arm, found in one.items()} for one in by_round],
    }  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, help="folder for inputs and single results; default runs/bench-train")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--modes", default="completion,all", help="completion (only answers carry labels), all")
    parser.add_argument("--arms", help=f"some of {','.join(ORDER)}")
    parser.add_argument("--peers-only", action="store_true")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    parser.add_argument("--smoke", action="store_true", help="small rows, 2 steps, 1 round")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.rounds = 2, 1
    options.work = (options.work or Path("runs/bench-train" + ("-smoke" if options.smoke else ""))).absolute()
    return options


def main() -> int:
    options = parse()
    arms = options.arms.split(",") if options.arms else list(PEERS if options.peers_only else ORDER)
    modes = options.modes.split(",")
    if unknown := (set(arms) - set(ARMS)) | (set(modes) - set(train_inputs.MODES)):
        raise SystemExit(f"no such arm or mode: {', '.join(sorted(unknown))}")
    inputs = train_inputs.prepare(options.work, SMOKE if options.smoke else train_inputs.Settings())
    if options.steps > min(inputs["counts"][mode]["windows"] for mode in modes):
        raise SystemExit(f"the inputs have {inputs['counts'][modes[0]]['windows']} steps")
    found = {mode: measure(mode, arms, inputs, options) for mode in modes}
    for mode, part in found.items():
        print(f"\n{mode}: {part['trained_tokens_per_step'][0]:,} of {part['tokens_per_step'][0]:,} tokens of the first step are trained")
        print(train_results.table(part["arms"]))
        print(train_results.lines_of(part["ratios"]))
        for one in part["agreement"]:
            verdict = "agrees" if one["agree"] else "DOES NOT AGREE"
            print(f"loss of {one['arm']:<11} first step {one['first']:.1e}, mean {one['mean']:.1e}: {verdict}")
    agree = all(one["agree"] for part in found.values() for one in part["agreement"])
    if agree and not (options.arms or options.peers_only or options.smoke):
        body = {"what": __doc__.splitlines()[0], "settings": inputs["settings"], "steps": options.steps, "rounds": options.rounds,
                "threads": options.threads, "code": code_digest(), "modes": found}  # fmt: skip
        print(record.write("train_cpu", body))
        train_results.plot(found[modes[0]]["arms"], PICTURE, "SmolLM2-135M, LoRA rank 16, 4 x 512 packed tokens a step, 2 CPU threads")
    reached = all(one["reached"] is not False for part in found.values() for one in part["ratios"])
    print("losses agree" if agree else "losses do not agree: nothing is written", "| all bars reached" if reached else "| bars missed")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
