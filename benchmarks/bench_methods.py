"""Full fine-tuning, LoRA and QLoRA of the starter model on two real data sets: held-out loss, size, time and memory.

Data: `e2e_nlg` (meaning representation to text) and `gsm8k` (maths word problems), ROWS rows spread evenly over those of at most
MAX_CHARS characters; held out are HELD_OUT rows of the data sets' own test files, chosen the same way.  A plain template (TEMPLATE)
without the model's long system prompt keeps the runs within an hour on two cores.  Every method gets the same rows in
the same order, the same number of steps and the same seed, and its own learning rate: for the adapters ten times that of full
fine-tuning, as published for LoRA (https://thinkingmachines.ai/blog/lora/).  Each run is one process of the command line, so its peak
memory is its own; it computes with one thread, two runs go side by side, and the time reported is processor seconds of the run, so that
the two do not disturb each other.

    python -m benchmarks.bench_methods [--work FOLDER]        resumes: a run whose run.json is there is not repeated
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import record

ROWS, HELD_OUT = 1500, 200
MAX_CHARS = {"e2e_nlg": 2000, "gsm8k": 440}
TEMPLATE = "{% for m in messages %}{{ m['content'] + ('\\n' if m['role'] == 'user' else '<|im_end|>\\n') }}{% endfor %}"
RATES = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}
SETS = ("e2e_nlg", "gsm8k")


def as_training_row(row: dict) -> dict:
    """One row in a shape the trainer reads; a test row with several references keeps the first."""
    if "references" in row:
        return {"prompt": row["prompt"], "completion": row["references"][0]}
    return row


def prepare(work: Path) -> dict[str, dict[str, Path]]:
    """Write the rows used, once: {set: {"train", "eval"}}."""
    (work / "plain.jinja").write_text(TEMPLATE)
    files: dict[str, dict[str, Path]] = {}
    for name in SETS:
        files[name] = {}
        for part, source, count in (("train", "train", ROWS), ("eval", "test", HELD_OUT)):
            rows = [as_training_row(json.loads(line)) for line in (record.SHARED / name / f"{source}.jsonl").open(encoding="utf-8")]
            short = [row for row in rows if len(json.dumps(row)) <= MAX_CHARS[name]]
            step = max(1, len(short) // count)
            path = work / f"{name}-{part}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in short[::step][:count]))
            files[name][part] = path
    return files


def train(work: Path, name: str, method: str, learning_rate: float, data: Path, held_out: Path) -> dict:
    """One training run in a process of its own; returns its run.json."""
    out = work / name
    if not (work / f"{name}.cpu").exists():
        command = [
            sys.executable, "-m", "halfbyte", "train", "--model", "starter", "--data", str(data), "--method", method, "--out", str(out),
            f"data.eval_path={held_out}", f"optim.learning_rate={learning_rate}", "optim.warmup_share=0.05",
            "train.eval_every_steps=100000", "train.save_every_steps=null", "train.epochs=1", "train.micro_batch_size=8",
            "train.global_batch_size=16", f"model.template={work / 'plain.jinja'}", "train.threads=1",
            "train.sample_prompts=0", "data.long_rows=refuse", "data.max_tokens=512",
        ]  # fmt: skip
        if method != "full":
            command += ["lora.rank=16", "lora.alpha=32"]
        with (work / f"{name}.log").open("w") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, usage = os.wait4(child.pid, 0)
        if status != 0:
            raise SystemExit(f"{name} failed; see {work / name}.log")
        (work / f"{name}.cpu").write_text(str(usage.ru_utime + usage.ru_stime))
    return {**json.loads((out / "run.json").read_text()), "processor_seconds": float((work / f"{name}.cpu").read_text())}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("runs/bench-methods"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    files = prepare(options.work)
    wanted = [(name, method) for name in SETS for method in RATES]
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(
            lambda pair: train(options.work, "-".join(pair), pair[1], RATES[pair[1]], files[pair[0]]["train"], files[pair[0]]["eval"]),
            wanted,
        )
        table = [{"set": name, "method": method, **run} for (name, method), run in zip(wanted, runs, strict=True)]
    loss = {(row["set"], row["method"]): row["last_eval_loss"] for row in table}
    ratios = {name: loss[name, "qlora"] / loss[name, "lora"] for name in SETS}
    body = {
        "rows": ROWS, "held_out_rows": HELD_OUT, "max_chars": MAX_CHARS, "learning_rates": RATES,
        "qlora_over_lora_held_out_loss": ratios, "runs": table,
    }  # fmt: skip
    print(record.write("methods", body))
    for row in table:
        print(f"{row['set']:<8} {row['method']:<6} held-out loss {row['last_eval_loss']:.4f}")
    print("QLoRA / LoRA held-out loss:", {name: round(ratio, 4) for name, ratio in ratios.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
