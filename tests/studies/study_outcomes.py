"""Outcomes of a small comparison written by hand, with numbers that are easy to check."""

from pathlib import Path
from typing import Any

from halfbyte.config import load_config
from halfbyte.studies.arms import Arm
from halfbyte.studies.compare import Outcome, Results, Score, Study

HOSTILE = "<script>alert(1)</script>\x1b[31m"


def run(losses: list[float], **changes: Any) -> dict[str, Any]:
    """The outcome of one run whose held-out losses at steps 0, 10, 20 ... are given."""
    values = {
        "status": "finished", "steps": 10 * (len(losses) - 1), "total_steps": 20, "tokens": 1000, "seconds": 75.0,
        "tokens_per_second": 512.0, "peak_memory_bytes": 3 * 2**29, "weight_bytes": 2**28, "trainable_params": 1_000_000,
        "total_params": 100_000_000, "trainable_share": 0.01, "first_eval_loss": losses[0], "last_eval_loss": losses[-1], "rate": 5e-4,
        "threads": 2, "jobs": 1, "max_tokens": 256, "micro_batch_size": 8, "adapter_bytes": 4_000_000,
        "curve": [[10 * number, loss] for number, loss in enumerate(losses)], "machine": {"cpu": "a processor", "cores": 2},
    }  # fmt: skip
    return {**values, **changes}


def judged(after: float, score: float | None, before: float | None = None, word: str = "an answer") -> dict[str, Any]:
    """How one run was judged."""
    found: dict[str, Any] = {"general_after": after}
    if score is not None:
        found["score"] = score
    if before is not None:
        found |= {"general_before": before, "answers": [{"prompt": f"asked {word}", "reference": f"right {word}", "answer": word}]}
    return found


def outcome(name: str, runs: list[dict[str, Any]], judges: list[dict[str, Any]], *, method: str = "lora", **changes: Any) -> Outcome:
    """One setting with its sweep."""
    config = load_config(None, [f"method={method}", "data=rows.jsonl"])
    sweep = {
        "points": [
            {"rate": 5e-4, "before": 3.0, "after": 2.0, "seconds": 9.0}, {"rate": 1.5e-3, "before": 3.0, "after": None, "seconds": 1.0},
        ],
        "reasons": ["chosen: the lowest held-out loss", "out: diverged"], "rate": 5e-4, "rows": 300, "steps": 19,
    }  # fmt: skip
    return Outcome(Arm(name, {"method": method}, config), "finished", sweep, runs, judges, **changes)


def results(word: str = "an answer", names: tuple[str, str, str] = ("full", "lora", "qlora"), data: str = "rows.jsonl") -> Results:
    """Full, LoRA and QLoRA with three seeds."""
    full = outcome(
        names[0], [run([3.0, 2.1, loss], adapter_bytes=None, model_bytes=2**28) for loss in (1.9, 2.0, 2.1)],
        [judged(3.5, 0.5, 3.0, word), judged(3.6, 0.6), judged(3.7, 0.7)], method="full",
    )  # fmt: skip
    lora = outcome(
        names[1], [run([3.0, 1.8, 1.7]) for _ in range(3)], [judged(3.2, 0.5, 3.0, word), judged(3.2, 0.5), judged(3.2, 0.5)]
    )
    qlora = outcome(
        names[2], [run([3.2, 2.6, 2.4], peak_memory_bytes=2**30 + seed) for seed in range(3)],
        [judged(3.4, 0.4, 3.3, word), judged(3.4, 0.4), judged(3.4, 0.4)], method="qlora",
    )  # fmt: skip
    counts = {"train": 800, "held-out": 100, "sweep-train": 300, "sweep-held-out": 99}
    found = {"source": data, "digest": "0" * 64, "sweep_apart": True, **counts}
    study = Study(tuple(one.arm for one in (full, lora, qlora)), score=Score("rougeL", 40, 64))
    return Results(study, found, "40 pieces of prose", [full, lora, qlora])


def write_page(folder: Path, word: str = "an answer") -> Path:
    """The four files of this comparison, with `word` wherever foreign text can stand; returns the page."""
    from halfbyte.studies import comparison, comparison_files

    names = (f"full{word}", f"lora{word}", f"qlora{word}") if word != "an answer" else ("full", "lora", "qlora")
    made = comparison.numbers(results(word, names, f"{word}/rows.jsonl" if "/" not in word else word))
    made["setting"] |= {"model": word, "general_text": word, "machine": {"cpu": word}, "versions": {word: word}}
    return comparison_files.write(made, folder)
