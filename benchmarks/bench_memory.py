"""Predicted against measured peak memory on the CPU: methods, ranks, lengths, labels, packing, activation policies and model shapes.

    python -m benchmarks.bench_memory [--only NUMBER ...] [--work FOLDER]      about half an hour on two cores; resumes

Each setting is a run of `halfbyte train` from its start to its report: three optimizer steps on rows of random tokens, with evaluations
and checkpoints.  Measured is the most resident memory the process had in all of it (VmHWM), which is what the run tells its user.
Beside it stands what `halfbyte plan` says for the same setting, with its one measured number (the program's own memory) and no other.
That number is measured here as well (`program_bytes`): what the same run holds for a model of next to no size.  Models: the starter,
and two with random weights whose proportions are those of a wide and of a narrow, deep decoder.

Kernels are compiled before (a setting that had to compile is measured again).  `said_bytes` is what the run's own plan said when it was
measured; a setting where that is not what is predicted here is an error.
`policies` compares, for each activation policy, the peak with what its formula says (docs/memory.md).
`fits_wrongly` counts settings whose measured peak is above what the plan would have called enough, its margin included.
A setting that was measured with the same code is not measured again; predictions are always made afresh.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks import record
from benchmarks.random_model import VOCABULARY, folder_of
from halfbyte.plan.hardware import PROGRAM_BYTES

MODELS: dict[str, dict[str, Any] | None] = {
    "starter": None,
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4},
    "deep": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 6, "num_key_value_heads": 6},
    "none": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
}
BASE: dict[str, Any] = {
    "model": "starter", "method": "qlora", "rank": 16, "tokens": 512, "rows": 4, "policy": "keep", "state": "float32", "dtype": "bfloat16",
    "labelled": 1.0, "packing": False,
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    {}, {"method": "lora"}, {"method": "full", "rows": 2}, {"dtype": "float32"}, {"method": "lora", "dtype": "float32"},
    {"rank": 4}, {"rank": 64}, {"rank": 256}, {"rank": 256, "state": "int8"}, {"method": "full", "rows": 2, "state": "int8"},
    {"tokens": 128}, {"tokens": 1024}, {"tokens": 2048, "rows": 1}, {"rows": 1}, {"rows": 8},
    {"policy": "recompute_mlp"}, {"policy": "recompute"}, {"policy": "recompute", "tokens": 2048, "rows": 2}, {"policy": "offload"},
    {"labelled": 0.25}, {"packing": True}, {"packing": True, "policy": "recompute"},
    {"model": "wide"}, {"model": "wide", "method": "lora", "tokens": 1024, "rows": 2}, {"model": "wide", "policy": "recompute"},
    {"model": "wide", "policy": "recompute_mlp"}, {"model": "deep"}, {"model": "deep", "policy": "recompute", "rows": 8},
]  # fmt: skip
PROGRAM: dict[str, Any] = {**BASE, "model": "none", "rank": 1, "tokens": 64, "rows": 1}
STEPS = 3
ALLOWED = {"prediction": 0.10, "policy": 0.15}


def run_config(setting: dict[str, Any], folder: str, rows: str = "-") -> Any:
    """The settings of a training run that is like this one."""
    from halfbyte.config.run import RunConfig

    adapter = {} if setting["method"] == "full" else {"lora": {"rank": setting["rank"]}}
    held_out = setting["rows"] * (4 if setting["packing"] else 1)
    return RunConfig.model_validate({
        "method": setting["method"],
        "model": {"name": folder, "dtype": setting["dtype"]},
        "data": {"path": rows, "packing": setting["packing"], "max_tokens": setting["tokens"], "eval_rows": held_out},
        "optim": {"state": setting["state"]},
        "train": {"activations": setting["policy"], "global_batch_size": setting["rows"], "micro_batch_size": setting["rows"]}, **adapter,
    })  # fmt: skip


def write_rows(path: Path, setting: dict[str, Any]) -> None:
    """Rows of random tokens for the steps and one batch held out; where they are packed, four fill a row."""
    length = setting["tokens"] // 4 if setting["packing"] else setting["tokens"]
    count = (STEPS + 1) * setting["rows"] * (4 if setting["packing"] else 1)
    draw, hidden = random.Random(0), round(length * (1 - setting["labelled"]))
    rows = ([draw.randrange(VOCABULARY) for _ in range(length)] for _ in range(count))
    path.write_text("".join(json.dumps({"input_ids": row, "labels": [-100] * hidden + row[hidden:]}) + "\n" for row in rows))


def compiled_kernels() -> int:
    """Kernels in the cache folder."""
    from halfbyte import env

    return sum(1 for _ in (env.cache_dir() / "kernels").rglob("*"))


def measure(setting: dict[str, Any], folder: str, threads: int) -> dict[str, Any]:
    """`halfbyte train` in a process of its own: what its plan said, and the most memory it had."""
    with tempfile.TemporaryDirectory() as work:
        rows, out = Path(work) / "rows.jsonl", Path(work) / "run"
        write_rows(rows, setting)
        settings = run_config(setting, folder, str(rows)).model_dump(mode="json", exclude_unset=True)
        settings |= {"out": str(out), "train": {**settings["train"], "threads": threads, "max_steps": STEPS}}
        (Path(work) / "run.yaml").write_text(yaml.safe_dump(settings))
        before = compiled_kernels()
        command = [sys.executable, "-m", "halfbyte", "train", f"{work}/run.yaml"]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=record.ROOT)
        if ran.returncode != 0:
            raise SystemExit(f"{setting} failed:\n{ran.stdout[-1000:]}{ran.stderr[-2000:]}")
        said, done = json.loads((out / "plan.json").read_text()), json.loads((out / "run.json").read_text())
        found = {"measured_bytes": done["peak_memory_bytes"], "said_bytes": said["predicted_peak_bytes"]}
        return {**found, "compiled": compiled_kernels() - before}


def predict(setting: dict[str, Any], folder: str) -> dict[str, Any]:
    """What the plan says; needs no torch."""
    from dataclasses import replace

    from halfbyte.models.source import resolve
    from halfbyte.plan.hardware import MARGIN
    from halfbyte.plan.memory import plan_memory
    from halfbyte.plan.setting import Setting
    from halfbyte.shape import ModelShape

    planned = Setting.of(
        run_config(setting, folder), dtype=setting["dtype"], tokens=setting["tokens"], micro_batch_size=setting["rows"],
        policy=setting["policy"], device="cpu",
    )  # fmt: skip
    planned = replace(planned, trained_share=setting["labelled"])
    memory = plan_memory(ModelShape.read(resolve(folder).folder), planned, PROGRAM_BYTES["cpu"])
    return {
        "predicted_bytes": memory.total, "enough_bytes": round(memory.total * (1 + MARGIN["cpu"])), "peak": memory.peak,
        "terms": {term.name: term.bytes for term in memory.terms},
    }  # fmt: skip


def code_digest() -> str:
    """Identity of the code whose memory is measured."""
    digest = hashlib.sha256(str(STEPS).encode())
    for file in sorted((record.ROOT / "halfbyte").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def measured(setting: dict[str, Any], folder: str, options: argparse.Namespace, again: bool = True) -> dict[str, Any]:
    """The figures of a setting, from the work folder where they are there."""
    key = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:12]
    path, code = options.work / f"{key}.json", code_digest()
    if path.exists():
        found = json.loads(path.read_text())
        if options.any_code or (found["code"], found["threads"]) == (code, options.threads):
            return dict(found["figures"])
    figures = measure(setting, folder, options.threads)
    if figures["compiled"] and again:
        return measured(setting, folder, options, again=False)
    path.write_text(json.dumps({"code": code, "threads": options.threads, "setting": setting, "figures": figures}) + "\n")
    return dict(figures)


def policies(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each policy: in how many settings it was measured, and how far its formula was off at most."""
    table = {}
    for name in dict.fromkeys(row["setting"]["policy"] for row in rows):
        off = [row["predicted_over_measured"] - 1 for row in rows if row["setting"]["policy"] == name]
        most = max(off, key=abs)
        table[name] = {"settings": len(off), "largest_difference": most, "within_15_percent": abs(most) <= ALLOWED["policy"]}
    return table


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the lines of the plan ask for."""
    off = [abs(row["predicted_over_measured"] - 1) for row in rows]
    return {
        "settings": len(rows), "within_10_percent": sum(value <= ALLOWED["prediction"] for value in off), "largest_difference": max(off),
        "fits_wrongly": sum(row["measured_bytes"] > row["enough_bytes"] for row in rows), "policies": policies(rows),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings; then nothing is written into results/")
    parser.add_argument("--work", type=Path, default=record.ROOT / "runs" / "bench-memory", help="folder for models and single results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--any-code", action="store_true", help="take what was measured with other code too; then nothing is written")
    return parser.parse_args()


def main() -> int:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    nothing = measured(PROGRAM, folder_of(options.work / "none", MODELS["none"]), options)
    program = nothing["measured_bytes"] - sum(
        size for name, size in predict(PROGRAM, folder_of(options.work / "none", MODELS["none"]))["terms"].items() if name != "program"
    )
    print(f"program {program / 2**20:.0f} MiB; the plan takes {PROGRAM_BYTES['cpu'] / 2**20:.0f} MiB", flush=True)
    for number, change in enumerate(CHANGES):
        if options.only is not None and number not in options.only:
            continue
        setting = {**BASE, **change}
        folder = folder_of(options.work / setting["model"], MODELS[setting["model"]])
        figures = {**measured(setting, folder, options), **predict(setting, folder)}
        ratio = figures["predicted_bytes"] / figures["measured_bytes"]
        rows.append({"setting": setting, **figures, "predicted_over_measured": ratio})
        size = f"{figures['measured_bytes'] / 2**20:7.0f} MiB"
        print(f"{number:>2} {change or 'base'!s:<60} measured {size}  predicted x {ratio:.3f}", flush=True)
    found = {"program_bytes": program, "program_bytes_of_the_plan": PROGRAM_BYTES["cpu"], **summary(rows)}
    print(json.dumps(found, indent=1))
    if options.only is None and not options.any_code:
        print(record.write("memory", {"threads": options.threads, **found, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
