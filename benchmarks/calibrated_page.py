"""The tables of docs/calibrated.md, every number from benchmarks/results/calibrated.json."""

from typing import Any

from benchmarks import record

PAGE = record.ROOT / "docs" / "calibrated.md"
NAMES = {
    "unquantized": "unquantized", "nf4": "NF4 + double quantization", "loftq": "LoftQ, rank 16", "qpissa": "QPiSSA, rank 16",
    "scales": "calibrated scales", "start": "NF4 + low-rank start, rank 16", "scales and start": "calibrated scales + start, rank 16",
}  # fmt: skip
HEAD = """## Figures

The starter model in float32, {layers}; calibrated on {calibration_tokens:,} tokens ({of_them_judging:,} of them only judge),
measured on {held_out_tokens:,} held-out tokens a text, before any training; rank {rank}, LoftQ with {loftq_rounds} rounds. KL is that from
the unquantized model, the mean over the positions in nats; a range is over the seeds that draw the calibration rows. Texts: {texts}. All
from `benchmarks/results/calibrated.json`, which `python -m benchmarks.bench_calibrated` measures.
"""
TEXTS = {
    "prose": "Python's language reference (`pydoc_data.topics`)", "code": "modules of its standard library", "gsm8k": "word problems",
}  # fmt: skip
TABLE = """
Weights {0}, calibrated on {1}, measured on {2}:

| arm | seeds | KL, nats | share of NF4's KL | perplexity |
|---|--:|--:|--:|--:|
"""
LATTICE = """
The starter's weights were 4-bit (Q4_1) before they came here, which favours formats near that one.
"""
ROTATED = """
In the rotated basis (norm gains folded in, the residual stream turned by a random orthogonal matrix: the same function) they are not on
that lattice: a control for the order of the arms, not a better model.
"""
TIME = """
`halfbyte quantize starter --calibrate` with a start of rank {start_rank}, loading and writing included, took {seconds:.0f} s for {rows}
rows ({tokens:,} tokens) on {threads} threads of {device}; {bits_per_parameter:.3f} bits a parameter.
"""


def _line(row: dict[str, Any]) -> str:
    low, high = row["kl_share_of_nf4_range"]
    share = f"{row['kl_share_of_nf4']:.2f}" + (f" ({low:.2f} to {high:.2f})" if row["seeds"] > 1 else "")
    return f"| {NAMES[row['arm']]} | {row['seeds']} | {row['kl_nats']:.3f} | {share} | {row['perplexity']:.2f} |\n"


def figures(body: dict[str, Any]) -> str:
    """Head, one table for each basis and text, and the time where it was measured."""
    named = dict.fromkeys(row[key] for row in body["table"] for key in ("calibrated_on", "held_out_text"))
    made = HEAD.format(**body, texts=", ".join(f"`{name}` is {TEXTS[name]}" for name in named))
    for key in dict.fromkeys((row["basis"], row["calibrated_on"], row["held_out_text"]) for row in body["table"]):
        rows = [row for row in body["table"] if (row["basis"], row["calibrated_on"], row["held_out_text"]) == key]
        made += TABLE.format(*key) + "".join(_line(row) for row in rows)
    made += LATTICE + (ROTATED if any(row["basis"] == "rotated" for row in body["table"]) else "")
    return made + (TIME.format(**body["calibration_time"]) if "calibration_time" in body else "")


def with_figures(page: str, body: dict[str, Any]) -> str:
    """The page with fresh figures between its markers."""
    head, rest = page.split("<!-- figures -->\n")
    return f"{head}<!-- figures -->\n{figures(body)}<!-- /figures -->{rest.split('<!-- /figures -->')[1]}"
