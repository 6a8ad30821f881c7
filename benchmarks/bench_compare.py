"""`halfbyte compare` on two real data sets with the starter model: full, LoRA, QLoRA and calibrated QLoRA, three seeds.

Data: `e2e_nlg` (meaning representation to text) and `gsm8k` (maths word problems), ROWS rows spread evenly over those of at most MAX_CHARS
characters; held out are HELD_OUT rows of the data sets' own test files, chosen the same way.  Rank 16, alpha 32, eight evaluations a run,
the plain template of bench_methods.py, each method at its own best rate of one sweep.  Rows, steps and seeds of a result stand in it.

Written per set: benchmarks/results/compare-<set>.json (the comparison with the header of all results, the ratios that are asked for, and
whether they hold) and docs/pages/comparison-<set>.html.

    python -m benchmarks.bench_compare [--work FOLDER] [--sets e2e_nlg,gsm8k] [--rows 800] [--jobs 1]      resumes what was stopped
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.bench_methods import MAX_CHARS, SETS, TEMPLATE, as_training_row
from halfbyte.studies.measures import interval
from halfbyte.studies.rows import spread_evenly

ROWS, HELD_OUT, SEEDS, SWEEP_ROWS = 800, 100, 3, 300
SCORES = {"e2e_nlg": ("rougeL", 48), "gsm8k": ("final_answer", 160)}
"""The task score of a set, and the longest answer in tokens."""
PAGES = record.ROOT / "docs" / "pages"
WITHIN = {"lora": 0.01, "qlora": 0.02, "qlora-calibrated": 0.01}
"""How far above full fine-tuning's held-out loss a method is wanted to stay (share)."""
FASTER = 0.7
"""Share of the steps in which the calibrated base is wanted to reach plain QLoRA's last held-out loss."""


def prepare(work: Path, name: str, rows: int, held_out: int) -> dict[str, Path]:
    """Write the template and the rows of a set, once: {"train", "eval", "template"}."""
    files = {part: work / f"{name}-{part}.jsonl" for part in ("train", "eval")} | {"template": work / "plain.jinja"}
    files["template"].write_text(TEMPLATE)
    for part, source, count in (("train", "train", rows), ("eval", "test", held_out)):
        lines = (record.SHARED / name / f"{source}.jsonl").read_bytes().splitlines()
        short = [row for row in map(as_training_row, map(json.loads, lines)) if len(json.dumps(row)) <= MAX_CHARS[name]]
        chosen = [short[number] for number in spread_evenly(short, count)]
        files[part].write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return files


def command(name: str, files: dict[str, Path], out: Path, options: argparse.Namespace) -> list[str]:
    """The command line of one set's comparison."""
    metric, longest = SCORES[name]
    return [
        sys.executable, "-m", "halfbyte", "compare", "--model", "starter", "--data", str(files["train"]), "--out", str(out),
        *settings(files["train"].with_name(f"{name}-settings.yaml"), options), "--seeds", str(options.seeds),
        "--sweep-rows", str(options.sweep_rows),
        "--score", metric, "--score-rows", str(options.score_rows), "--max-new-tokens", str(longest), "--jobs", str(options.jobs),
        f"data.eval_path={files['eval']}", f"model.template={files['template']}", "data.max_tokens=512", "data.long_rows=refuse",
        "lora.rank=16", "lora.alpha=32", "optim.warmup_share=0.05", "train.epochs=1", f"train.global_batch_size={options.batch}",
        "train.micro_batch_size=8", f"train.threads={options.threads}",
    ]  # fmt: skip


def settings(file: Path, options: argparse.Namespace) -> list[str]:
    """The methods by name, or as a file of settings that says at which rate each one's sweep begins."""
    if not options.rates:
        return ["--methods", options.methods]
    rates = dict(pair.split("=") for pair in options.rates.split(","))
    how = {"qlora-calibrated": "method: qlora, quant.calibrate: true"}
    lines = [f"{one}: {{{how.get(one, f'method: {one}')}, optim.learning_rate: {rates[one]}}}\n" for one in options.methods.split(",")]
    file.write_text("".join(lines))
    return ["--arms", str(file)]


def verdicts(comparison: dict[str, Any]) -> dict[str, Any]:
    """The ratios that are asked for, each with what was wanted and whether it holds; None where a setting is missing."""
    values = {arm["name"]: arm["values"] for arm in comparison["arms"] if arm["status"] == "finished"}
    found: dict[str, Any] = {}
    for name, most in WITHIN.items():
        if name in values and "full" in values:
            over = values[name]["eval_loss"] / values["full"]["eval_loss"] - 1
            pairs = zip(seeds_of(comparison, name), seeds_of(comparison, "full"), strict=True)
            found[f"{name}_over_full_held_out_loss"] = {
                "share": over, "wanted_at_most": most, "holds": over <= most,
                "share_95_percent_half_width": interval([own / full - 1 for own, full in pairs]),  # seed against seed
            }
    share = values.get("qlora-calibrated", {}).get("steps_to_target_share")
    if "qlora-calibrated" in values:
        holds = share is not None and share <= FASTER
        found["calibrated_steps_to_qlora_loss"] = {"share_estimate": share, "wanted_at_most": FASTER, "holds": holds}
    return found


def seeds_of(comparison: dict[str, Any], name: str) -> list[float]:
    """The last held-out loss of each seed of a setting."""
    return [seed["last_eval_loss"] for arm in comparison["arms"] if arm["name"] == name for seed in arm["seeds"]]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("runs/bench-compare"))
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--methods", default="full,lora,qlora,qlora-calibrated")
    parser.add_argument("--rates", default="", help="where each sweep begins, METHOD=RATE,...; without it at the defaults")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--batch", type=int, default=16, help="rows of an optimizer step")
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--sweep-rows", type=int, default=SWEEP_ROWS)
    parser.add_argument("--score-rows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--note", default="", help="what a reader of the result must know, such as other work on the machine")
    parser.add_argument("--dry", action="store_true", help="run, but write neither result nor page")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.sets.split(","):
        out = options.work / name
        done = subprocess.run(command(name, prepare(options.work, name, options.rows, options.held_out), out, options), check=False)
        if done.returncode:
            return done.returncode
        comparison = json.loads((out / "comparison.json").read_text())
        comparison["setting"]["data"] = Path(comparison["setting"]["data"]).name  # a result says nothing of this machine's folders
        for label, verdict in verdicts(comparison).items():
            print(f"{name}: {label}: {verdict}")
        if not options.dry:
            print(record.write(f"compare-{name}", {"set": name, "note": options.note, "asked": verdicts(comparison), **comparison}))
            PAGES.mkdir(parents=True, exist_ok=True)
            (PAGES / f"comparison-{name}.html").write_bytes((out / "comparison.html").read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
