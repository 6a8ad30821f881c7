"""docs/choosing.md says what the committed results and the program say."""

import json
from pathlib import Path

from halfbyte.plan.memory import bytes_of_state
from halfbyte.plan.page import PUBLISHED
from halfbyte.plan.search import BATCH_TOKENS, HEADROOM
from halfbyte.quant.storage_cost import WIDTHS
from halfbyte.units import gib

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")


def test_measured_figures_are_those_of_the_committed_result() -> None:
    runs = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text(encoding="utf-8"))["runs"]
    full = {run["set"]: run["last_eval_loss"] for run in runs if run["method"] == "full"}
    rows = []
    for run in runs:
        more = run["last_eval_loss"] / full[run["set"]] - 1
        against = "" if run["method"] == "full" else f"{100 * more:+.1f} %"
        cells = [run["set"], run["method"], f"{run['last_eval_loss']:.4f}", against, f"{run['trainable_params']:,}",
                 f"{gib(run['peak_memory_bytes']):.2f}", f"{run['processor_seconds']:,.0f}"]  # fmt: skip
        rows.append("| " + " | ".join(cells).replace("|  |", "| |") + " |")
    table = PAGE.split("<!-- measured -->\n")[1].split("<!-- /measured -->")[0]
    assert table.splitlines()[2:] == rows


def test_what_is_published_is_the_same_on_the_page_of_a_plan() -> None:
    assert PUBLISHED.rows
    for question, found, _ in PUBLISHED.rows:
        assert f"| {question} | {found} |" in PAGE


def test_the_rule_is_the_programs() -> None:
    assert HEADROOM == 0.2 and "with a fifth of the memory to spare" in PAGE
    assert BATCH_TOKENS == {"cpu": 1024, "gpu": 8192} and "at most 1,024 tokens at once (8,192 on a GPU)" in PAGE


def test_the_readme_says_what_full_fine_tuning_adds_to_a_weight() -> None:
    """Its gradient, two moments, and a float32 master of what is kept in bfloat16; the scales of int8 moments are 1/32 byte more."""
    count = 1 << 20
    more = {
        state: [round(bytes_of_state([count], state, dtype) / count) + WIDTHS[dtype] for dtype in ("bfloat16", "float32")]
        for state in ("float32", "int8")
    }
    full = "16 or 32 bits, and {} or {} more bytes per weight ({} or {} with `optim.state=int8`)".format(*more["float32"], *more["int8"])
    assert full in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_leads_here() -> None:
    assert "(docs/choosing.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
