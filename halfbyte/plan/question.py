"""From what a user typed to a Question: every value checked, each mistake told in one block."""

from halfbyte.errors import ConfigError, nearest
from halfbyte.plan.activations import POLICIES
from halfbyte.plan.answer import Question, compute_dtype, count_rows, row_tokens, shape_of
from halfbyte.plan.hardware import PROCESSOR, Hardware, card, sized, this_machine
from halfbyte.plan.search import GLOBAL_BATCH_SIZE
from halfbyte.plan.setting import METHODS, Setting

STATES = ("float32", "int8")


def ask(
    model: str, *, data: str | None = None, gpu: str | None = None, gpu_memory: str | None = None, method: str | None = None,
    rank: int = 16, targets: str = "all-linear", max_tokens: int | None = None, micro_batch_size: int | None = None,
    policy: str | None = None, state: str | None = None, calibrate: bool = False,
    allow_download: bool = False,
) -> Question:  # fmt: skip
    """The question behind a command line.  Raises ConfigError, ModelError, TargetError or DataError."""
    _one_of("--method", method, METHODS)
    _one_of("--policy", policy, tuple(POLICIES))
    _one_of("--state", state, STATES)
    _within("--rank", rank, 1, 65536)
    _within("--max-tokens", max_tokens, 2, 2**24)
    _within("--micro-batch-size", micro_batch_size, 1, 65536)
    place = _place(gpu, gpu_memory)
    if calibrate and place.name != PROCESSOR:
        raise ConfigError(
            "only this machine's processor can be calibrated", code="E-CONF-407", place="--calibrate", found=place.name,
            remedy="leave --calibrate out; times for a card are estimates from its published peak", nothing_done="Nothing was planned.",
        )  # fmt: skip
    shape, tokenizer = shape_of(model, allow_download=allow_download)
    rows = count_rows(data, tokenizer)
    names = tuple(name.strip() for name in targets.split(",") if name.strip())
    if not names:
        raise ConfigError(
            "an adapter needs a layer to stand beside", code="E-CONF-408", place="--targets", found=targets[:40] or "nothing",
            expected="all-linear, or module names with commas between", nothing_done="Nothing was planned.",
        )  # fmt: skip
    if shape.packed and method not in (None, "qlora"):
        raise ConfigError(
            "a packed folder serves method qlora only", code="E-CONF-409", place="--method", found=f"{method} with a base that is packed",
            expected="qlora", remedy="plan for the model's 16-bit folder, or leave --method out", nothing_done="Nothing was planned.",
        )  # fmt: skip
    size = micro_batch_size or 1
    packed, double_quant = shape.stored if shape.stored[0] else ("nf4", True)
    base = Setting(
        method=method or "qlora", format=packed, double_quant=double_quant, dtype=compute_dtype(place), rank=rank,
        targets=names[0] if len(names) == 1 else names, state=state or "float32", policy=policy or "keep",
        tokens=row_tokens(shape, max_tokens, rows), micro_batch_size=size, device=place.kind,
        global_batch_size=-(-GLOBAL_BATCH_SIZE // size) * size,
    )  # fmt: skip
    given = {"policy": policy, "state": state, "micro_batch_size": micro_batch_size}
    fixed = frozenset(name for name, value in given.items() if value is not None)
    methods = ("qlora",) if shape.packed else METHODS if method is None else (method,)
    return Question(model, shape, place, base, fixed, methods, rows, base.global_batch_size)


def _place(gpu: str | None, gpu_memory: str | None) -> Hardware:
    if gpu is not None and gpu_memory is not None:
        raise ConfigError(
            "a card is given by its name or by its memory", code="E-CONF-404", place="--gpu and --gpu-memory",
            found=f"{gpu[:40]} and {gpu_memory[:40]}", remedy="give one of them", nothing_done="Nothing was planned.",
        )  # fmt: skip
    if gpu is not None:
        return card(gpu)
    return this_machine() if gpu_memory is None else sized(gpu_memory)


def _one_of(option: str, value: str | None, legal: tuple[str, ...]) -> None:
    if value is not None and value not in legal:
        raise ConfigError(
            "an option takes one of its words", code="E-CONF-405", place=option, found=value[:40], expected=", ".join(legal),
            remedy=nearest(value, legal), nothing_done="Nothing was planned.",
        )  # fmt: skip


def _within(option: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise ConfigError(
            "an option takes a number in its range", code="E-CONF-406", place=option, found=str(value)[:40],
            expected=f"{least:,} to {most:,}", nothing_done="Nothing was planned.",
        )  # fmt: skip
