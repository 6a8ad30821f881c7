"""From what a user typed to a Question: flags, a settings file and key=value pairs, read as a training run reads them.

A flag is a setting under another name (SETTING_OF), so one that contradicts a key=value pair is refused, and settings that cannot stand
together are refused with the words that a run would use.  What nobody says stays open: the plan tries it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from halfbyte.config.load import read_settings
from halfbyte.config.rules import text_of
from halfbyte.config.run import RunConfig
from halfbyte.data.lengths import lengths
from halfbyte.errors import ConfigError, nearest
from halfbyte.plan.activations import POLICIES
from halfbyte.plan.answer import Asked, Question, compute_dtype, row_tokens, shape_of
from halfbyte.plan.command import settings_for
from halfbyte.plan.decide import AUTO_METHODS
from halfbyte.plan.hardware import PROCESSOR, Hardware, card, processor, sized, this_machine
from halfbyte.plan.rates import threads_of
from halfbyte.plan.search import GLOBAL_BATCH_SIZE
from halfbyte.plan.setting import METHODS, Setting
from halfbyte.shape import ModelShape

STATES = ("float32", "int8")
SETTING_OF = {
    "rank": "lora.rank", "targets": "lora.targets", "max_tokens": "data.max_tokens", "micro_batch_size": "train.micro_batch_size",
    "policy": "train.activations", "state": "optim.state", "allow_download": "model.allow_download",
}  # fmt: skip
"""Flag of a plan -> the setting of a run that it stands for."""
NO_ROWS = "-"
"""data.path of settings without rows."""


def ask(
    model: str | None = None, *, file: Path | None = None, settings: Sequence[str] = (), data: str | None = None, gpu: str | None = None,
    gpu_memory: str | None = None, method: str | None = None, rank: int | None = None, targets: str | None = None,
    max_tokens: int | None = None, micro_batch_size: int | None = None, policy: str | None = None, state: str | None = None,
    calibrate: bool = False, allow_download: bool = False,
) -> Question:  # fmt: skip
    """The question behind a command line: flags, a settings file, and `settings` such as "lora.rank=32".

    Raises ConfigError, ModelError, TargetError or DataError.
    """
    _one_of("--method", method, METHODS)
    _one_of("--policy", policy, tuple(POLICIES))
    _one_of("--state", state, STATES)
    _within("--rank", rank, 1, 65536)
    _within("--max-tokens", max_tokens, 2, 2**24)
    _within("--micro-batch-size", micro_batch_size, 1, 65536)
    given = {
        "rank": rank, "targets": _names(targets), "max_tokens": max_tokens, "micro_batch_size": micro_batch_size, "policy": policy,
        "state": state, "allow_download": allow_download or None,
    }  # fmt: skip
    flags = {SETTING_OF[name]: value for name, value in given.items() if value is not None}
    named = {name: value for name, value in (("model", model), ("data", data), ("method", method)) if value is not None}
    size = micro_batch_size or 1
    step = -(-GLOBAL_BATCH_SIZE // size) * size
    unsaid = {"data.path": NO_ROWS, "train.global_batch_size": step}
    config = read_settings(file, settings, {**flags, **named}, unsaid=unsaid).config
    place = _place(gpu, gpu_memory, config.model.device)
    if calibrate and place.name != PROCESSOR:
        raise ConfigError(
            "rates are measured on this machine's processor alone", code="E-CONF-407", place="--calibrate", found=place.name,
            remedy="leave --calibrate out; times for a card are estimates from its published peak", nothing_done="Nothing was planned.",
        )  # fmt: skip
    if step != GLOBAL_BATCH_SIZE and config.train.global_batch_size == step:
        flags["train.global_batch_size"] = step
    words = [f"{key}={text_of(value).replace(', ', ',')}" for key, value in flags.items()]
    words += [word for word in settings if word not in words]
    asked = Asked(model, None if file is None else str(file), data, method, tuple(words))
    return _question(config, place, asked, here=gpu is None and gpu_memory is None)


def _question(config: RunConfig, place: Hardware, asked: Asked, here: bool) -> Question:
    """What these settings leave open, for a model whose config.json is read now, and rows that are counted now."""
    name, most = config.model.name, config.data.max_tokens
    shape, tokenizer = shape_of(name, revision=config.model.revision, allow_download=config.model.allow_download)
    methods = _methods(shape, config, asked)
    rows = None if config.data.path == NO_ROWS else lengths(config.data, tokenizer)
    tokens = row_tokens(shape, None if most == "auto" else most, rows, config.data.packing)
    policy, size = config.train.activations, config.train.micro_batch_size
    base = Setting.of(
        config, dtype=compute_dtype(place) if config.model.dtype == "auto" else config.model.dtype, tokens=tokens,
        micro_batch_size=1 if size == "auto" else size, policy="keep" if policy == "auto" else policy, device=place.kind,
    )  # fmt: skip
    if base.method not in METHODS:
        base = base.with_method(methods[0])
    if shape.stored[0]:
        base = replace(base, format=shape.stored[0], double_quant=shape.stored[1])
    written = bool({"state", "paged"} & config.optim.model_fields_set)
    fixed = {"policy": policy != "auto", "micro_batch_size": size != "auto", "state": written}
    return Question(
        name, shape, place, base, frozenset(key for key, given in fixed.items() if given), methods, rows, config.train.global_batch_size,
        config.data.packing, here, asked, threads_of(config.train.threads),
    )  # fmt: skip


def _methods(shape: ModelShape, config: RunConfig, asked: Asked) -> tuple[str, ...]:
    """The methods to plan: the one that was given, else those that can be trained with the other settings."""
    given = config.method if "method" in config.model_fields_set else None
    if shape.packed:
        if given not in (None, "auto", "qlora"):
            raise ConfigError(
                "a packed folder serves method qlora only", code="E-CONF-409", place="method", found=f"{given} with a base that is packed",
                expected="qlora", remedy="plan for the model's 16-bit folder, or leave the method out", nothing_done="Nothing was planned.",
            )  # fmt: skip
        return ("qlora",)
    if given is not None and given != "auto":
        return (given,)
    every = METHODS if given is None else AUTO_METHODS
    return tuple(name for name in every if name == "qlora" or _trainable(asked, name))


def _trainable(asked: Asked, method: str) -> bool:
    """Whether a run would take these settings with this method."""
    try:
        file = None if asked.file is None else Path(asked.file)
        read_settings(file, settings_for(asked, method), {"method": method}, unsaid={"data.path": NO_ROWS})
    except ConfigError:
        return False
    return True


def _names(targets: str | None) -> str | list[str] | None:
    """The value of lora.targets behind --targets: names with commas between."""
    if targets is None:
        return None
    names = [name.strip() for name in targets.split(",") if name.strip()]
    if not names:
        raise ConfigError(
            "an adapter needs a layer to stand beside", code="E-CONF-408", place="--targets", found=targets[:40] or "nothing",
            expected="all-linear, or module names with commas between", nothing_done="Nothing was planned.",
        )  # fmt: skip
    return names[0] if len(names) == 1 else names


def _place(gpu: str | None, gpu_memory: str | None, device: str) -> Hardware:
    """Where to plan for: a card by name or size, else this machine, where model.device says on what of it."""
    if gpu is not None and gpu_memory is not None:
        raise ConfigError(
            "a card is given by its name or by its memory", code="E-CONF-404", place="--gpu and --gpu-memory",
            found=f"{gpu[:40]} and {gpu_memory[:40]}", remedy="give one of them", nothing_done="Nothing was planned.",
        )  # fmt: skip
    if device == "cpu" and (gpu is not None or gpu_memory is not None):
        option, value = ("--gpu", gpu) if gpu is not None else ("--gpu-memory", gpu_memory)
        raise ConfigError(
            "a run on the processor is not planned for a card", code="E-CONF-425", place=f"{option} and model.device",
            found=f"{str(value)[:40]} and cpu", remedy=f"leave {option} out, or model.device", nothing_done="Nothing was planned.",
        )  # fmt: skip
    if gpu is not None:
        return card(gpu)
    if gpu_memory is not None:
        return sized(gpu_memory)
    return processor() if device == "cpu" else this_machine()


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
