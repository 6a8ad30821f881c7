"""Calibrated NF4 against plain NF4, LoftQ and QPiSSA on the starter model: KL from the unquantized model, and perplexity.

Every arm quantizes the same 210 layers to NF4, block 64, double quantization; arms with a low-rank part have rank 16.  Calibration reads
20 pieces of 256 tokens (every fifth one only judges), drawn with three seeds; 12 other pieces (3,072 tokens) of the same domain and of
another one are held out.  The starter's weights were 4-bit before it came here (Q4_1), which favours formats near that one, so all is
repeated in a rotated basis, where the weights are not on that lattice: a control for the order of the arms, not a better model.

    python -m benchmarks.bench_calibrated [--work FOLDER]     resumes: an arm whose numbers are in FOLDER is not measured again
    python -m benchmarks.bench_calibrated --write             only writes down what FOLDER holds so far, seeds that are finished
    python -m benchmarks.bench_calibrated --page              only puts the committed figures into docs/calibrated.md
    python -m benchmarks.bench_calibrated --time-only         measures how long `halfbyte quantize --calibrate` takes, and adds it

Numbers of quality do not depend on the machine's load; the time does.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import calibrated_arms as arms
from benchmarks import record
from benchmarks.calibrated_page import PAGE, with_figures
from halfbyte.models.load import load_model, load_tokenizer
from halfbyte.models.source import resolve

SEEDS = (0, 1, 2)
ROTATION = 0
SETS = {"prose": ("prose", "code"), "gsm8k": ("gsm8k", "prose")}
"""Domain of calibration -> held-out texts: of the same domain, of another."""
BARS = {"scales": (0.65, 0.75), "scales and start": (0.40, 0.45)}
"""Arm -> largest KL as a share of plain NF4's: same domain, other domain."""


class Notes:
    """Numbers of finished arms, one JSON file each, so that a broken-off run goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, *key: object) -> Path:
        return self.folder / ("-".join(str(part).replace(" ", "_") for part in key) + ".json")

    def has(self, *key: object) -> bool:
        return self.path(*key).exists()

    def put(self, value: object, *key: object) -> None:
        self.path(*key).write_text(json.dumps(value))
        print(*key, value, flush=True)

    def get(self, *key: object) -> Any:
        return json.loads(self.path(*key).read_text())


def measure(notes: Notes, basis: str, calibration: str, seeds: tuple[int, ...]) -> None:
    """All arms of one basis and one domain of calibration."""
    held_out = SETS[calibration]
    wanted = [(arm, 0) for arm in arms.ONCE] + [(arm, seed) for seed in seeds for arm in ("scales", "start", "scales and start")]
    if all(notes.has(basis, calibration, text, arm, seed) for arm, seed in wanted for text in held_out):
        return
    source = resolve("starter")
    model, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
    rows = {text: arms.rows_of(tokenizer, text, "held out", arms.HELD_OUT_ROWS) for text in held_out}
    if basis == "rotated":
        with torch.inference_mode():
            before = model.lm_head(arms.states_of(model, rows[calibration][:1])[0])
            arms.rotate(model, ROTATION)
            after = model.lm_head(arms.states_of(model, rows[calibration][:1])[0])
        notes.put({"largest_logit_change": float((after - before).abs().max())}, basis, calibration, "rotation")
    reference = {text: arms.states_of(model, rows[text]) for text in held_out}
    for text in held_out:
        notes.put(arms.compare(model, rows[text], reference[text], reference[text]), basis, calibration, text, "unquantized", 0)
    weights = arms.weights_of(model)

    def judge(arm: str, seed: int, made: arms.Arm) -> None:
        with arms.put_in(model, made):
            found = {text: arms.states_of(model, rows[text]) for text in held_out}
        for text in held_out:
            notes.put(arms.compare(model, rows[text], reference[text], found[text]), basis, calibration, text, arm, seed)

    for arm, make in arms.ONCE.items():
        if not all(notes.has(basis, calibration, text, arm, 0) for text in held_out):
            judge(arm, 0, make(weights))
    for seed in seeds:
        names = ("scales", "start", "scales and start")
        if all(notes.has(basis, calibration, text, arm, seed) for arm in names for text in held_out):
            continue
        calibration_rows = arms.rows_of(tokenizer, calibration, "calibration", arms.CALIBRATION_ROWS, seed)
        for arm, made in arms.calibrated(model, weights, calibration_rows, seed).items():
            judge(arm, seed, made)


def table(notes: Notes, basis: str, calibration: str, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row for each held-out text and arm: means over the finished seeds, the smallest and the largest; none where an arm has none."""
    made: list[dict[str, Any]] = []
    finished = [
        seed for seed in seeds
        if all(notes.has(basis, calibration, text, arm, seed) for text in SETS[calibration] for arm in ("start", *BARS))
    ]  # fmt: skip
    if not finished or not all(notes.has(basis, calibration, text, arm, 0) for text in SETS[calibration] for arm in arms.ONCE):
        return []
    for text in SETS[calibration]:
        plain = notes.get(basis, calibration, text, "nf4", 0)["kl_nats"]
        for arm in ("unquantized", *arms.ONCE, "scales", "start", "scales and start"):
            runs = [notes.get(basis, calibration, text, arm, seed) for seed in (finished if arm in ("start", *BARS) else (0,))]
            kls = [run["kl_nats"] for run in runs]
            made.append({
                "basis": basis, "calibrated_on": calibration, "held_out_text": text, "same_domain": text == calibration, "arm": arm,
                "seeds": len(runs), "kl_nats": statistics.mean(kls), "kl_nats_range": [min(kls), max(kls)],
                "kl_share_of_nf4": statistics.mean(kls) / plain, "kl_share_of_nf4_range": [min(kls) / plain, max(kls) / plain],
                "perplexity": statistics.mean(run["perplexity"] for run in runs), "positions": runs[0]["positions"],
            })  # fmt: skip
    return made


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bar with the largest share over the seeds; it is met when that is below it.  The rotated basis has no bars, only an order."""
    return [
        {**{key: row[key] for key in ("calibrated_on", "held_out_text", "arm")}, "bar": BARS[row["arm"]][0 if row["same_domain"] else 1],
         "largest_share": row["kl_share_of_nf4_range"][1],
         "met": row["kl_share_of_nf4_range"][1] <= BARS[row["arm"]][0 if row["same_domain"] else 1]}
        for row in rows if row["basis"] == "as distributed" and row["arm"] in BARS
    ]  # fmt: skip


def calibration_seconds(threads: int, rank: int) -> dict[str, Any]:
    """Seconds of one whole `quantize --calibrate` of the starter: 128 rows of gsm8k, loading and writing included."""
    from halfbyte import api

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        made = api.quantize("starter", Path(folder) / "out", calibrate=record.SHARED / "gsm8k" / "train.jsonl", start_rank=rank)
        seconds = time.monotonic() - began
    assert made.quality is not None
    return {
        "seconds": seconds, "threads": threads, "start_rank": rank, "rows": made.quality.rows, "tokens": made.quality.tokens,
        "bits_per_parameter": made.quality.means()["bits_per_parameter"], "bar_seconds": 180, "met": seconds < 180, **record.header(),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("runs/bench-calibrated"))
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    path = record.RESULTS / "calibrated.json"

    def written() -> dict[str, Any]:
        return json.loads(path.read_text()) if path.exists() else {}

    if options.page:
        PAGE.write_text(with_figures(PAGE.read_text(), written()))
        return 0
    if options.time_only:
        took = calibration_seconds(options.threads, arms.RANK)
        path.write_text(json.dumps({**written(), "calibration_time": took}, indent=1) + "\n")
        print(f"{took['seconds']:.0f} s for {took['tokens']:,} tokens on {took['threads']} threads")
        return 0
    torch.set_num_threads(options.threads)
    notes = Notes(options.work)
    plan = [("as distributed", "prose", SEEDS), ("rotated", "prose", SEEDS[:1]), ("as distributed", "gsm8k", SEEDS)]
    rows: list[dict[str, Any]] = []
    for basis, calibration, seeds in plan:
        if not options.write:
            measure(notes, basis, calibration, seeds)
        rows += table(notes, basis, calibration, seeds)
        body: dict[str, Any] = {
            "model": "starter (SmolLM2-135M-Instruct from Q4_1), float32", "layers": "all linear layers of the backbone, NF4, block 64, DQ",
            "rank": arms.RANK, "loftq_rounds": arms.LOFTQ_ROUNDS, "calibration_tokens": arms.CALIBRATION_ROWS * arms.LENGTH,
            "of_them_judging": arms.CALIBRATION_ROWS // 5 * arms.LENGTH, "held_out_tokens": arms.HELD_OUT_ROWS * arms.LENGTH,
            "rotation_changes_logits_by_at_most": notes.get("rotated", "prose", "rotation")["largest_logit_change"]
            if notes.has("rotated", "prose", "rotation") else None,
            "piece_tokens": arms.LENGTH, "python_texts": sys.version.split()[0], "bars": verdicts(rows), "table": rows,
        }  # fmt: skip
        if "calibration_time" in (kept := written()):
            body["calibration_time"] = kept["calibration_time"]
        record.write("calibrated", body)
    for row in rows:
        print(f"{row['basis']:<15} {row['calibrated_on']:<6} {row['held_out_text']:<6} {row['arm']:<17} KL {row['kl_nats']:.4f} nats "
              f"({row['kl_share_of_nf4']:.3f} of NF4)  perplexity {row['perplexity']:.2f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
