"""The answer of a plan as a page of its own: all methods side by side, what fits and why, what does not and what to change first.

The same as text.py says, with a picture and with what published comparisons found about the methods (docs/choosing.md has the reasons at
length).  Every number is an estimate and says so, or names its source.
"""

from pathlib import Path

from halfbyte.pages import comparison, plan_plots
from halfbyte.pages.page import Picture, Table
from halfbyte.plan.answer import Answer, found_with_change, seconds_per_step, steps_per_epoch, time_source
from halfbyte.plan.search import NOT, needed_text
from halfbyte.plan.text import ROWS, about, change_text, duration_text, how, least_text, table_rows
from halfbyte.units import bytes_text, gib

PUBLISHED = Table(
    "What published comparisons found",
    ["question", "found", "source"],
    [
        ["LoRA against full, instruction data of small and medium size", "equal, at a learning rate about ten times that of full",
         "LoRA Without Regret, thinkingmachines.ai/blog/lora"],
        ["LoRA against full, continued pre-training on code", "HumanEval 0.224 with rank 256, 0.263 full, after 20 billion tokens",
         "LoRA Learns Less and Forgets Less, arXiv 2405.09673"],
        ["QLoRA against LoRA, held-out loss", "Llama-2-7B 0.814 and 0.802; Llama-3-8B 0.939 and 0.888 nats",
         "litgpt's configuration hub, Alpaca2k, 512 tokens, rank 32 on q and v"],
        ["QLoRA against 16 bits, MMLU, mean of 7 to 65 billion parameters", "53.1 and 53.0 %", "QLoRA, arXiv 2305.14314"],
        ["4 bits on recent models", "LLaMA-3-8B loses more to 4 bits than LLaMA-1 and -2 did", "arXiv 2404.14047"],
    ],
    "Numbers as printed there, with those programs' settings; they are not measurements of this model.",
)  # fmt: skip


def write(path: Path, given: Answer) -> Path:
    """Write the page, whole or not at all; returns its path.  Raises StorageError."""
    question = given.question
    head, *rows = table_rows(given)
    tables = [
        Table("All methods side by side", head, [row for row in rows if any(row)],
              "Memory in GiB at the peak of a step, predicted term by term from shapes and types: estimates (docs/memory.md);"
              f" {least_text(given)}."),
    ]  # fmt: skip
    if given.ranking:
        tables.append(_fitting(given))
    if given.changes:
        tables.append(_failing(given))
    notes = [] if given.ranking else ["Nothing of this fits."]
    return comparison.write(
        path, title=f"Plan for {question.name}", lines=about(given), tables=[*tables, PUBLISHED], pictures=[_picture(given)], notes=notes,
    )  # fmt: skip


def _picture(given: Answer) -> Picture:
    found = found_with_change(given)
    methods, available = [method for method, _ in found], gib(given.question.hardware.memory_bytes)
    terms = {
        name: [gib(sum(term.bytes for term in one.memory.at(one.memory.peak) if term.name == name)) for _, one in found] for name in ROWS
    }
    present = {name: values for name, values in terms.items() if any(values)}
    words = "; ".join(f"{method} {gib(one.memory.total):.2f} GiB" for method, one in found)
    return Picture(
        "Memory at the peak", f"Bars of predicted memory by method: {words}; available {available:.2f} GiB",
        plan_plots.memory_bars(methods, present, available), "Estimates in GiB; the broken line is the memory of the place.",
    )  # fmt: skip


def _fitting(given: Answer) -> Table:
    steps = steps_per_epoch(given)
    rows = []
    for number, (method, why) in enumerate(given.ranking, 1):
        one = given.found[method]
        seconds = seconds_per_step(given, one)
        step = "-" if seconds is None else duration_text(seconds)
        epoch = "-" if seconds is None or steps is None else duration_text(seconds * steps)
        rows.append([str(number), method, bytes_text(one.memory.total), how(one), step, epoch, why])
    columns = ["", "method", "memory (estimate)", "setting", "time of a step", "time of an epoch", "why it stands here"]
    count = f"; an epoch has {steps:,} steps" if steps else ""
    return Table("What fits, best first", columns, rows,
                 f"Times for steps of {given.question.global_batch_size} rows: {time_source(given)}{count}.")  # fmt: skip


def _failing(given: Answer) -> Table:
    rows = []
    for method in given.changes:
        one = given.found[method]
        assert one.verdict == NOT
        term = one.largest
        largest = f"{term.name}, {bytes_text(term.bytes)}: {term.formula}"
        rows.append([method, needed_text(one), largest, change_text(given, method)])
    return Table("What does not fit", ["method", "needs at the least (estimate)", "largest term", "what to change"], rows,
                 "All numbers are estimates of the same kind as above.")  # fmt: skip
