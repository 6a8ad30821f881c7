"""Predicted against measured time of a training step on the CPU: methods, ranks, lengths, packing, micro-batches and activation policies.

    python -m benchmarks.bench_time [--work FOLDER] [--only NUMBER ...] [--smoke]      about eight minutes on two quiet cores; resumes

For each setting three processes follow each other: a calibration of this machine at the model's widths (`halfbyte plan --calibrate`), the
run (WARM_UP steps that do not count, then STEPS), and a calibration again.  So a drift of the machine shows in both (`drift`), and the
prediction is the mean of what the two calibrations say.  Rows are random tokens of lengths drawn evenly from a range, none dropped; the
step is the trainer's, over windows of one global batch.  Predicted and measured are seconds of an optimizer step; an epoch is as many of
them for both, so the ratio is that of the epochs.  Models: the starter, and a Llama of half its width with random weights.
A setting whose result lies in the work folder is not measured again unless the code has changed.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.bench_train import code_digest
from benchmarks.random_model import VOCABULARY, folder_of

SMALL: dict[str, Any] = {
    "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip
BASE: dict[str, Any] = {
    "model": "starter", "method": "qlora", "rank": 16, "shortest": 64, "longest": 256, "micro_batch_size": 4, "global_batch_size": 8,
    "policy": "keep", "packing": False, "labelled": 0.5,
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    {}, {"method": "lora", "shortest": 512, "longest": 512, "micro_batch_size": 2, "global_batch_size": 4},
    {"method": "full", "global_batch_size": 4}, {"rank": 128, "packing": True, "micro_batch_size": 1, "global_batch_size": 2},
    {"policy": "recompute", "micro_batch_size": 2}, {"model": "small", "method": "lora", "micro_batch_size": 8},
    {"model": "small", "rank": 64, "micro_batch_size": 1, "policy": "recompute_mlp"},
    {"model": "small", "method": "full", "micro_batch_size": 2},
]  # fmt: skip
SMOKE: dict[str, Any] = {"model": "small", "shortest": 16, "longest": 32, "micro_batch_size": 2, "global_batch_size": 2}
PACKED_TOKENS, ROWS = 512, 64
WARM_UP, STEPS = 2, 7
WITHIN, WANTED = 0.25, 6


def lengths_of(setting: dict[str, Any]) -> list[int]:
    """Tokens of each row, the same for every process."""
    rng = random.Random(0)
    return [rng.randint(setting["shortest"], setting["longest"]) for _ in range(ROWS)]


def run_config(setting: dict[str, Any], folder: str) -> Any:
    """The settings of a training run that is like this one."""
    from halfbyte.config.run import RunConfig

    adapter = {} if setting["method"] == "full" else {"lora": {"rank": setting["rank"]}}
    train = {"activations": setting["policy"], **{name: setting[name] for name in ("micro_batch_size", "global_batch_size")}}
    data = {"path": "-", "packing": setting["packing"]}
    return RunConfig.model_validate({"method": setting["method"], "data": data, "model": {"name": folder}, "train": train, **adapter})


def measure(setting: dict[str, Any], folder: str) -> dict[str, Any]:
    """Seconds of each counted step in this process."""
    import torch

    from halfbyte import devices, host
    from halfbyte.data.batches import Batches
    from halfbyte.data.packing import pack
    from halfbyte.data.tokenize import IGNORED, Example
    from halfbyte.models.assemble import assemble
    from halfbyte.models.heads import head_of
    from halfbyte.models.recompute import use_policy
    from halfbyte.optim.adamw import AdamW
    from halfbyte.train.step import train_step

    devices.set_threads(host.usable_cores())
    made = assemble(run_config(setting, folder))
    use_policy(made.model, setting["policy"])
    freed = devices.FreedMemory() if setting["packing"] else None
    optimizer = AdamW([{"params": [one for one in made.model.parameters() if one.requires_grad]}], lr=1e-5)
    optimizer.allocate()
    generator, examples = torch.Generator().manual_seed(0), []
    for number, length in enumerate(lengths_of(setting)):
        row = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        hidden = round(length * (1 - setting["labelled"]))
        examples.append(Example(row, [IGNORED] * hidden + row[hidden:], number, "-"))
    items = pack(examples, PACKED_TOKENS) if setting["packing"] else examples
    batches = Batches(items, micro_batch_size=setting["micro_batch_size"], global_batch_size=setting["global_batch_size"], seed=0, pad_id=0)
    windows = (window for epoch in range(100) for window in batches.epoch(epoch))
    head, seconds = head_of(made.model), []
    for step in range(WARM_UP + STEPS):
        window = next(windows)
        began = time.perf_counter()
        train_step(made.model, head, window, optimizer, clip_norm=1.0)
        if freed is not None:
            freed.bound()
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - began)
    return {"seconds": seconds}


def predict(setting: dict[str, Any], folder: str) -> float:
    """Seconds of a step from the rates in the cache folder; needs no torch."""
    from halfbyte.models.source import resolve
    from halfbyte.plan.answer import compute_dtype
    from halfbyte.plan.decide import Decision, RowsSeen, with_time
    from halfbyte.plan.hardware import processor
    from halfbyte.plan.rates import nearest_rates, read_all
    from halfbyte.plan.search import option
    from halfbyte.plan.setting import Setting
    from halfbyte.shape import ModelShape

    config, place = run_config(setting, folder), processor()
    shape, lengths, dtype = ModelShape.read(resolve(folder).folder), lengths_of(setting), compute_dtype(place)
    tokens = PACKED_TOKENS if setting["packing"] else max(lengths)
    planned = Setting.of(
        config, dtype=dtype, tokens=tokens, micro_batch_size=setting["micro_batch_size"], policy=setting["policy"], device="cpu",
        trained_share=setting["labelled"],
    )  # fmt: skip
    decision = Decision(config, (), option(shape, planned, place), place, shape, RowsSeen(tuple(lengths), 0, setting["labelled"], tokens))
    seconds = with_time(decision, nearest_rates(shape, dtype, read_all())).seconds_per_step
    assert seconds is not None
    return seconds


def calibrated(setting: dict[str, Any], folder: str) -> float:
    """Calibrate now, and what a step takes by that."""
    from halfbyte.models.source import resolve
    from halfbyte.plan.answer import compute_dtype
    from halfbyte.plan.hardware import processor
    from halfbyte.plan.rates import measure as measure_rates
    from halfbyte.shape import ModelShape

    measure_rates(ModelShape.read(resolve(folder).folder), compute_dtype(processor()))
    return predict(setting, folder)


def one_setting(number: int, setting: dict[str, Any], options: argparse.Namespace, code: str) -> dict[str, Any]:
    """Calibration, run, calibration; or the result of before."""
    path = options.work / f"{number}.json"
    if path.exists():
        known = json.loads(path.read_text())
        if known["code"] == code and known["setting"] == setting:
            return dict(known)
    folder = folder_of(options.work / setting["model"], None if setting["model"] == "starter" else SMALL)
    before = calibrated(setting, folder)
    command = [sys.executable, "-m", "benchmarks.bench_time", "--one", json.dumps({"setting": setting, "folder": folder})]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=record.ROOT)
    if ran.returncode != 0:
        raise SystemExit(f"{setting} failed:\n{ran.stderr[-2000:]}")
    line = next(line for line in ran.stdout.splitlines() if line.startswith("result "))
    seconds = json.loads(line.removeprefix("result "))["seconds"]
    after = calibrated(setting, folder)
    measured, predicted = statistics.median(seconds), (before + after) / 2
    found = {
        "setting": setting, "measured_seconds": measured, "predicted_seconds": predicted, "predicted_over_measured": predicted / measured,
        "predictions": [before, after], "drift": after / before, "seconds": seconds, "load": os.getloadavg()[0], "code": code,
    }  # fmt: skip
    path.write_text(json.dumps(found) + "\n")
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=record.ROOT / "runs" / "bench-time", help="folder for models and single results")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings; then nothing is written into results/")
    parser.add_argument("--smoke", action="store_true", help="one small setting, to see that everything runs")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.one is not None:
        print("result " + json.dumps(measure(options.one["setting"], options.one["folder"])))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    code, rows = code_digest(), []
    changes = [SMOKE] if options.smoke else CHANGES
    for number, change in enumerate(changes):
        if options.only is not None and number not in options.only:
            continue
        row = one_setting(number, {**BASE, **change}, options, code)
        rows.append(row)
        print(
            f"{number} {change or 'base'!s:<100} measured {row['measured_seconds']:.2f} s  predicted x {row['predicted_over_measured']:.2f}"
            f"  drift x {row['drift']:.2f}", flush=True,
        )  # fmt: skip
    good = sum(abs(row["predicted_over_measured"] - 1) <= WITHIN for row in rows)
    print(f"within 25 %: {good} of {len(rows)}")
    if options.only is None and not options.smoke:
        print(record.write("time", {"within_25_percent": good, "wanted": WANTED, "settings": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
