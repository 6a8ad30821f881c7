"""The answer of a plan in plain words: one table of all methods, then what fits, best first, and what to change where nothing does."""

from dataclasses import replace

from halfbyte.plan.activations import POLICIES, own_layers
from halfbyte.plan.answer import Answer, found_with_change, seconds_per_step, steps_per_epoch, time_source
from halfbyte.plan.command import calibrate_command, train_command
from halfbyte.plan.hardware import CARDS, MARGIN, PROCESSOR, PROGRAM_BYTES
from halfbyte.plan.memory import plan_memory
from halfbyte.plan.search import FITS, NOT, Option, needed_text
from halfbyte.plan.setting import trained_params
from halfbyte.units import bytes_text, count_text, gib, percent_text, seconds_text

ROWS = (
    "weights, packed", "weights, dense", "adapters", "start factors", "start", "gradients", "optimizer", "layer inputs", "activations",
    "heap gaps", "head", "logits", "workspace", "update", "program",
)  # fmt: skip


def plan_text(given: Answer) -> str:
    """All of it."""
    parts = [_head(given), _table(given), _fitting(given), _failing(given), _time(given), _next(given)]
    return "\n\n".join(part for part in parts if part)


def _next(given: Answer) -> str:
    """The command that trains with the best method; nothing where none fits, or where the place is not here."""
    return f"next     {train_command(given)}" if given.ranking and given.question.here else ""


def _head(given: Answer) -> str:
    (_, model), (_, place), *others = about(given)
    labels = {"rows": "rows: ", "planned for": "planned for "}
    lines = [model, f"on {place}", *(labels.get(label, "") + text for label, text in others)]
    return "\n".join(lines)


def about(given: Answer) -> list[tuple[str, str]]:
    """(label, text): the model, the place, the rows, and what was planned for."""
    question = given.question
    shape, hardware, rows = question.shape, question.hardware, question.rows
    size = f"{count_text(shape.total_params)} parameters, {shape.layers} layers, width {shape.hidden:,}"
    said = [
        ("model", f"{question.name}: {shape.model_type}, {size}"),
        ("place", f"{hardware.name}: {bytes_text(hardware.memory_bytes)}; a setting fits with {percent_text(hardware.margin)} to spare,"
                  " the margin of error of a plan"),
    ]  # fmt: skip
    if rows is not None:
        longest, total = f"{rows.longest:,}", count_text(sum(rows.tokens))
        said.append(("rows", f"{len(rows.tokens):,}, the longest of {longest} tokens, {total} tokens in all (estimate, by {rows.how})"))
    said.append(("planned for", f"rows of {question.base.tokens:,} tokens and adapters of rank {question.base.rank}"))
    if shape.packed:
        stored = f" in {shape.stored[0]}" if shape.stored[0] else ""
        said.append(("storage", f"its files are packed already{stored}: method qlora trains beside them, the others need the 16-bit model"))
    if not own_layers(shape):
        said.append(("layers", "this family keeps transformers' own layers: its activations are an estimate on the high side"))
    return said


def _table(given: Answer) -> str:
    lines = table_rows(given)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = ["  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]).rstrip() for line in lines]
    return "\n".join([*table, "", least_text(given)])


def least_text(given: Answer) -> str:
    """What the columns are and with which settings the least is reached; methods that reach it alike are named together."""
    alike: dict[str, list[str]] = {}
    for method, one in given.least.items():
        beside = " (the rest in host memory)" if one.memory.host else ""
        alike.setdefault(_settings(one) + beside, []).append(method)
    each = "; ".join(text if len(alike) == 1 else f"{', '.join(methods)} {text}" for text, methods in alike.items())
    return f"each column is the setting to choose; the least for the same rows and rank (estimate): {each}"


def table_rows(given: Answer) -> list[list[str]]:
    """All methods side by side: a head, the terms at the peak in GiB, an empty row, then what was chosen for each."""
    found = found_with_change(given)
    lines = [["predicted memory, GiB", *(method for method, _ in found)]]
    for name in ROWS:
        cells = [_cell(one, name) for _, one in found]
        if any(cell != "-" for cell in cells):
            lines.append([name, *cells])
    lines.append(["at the peak", *(f"{gib(one.memory.total):.2f}" for _, one in found)])
    lines.append(["the least it needs", *(f"{gib(given.least[method].memory.total):.2f}" for method, _ in found)])
    if any(one.memory.host for _, one in found):
        lines.append(["host memory beside it", *(f"{gib(one.memory.host):.2f}" for _, one in found)])
    lines.append(["", *("" for _ in found)])
    lines += [
        ["verdict", *(one.verdict for _, one in found)],
        ["trained parameters", *(count_text(trained_params(given.question.shape, one.setting)) for _, one in found)],
        ["activations", *(one.setting.policy for _, one in found)],
        ["optimizer state", *(one.setting.state + (", paged" if one.setting.paged else "") for _, one in found)],
        ["rows at once", *(str(one.setting.micro_batch_size) for _, one in found)],
    ]
    return lines


def _cell(one: Option, name: str) -> str:
    """GiB of a term at the peak; "-" where it is not there then."""
    counted = sum(term.bytes for term in one.memory.at(one.memory.peak) if term.name == name)
    return "-" if not counted else "<0.01" if gib(counted) < 0.005 else f"{gib(counted):.2f}"


def how(one: Option) -> str:
    """Policy, state and rows at once of a setting in words, with what the policy costs."""
    return _settings(one, f" ({POLICIES[one.setting.policy].cost})")


def _settings(one: Option, cost: str = "") -> str:
    state = "" if one.setting.state == "float32" else f", optim.state={one.setting.state}" + (", paged" if one.setting.paged else "")
    size = one.setting.micro_batch_size
    return f"policy {one.setting.policy}{cost}{state}, {size} {'row' if size == 1 else 'rows'} at once"


def _fitting(given: Answer) -> str:
    lines = []
    for number, (method, why) in enumerate(given.ranking, 1):
        one = given.found[method]
        lines.append(f"{number}. {method}, {bytes_text(one.memory.total)}: {why}\n   {how(one)}")
    return "what fits, best first\n" + "\n".join(lines) if lines else "nothing of this fits"


def _failing(given: Answer) -> str:
    lines = []
    for method in given.changes:
        one = given.found[method]
        term = one.largest
        lines.append(
            f"{method} needs {needed_text(one)} at the least; its largest term is {term.name}, {bytes_text(term.bytes)} ({term.formula})"
        )
        lines.append(f"   {change_text(given, method)}")
    return "\n".join(["what does not fit", *lines]) if lines else ""


def change_text(given: Answer, method: str) -> str:
    """The first thing to change for a method that does not fit, and what is then."""
    one, change = given.found[method], given.changes[method]
    if change is None:
        return f"nothing is left to change; {_card(given, one)}"
    then = {FITS: "then it fits", NOT: f"then it needs {needed_text(change.option)}, still too much"}
    result = then.get(change.option.verdict, "then it is within the memory, but not by the margin of error")
    return f"first change: {change.text}, which saves {bytes_text(change.saved)}; {result}. Or {_card(given, one)}"


def _card(given: Answer, one: Option) -> str:
    """The smallest size of card in the table of which every one that multiplies bfloat16 would hold it, planned as on a card."""
    if one.short == "host":
        return "take a machine with more host memory"
    there = replace(one.setting, device="gpu", dtype="bfloat16")
    needed = plan_memory(given.question.shape, there, PROGRAM_BYTES["gpu"]).total * (1 + MARGIN["gpu"])
    least: dict[int, int] = {}
    for card in CARDS.values():
        if card.bf16:
            least[card.gb] = min(card.memory_bytes, least.get(card.gb, card.memory_bytes))
    sizes = sorted(size for size, memory in least.items() if memory >= needed)
    return f"take a card with {sizes[0]} GB" if sizes else "no card of the table holds it"


def duration_text(seconds: float) -> str:
    """A time as text, short ones in milliseconds.

    >>> duration_text(0.0421), duration_text(90)
    ('42 ms', '1 min 30 s')
    """
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else seconds_text(seconds)


def _time(given: Answer) -> str:
    steps = steps_per_epoch(given)
    size = given.question.global_batch_size
    length = f"{steps:,} steps of {size} rows in an epoch; " if steps else ""
    timed = [(method, seconds_per_step(given, one)) for method, one in found_with_change(given) if one.verdict != NOT]
    if any(seconds is None for _, seconds in timed) or not timed:
        on_it = given.question.hardware.name == PROCESSOR
        here = f"; `{calibrate_command(given.question)}` measures them, while the machine is idle" if on_it else ""
        return f"time: {length}no rates were measured for this place, so no time is given{here}"
    each = [f"{method} {duration_text(s)} a step" + (f", {duration_text(s * steps)} an epoch" if steps else "") for method, s in timed if s]
    return f"time for steps of {size} rows ({time_source(given)}): {length}{'; '.join(each)}"
