"""The tables of docs/compare.md, every number from benchmarks/results/compare-<set>.json.

    python -m benchmarks.compare_page     writes them between the page's markers
"""

import json
import sys
from typing import Any

from benchmarks import record
from halfbyte.studies.comparison_files import lines

PAGE = record.ROOT / "docs" / "compare.md"
SETS = {"e2e_nlg": "e2e_nlg, meaning to text", "gsm8k": "gsm8k, word problems"}
BEGIN, END = "<!-- figures -->\n", "<!-- /figures -->"
HEAD = """
**{title}**: {train_rows} rows to train on and {held_out_rows} held out, {batch} rows a step, {seeds} seeds, rates from sweeps over
{sweep_rows} of the rows. Runs had {threads} thread(s) each and went {jobs} at a time on {device}.{note}
[The page of this comparison](pages/comparison-{name}.html), `benchmarks/results/compare-{name}.json`.

"""
ASKED = {
    "lora_over_full_held_out_loss": "LoRA's held-out loss over full fine-tuning's",
    "qlora_over_full_held_out_loss": "QLoRA's", "qlora-calibrated_over_full_held_out_loss": "calibrated QLoRA's",
}  # fmt: skip


def asked(body: dict[str, Any]) -> str:
    """The ratios in a sentence, each with its interval over the seeds."""
    found = body["asked"]
    parts = [f"{words} {100 * found[key]['share']:+.2f} %{_width(found[key])}" for key, words in ASKED.items() if key in found]
    share = found.get("calibrated_steps_to_qlora_loss", {}).get("share_estimate")
    steps = f" From the calibrated base QLoRA's last held-out loss is reached in {share:.2f} of its steps (estimate)." if share else ""
    return f"{', '.join(parts)}: means, with the 95 % interval over the seeds, seed against seed.{steps}\n"


def _width(ratio: dict[str, Any]) -> str:
    half = ratio["share_95_percent_half_width"]
    return "" if half is None else f" (± {100 * half:.2f})"


def figures(bodies: dict[str, dict[str, Any]]) -> str:
    """One table for each set."""
    made = ""
    for name, body in bodies.items():
        at = body["setting"]
        made += HEAD.format(
            title=SETS[name], name=name, note=f" {body['note']}" if body.get("note") else "", batch=at["global_batch_size"],
            seeds=len(at["seeds"]), device=body["device"],
            **{key: at[key] for key in ("train_rows", "held_out_rows", "sweep_rows", "threads", "jobs")},
        )  # fmt: skip
        arms = [arm["name"] for arm in body["arms"]]
        table = [["", *arms], ["---", *("--:" for _ in arms)], *lines(body)]
        made += "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n\n" + asked(body)
    return made


def bodies() -> dict[str, dict[str, Any]]:
    """set -> its committed comparison, for those that are there."""
    places = {name: record.RESULTS / f"compare-{name}.json" for name in SETS}
    return {name: json.loads(place.read_text()) for name, place in places.items() if place.exists()}


def with_figures(page: str, found: dict[str, dict[str, Any]]) -> str:
    """The page with fresh tables between its markers."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}{figures(found)}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_figures(PAGE.read_text(), bodies()))
    sys.exit(0)
