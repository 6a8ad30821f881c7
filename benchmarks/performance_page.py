"""The tables of docs/performance.md from the committed results: `python -m benchmarks.performance_page`.

Each table stands between two marks named after it; a test compares the page with what this makes.
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import record

PAGE = record.ROOT / "docs" / "performance.md"
Result = Mapping[str, Any]
NAMES = {"train": "Halfbyte, `halfbyte train`", "loop": "Halfbyte, own loop", "peft": "PEFT, raw loop", "trl": "TRL's defaults"}
PRECISIONS = {"nf4": "NF4", "bf16": "bfloat16", "fp32": "float32"}


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def made_with(result: Result) -> str:
    """Where and with what a result was measured."""
    versions = result["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes", "trl"))
    return f"{result['device']}, {result['threads']} threads; {named}; {result['date']}, commit {result['commit'][:7]}."


def train(result: Result) -> str:
    """Speed and memory of a training step."""
    part = result["modes"]["completion"]
    rows = []
    for precision, label in PRECISIONS.items():
        for kind, name in NAMES.items():
            arm = part["arms"][f"{kind}-{precision}"]
            speed = [f"{arm['tokens_per_second']:.0f}", f"{arm['step_seconds']:.2f}"]
            memory = f"{arm['peak_rss_bytes'] / 2**30:.2f}"
            rows.append([f"{label}: {name}", *speed, memory, f"{arm['startup_seconds']:.1f}", f"{arm['minor_faults_per_step']:,}"])
    speeds = grid(["", "tokens/s", "s a step", "peak GiB", "s to start", "page faults a step"], rows)
    pairs = [
        [
            f"{one['what'].replace('peak RSS', 'peak memory')}, {one['ours']} / {one['peer']}",
            f"{one['ratio']:.2f}", one["bar"] or "reported", ", ".join(f"{value:.2f}" for value in one["rounds"]),
        ]
        for one in part["ratios"]
    ]  # fmt: skip
    apart = max(one["mean"] for one in part["agreement"])
    drift = part["drift"]
    return (
        f"{speeds}\n\n{made_with(result)} {result['rounds']} rounds of {result['steps']} steps, the first two of each not timed; medians.\n"
        f"Losses lie within {100 * apart:.1f} % of PEFT's on average; the first arm was run again at the end: {drift['first']} and"
        f" {drift['last']} tokens/s.\n\n{grid(['ratio, median of the rounds', 'value', 'wanted', 'each round'], pairs)}"
    )


def _ops(result: Result, names: Mapping[str, str]) -> str:
    rows = []
    for one in result["rows"]:
        case = one["case"]
        what = "x".join(str(size) for size in case.get("shape", [])) + (f" {case['dtype']}" if "dtype" in case else "")
        what += ", freed pages kept" if case.get("kept_pages") else ""
        for side, found in one["sides"].items():
            if side not in names:
                continue
            ratio = "" if side == "halfbyte" else f"{one['times_faster_than'][side]:.2f}"
            rows.append([f"{what}{': ' if what else ''}{names[side]}", f"{found['ms']:.3f}", ratio, f"{found['peak_mib']:.0f}"])
    return grid(["", "ms", "times ours", "peak MiB over its inputs"], rows) + f"\n\n{made_with(result)}"


def dequantize(result: Result) -> str:
    """Reading packed weights back."""
    ours = {"halfbyte": "Halfbyte, into a buffer", "halfbyte-new": "Halfbyte, a new tensor"}
    names = {**ours, "bitsandbytes": "bitsandbytes", "copy": "a copy of as many bytes"}
    return _ops(result, names)


def linear4bit(result: Result) -> str:
    """A packed linear layer, forward and backward."""
    names = {"halfbyte": "Halfbyte", "bf16": "dense bfloat16", "bitsandbytes": "bitsandbytes", "gemm": "the two products alone"}
    return _ops(result, names)


def head(result: Result) -> str:
    """Output layer and loss."""
    return _ops(result, {"halfbyte": "Halfbyte", "transformers": "transformers", "gemm": "the two products alone"})


def decode(result: Result) -> str:
    """Decoding a token."""
    (one,) = result["rows"]
    names = {"halfbyte": "Halfbyte, NF4", "bitsandbytes": "bitsandbytes, NF4", "bf16": "bfloat16", "fp32": "float32"}
    rows = [
        [label, f"{one['tokens_per_s'][side]:.1f}", f"{one['sides'][side]['ms']:.1f}", f"{one['sides'][side]['gb_per_s']:.1f}"]
        for side, label in names.items()
    ]
    note = f"{one['times_faster_than_fastest']:.2f} times the fastest peer, {one['fastest_peer']}.  {made_with(result)}"
    return grid(["", "tokens/s", "ms a token", "GB/s of weights"], rows) + f"\n\n{note}"


def packed_attention(result: Result) -> str:
    """Attention of packed samples."""
    rows = [
        [f"{one['batch']} {one['dtype']}", f"{one['halfbyte_forward_ms']:.1f}", f"{one['sdpa_forward_ms']:.1f}",
         f"{one['halfbyte_step_ms']:.1f}", f"{one['sdpa_step_ms']:.1f}", f"{one['step_times_faster_ms']:.2f}"]
        for one in result["rows"]
    ]  # fmt: skip
    head_ = ["", "forward ms", "PyTorch", "forward + backward ms", "PyTorch", "times faster"]
    return grid(head_, rows) + f"\n\n{made_with(result)}"


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "train": ("train_cpu", train), "dequantize": ("ops_dequantize", dequantize), "linear4bit": ("ops_linear4bit", linear4bit),
    "head": ("ops_head", head), "decode": ("ops_decode", decode), "packed_attention": ("packed_attention", packed_attention),
}  # fmt: skip


def filled(page: str) -> str:
    """The page with every table as the results say."""
    for name, (file, write) in TABLES.items():
        before, rest = page.split(f"<!-- {name} -->\n")
        after = rest.split(f"<!-- /{name} -->")[1]
        result = json.loads((record.RESULTS / f"{file}.json").read_text())
        page = f"{before}<!-- {name} -->\n{write(result)}\n<!-- /{name} -->{after}"
    return page


def main() -> int:
    PAGE.write_text(filled(PAGE.read_text()))
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
