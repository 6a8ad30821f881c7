"""The tour: make rows, ask the untouched model, train it with QLoRA, ask again, show both, and say what to type next.

Everything lands in one run folder, the rows included, so that a person sees the file format they will need for their own data:

    <run>/rows.jsonl, held_out.jsonl      <run>/adapter      <run>/report.html      and all that every run has

Stopped after a checkpoint, the same command goes on in the same folder.
The untouched model is the same 4-bit base with a fresh adapter, which changes nothing before its first step.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte import host
from halfbyte.config import RunConfig, load_config
from halfbyte.data.tokenize import Example
from halfbyte.errors import Interrupted
from halfbyte.evaluate.generation import score
from halfbyte.evaluate.prompts import prompt_of
from halfbyte.log import logger
from halfbyte.models.generate import generate
from halfbyte.pages import report
from halfbyte.quickstart import screen, task
from halfbyte.train import from_config, loop
from halfbyte.train.run_folder import RunFolder

OUT = Path("runs/quickstart")
STEPS = 40
SETTINGS: dict[str, Any] = {
    "method": "qlora", "model": "starter", "lora.rank": 16, "lora.alpha": 32, "optim.learning_rate": 2e-3, "train.max_steps": STEPS,
    "train.global_batch_size": 16, "train.eval_every_steps": STEPS // 2, "train.save_every_steps": STEPS // 2, "train.sample_prompts": 0,
}  # fmt: skip
LONGEST_ANSWER = 24  # tokens; the longest right answer has 19 with its end token
ROWS_AT_ONCE = 120
SHOWN = 8


@dataclass(frozen=True)
class Outcome:
    """What the tour showed: exact match (0..1) before and after and of the two tricks, time in seconds, memory in bytes."""

    folder: Path
    before: float
    after: float
    commonest: float
    copying: float
    seconds: float
    peak_bytes: int
    train_rows: int
    held_out_rows: int
    samples: list[dict[str, str]]

    def scores(self) -> dict[str, Any]:
        """The table of scores, as the report and the screen show it."""
        names = (
            ("always the commonest answer", self.commonest), ("repeating the request", self.copying),
            ("the untouched model", self.before), ("after QLoRA", self.after),
        )  # fmt: skip
        return {
            "title": f"Exact match on {self.held_out_rows} held-out requests",
            "columns": ["who answers", "exact match"],
            "rows": [[name, f"{100 * share:.1f} %"] for name, share in names],
            "note": "Right means equal to the letter. No held-out request, answer or combination of values was trained on.",
        }


def run(out: Path, *, seed: int = 0, picture: Path | None = None) -> Outcome:
    """The whole tour; prints what happens and the closing screen.  Raises what training raises."""
    began = time.monotonic()
    asked = out
    train, held_out = task.make(seed)
    resume = (begun := stopped_folder(out, train)) is not None
    out = begun or free_folder(out)
    config = (
        load_config(RunFolder(out).config, flags={"out": str(out)}) if resume else settings(out, seed, write_rows(out, train, held_out))
    )
    logger().info("quickstart: %d requests to learn from, %d held out, all made here; the run is in %s", len(train), len(held_out), out)
    prepared = from_config.prepare(config, resume=resume)
    examples = sorted(prepared.data.eval, key=lambda example: example.row)
    logger().info("asking the untouched model %d held-out requests", len(examples))
    before = answers(prepared.assembled, examples)
    try:
        loop.run(prepared.config, prepared.assembled, prepared.data, resume=resume)
    except Interrupted as stopped:
        options = ("" if asked == OUT else f" --out {asked}") + (f" --seed {seed}" if seed else "")
        again = f"halfbyte quickstart{options}" + ("" if options else ", or make quickstart,")
        raise Interrupted(
            stopped.rule, code=stopped.code, exit_code=stopped.exit_code, place=stopped.place,
            remedy=f"the same command goes on from there: {again}",
        ) from None  # fmt: skip
    logger().info("asking the trained model the same %d requests", len(examples))
    after = answers(prepared.assembled, examples)
    rows = [held_out[example.row] for example in examples]
    outcome = Outcome(
        out, exact_match(before, rows), exact_match(after, rows), task.commonest_share(held_out), task.copy_share(held_out),
        time.monotonic() - began, host.peak_rss_bytes(), len(train), len(rows), samples(rows, before, after),
    )  # fmt: skip
    write_results(outcome)
    screen.show(outcome, picture)
    return outcome


def stopped_folder(out: Path, train: Sequence[task.Row]) -> Path | None:
    """The first of `out`, `out`-2 ... in which a tour with these rows was stopped after a checkpoint; None where there is none."""
    rows = _lines(train).encode()
    number, found = 1, out
    while found.exists():
        file = found / "rows.jsonl"
        begun = RunFolder(found).config.is_file() and any((found / "checkpoints").glob("step-*"))
        if begun and not (found / "quickstart.json").exists() and file.is_file() and file.read_bytes() == rows:
            return found
        number += 1
        found = out.with_name(f"{out.name}-{number}")
    return None


def _lines(rows: Sequence[task.Row]) -> str:
    return "".join(json.dumps(row.messages()) + "\n" for row in rows)


def free_folder(out: Path) -> Path:
    """`out`, or `out`-2, `out`-3 ... when it is taken."""
    number, found = 1, out
    while found.exists():
        number += 1
        found = out.with_name(f"{out.name}-{number}")
    return found


def write_rows(out: Path, train: Sequence[task.Row], held_out: Sequence[task.Row]) -> tuple[Path, Path]:
    """rows.jsonl and held_out.jsonl in the run folder, in the `messages` shape."""
    RunFolder(out).open(resume=False)
    paths = out / "rows.jsonl", out / "held_out.jsonl"
    for path, rows in zip(paths, (train, held_out)):
        RunFolder(out).write_text(path, _lines(rows))
    return paths


def settings(out: Path, seed: int, files: tuple[Path, Path]) -> RunConfig:
    """The settings of the tour's training run; config.yaml in the run folder shows all of them."""
    places = {"data.path": str(files[0]), "data.eval_path": str(files[1]), "out": str(out), "train.seed": seed}
    return load_config(None, flags={**SETTINGS, **places}, origin="quickstart")


def answers(assembled: Any, examples: Sequence[Example]) -> list[str]:
    """The model's greedy answer to the prompt of each row."""
    prompts = [prompt_of(example) for example in examples]
    return generate(assembled.model, assembled.tokenizer, prompts, max_new_tokens=LONGEST_ANSWER, batch_size=ROWS_AT_ONCE)


def exact_match(found: Sequence[str], rows: Sequence[task.Row]) -> float:
    """Share of answers equal to the letter."""
    return score(found, [row.answer for row in rows], ["exact_match"])["exact_match"]


def samples(rows: Sequence[task.Row], before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
    """The first rows with both answers, for the screen and the report."""
    return [
        {"prompt": row.request, "reference": row.answer, "before": old, "after": new}
        for row, old, new in list(zip(rows, before, after))[:SHOWN]
    ]


def write_results(outcome: Outcome) -> None:
    """samples.json, scores.json, quickstart.json and the report."""
    folder = RunFolder(outcome.folder)
    folder.write_json(folder.samples, outcome.samples)
    folder.write_json(folder.path / "scores.json", outcome.scores())
    figures = {name: value for name, value in vars(outcome).items() if name not in ("folder", "samples")}
    folder.write_json(folder.path / "quickstart.json", figures)
    report.write(folder.path)
