"""PEFT's adapter_config.json: all keys of version 0.21.2 with their defaults, read strictly, written exactly.

What is not plain LoRA or DoRA (other methods, token adapters, replicated layers ...) must stand at its default, an unknown key is an error,
and nothing that the file names is ever imported, fetched or run: `auto_mapping` and `megatron_core` are looked at as text only.
Patterns of ranks and alphas are regular expressions from a stranger, so their shape is limited before one is compiled.

Source: https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/config.py
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from halfbyte.config.base import ALPHA_LIMIT, RANK_LIMIT
from halfbyte.config.lora import LoraConfig
from halfbyte.errors import AdapterError, nearest

CONFIG_NAME = "adapter_config.json"
SIZE_LIMIT = 4_000_000
PEFT_VERSION = "0.21.2"
TASKS = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None, "base_model_name_or_path": None,
    "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_type": "LORA", "peft_version": PEFT_VERSION, "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": None,
    "target_modules": None, "target_parameters": None, "task_type": None, "trainable_token_indices": None, "use_bdlora": None,
    "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip
# Starts after which the base of the file is not the base as published: such an adapter means nothing on the untouched base.
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "lora_ga")
OTHER_STARTS = ("gaussian", "eva", "loftq", "orthogonal", "mica")


def text_like(value: object, most: int = 4096) -> bool:
    """None or a short text."""
    return value is None or (isinstance(value, str) and len(value) <= most)


def names_like(value: object) -> bool:
    """None, or a list of at most 100,000 short texts."""
    return value is None or (isinstance(value, list) and len(value) <= 100_000 and all(isinstance(one,
        str) and len(one) <= 512 for one in value))


def whole_number(value: object, least: int, most: int) -> bool:
    """An int that is no switch, within bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def number(value: object, least: float, most: float) -> TypeGuard[float]:
    """A finite number that is no switch, above `least` and at most `most`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and least < value <= most


def table_of(check: Callable[[object], bool]) -> Callable[[object], bool]:
    """A test for {safe pattern: value} with at most 100,000 entries."""
    return lambda value: (
        isinstance(value, dict) and len(value) <= 100_000 and all(safe_pattern(key) and check(entry) for key, entry in value.items())
    )


def safe_pattern(pattern: str) -> bool:
    """Whether a regular expression of a stranger is short, valid, and of a kind that cannot take exponential time.

    >>> safe_pattern("model.layers.0.q_proj"), safe_pattern(r".*\\.q_proj"), safe_pattern("(a+)+$")
    (True, True, False)
    """
    plain = re.sub(r"\\.", "a", pattern)
    if len(pattern) > 512 or re.search(r"\)[*+?{]", plain) or len(re.findall(r"[*+{]", plain)) > 3 or re.search(r"\\[0-9]|\(\?", pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def mapping_like(value: object) -> bool:
    """PEFT's note of the class it saved from: text only, and of transformers."""
    if value is None:
        return True
    if not isinstance(value, dict) or not set(value) <= {"base_model_class", "parent_library", "unsloth_fixed"}:
        return False
    library = value.get("parent_library")
    return text_like(value.get("base_model_class")) and (library is None or str(library).partition(".")[0] == "transformers")


def loftq_like(value: object) -> bool:
    """Empty, or the two numbers of LoftQ."""
    return value is None or (isinstance(value, dict) and set(value) <= {"loftq_bits",
        "loftq_iter"} and all(type(one) is int for one in value.values()))


def is_switch(value: object) -> bool:
    """True or False."""
    return isinstance(value, bool)


def is_start(value: object) -> bool:
    """A start that leaves the base as it was."""
    return isinstance(value, bool) or value in OTHER_STARTS


# key -> (test, what is allowed) for every key that may differ from its default.
CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "peft_version": (text_like, "a version"),
    "base_model_name_or_path": (text_like, "a name or path"),
    "revision": (text_like, "a name"),
    "auto_mapping": (mapping_like, "null, or a class of transformers as text"),
    "inference_mode": (is_switch, "true or false"),
    "fan_in_fan_out": (is_switch, "true or false"),
    "use_rslora": (is_switch, "true or false"),
    "use_dora": (is_switch, "true or false"),
    "lora_bias": (is_switch, "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "r": (lambda value: whole_number(value, 1, RANK_LIMIT), f"a whole number from 1 to {RANK_LIMIT}"),
    "lora_alpha": (lambda value: number(value, 0, ALPHA_LIMIT), f"a number above 0, at most {ALPHA_LIMIT:,.0f}"),
    "lora_dropout": (lambda value: number(value, -1, 1) and 0 <= value < 1, "a number from 0 to below 1"),
    "rank_pattern": (table_of(lambda value: whole_number(value, 1, RANK_LIMIT)), f"names or plain patterns -> 1 to {RANK_LIMIT}"),
    "alpha_pattern": (
        table_of(lambda value: number(value, 0, ALPHA_LIMIT)), f"names or plain patterns -> a number above 0, at most {ALPHA_LIMIT:,.0f}",
    ),
    "target_modules": (lambda value: text_like(value) or names_like(value), "names or a pattern"),
    "exclude_modules": (lambda value: text_like(value) or names_like(value), "names or a pattern"),
    "target_parameters": (names_like, "names"),
    "modules_to_save": (names_like, "names"),
    "layers_to_transform": (
        lambda value: value is None or whole_number(value, 0, 10**6) or (isinstance(value, list) and all(whole_number(one, 0,
            10**6) for one in value)),
        "layer numbers",
    ),
    "layers_pattern": (lambda value: text_like(value) or names_like(value), "names"),
    "init_lora_weights": (is_start, "true, false, " + ", ".join(OTHER_STARTS)),
    "loftq_config": (loftq_like, "loftq_bits and loftq_iter"),
    "task_type": (lambda value: value is None or value in TASKS.values(), "null, " + ", ".join(TASKS.values())),
}  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """The checked content of adapter_config.json, with defaults filled in.  AdapterError names key, value and what is allowed."""
    path = folder / CONFIG_NAME
    if path.stat().st_size > SIZE_LIMIT:
        raise refused("E-ADAPT-032", "an adapter config is a small JSON object", str(path), f"{path.stat().st_size} bytes",
            f"at most {SIZE_LIMIT}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise refused("E-ADAPT-032", "an adapter config is a small JSON object", str(path), str(error), "JSON") from None
    if not isinstance(raw, dict):
        raise refused("E-ADAPT-032", "an adapter config is a small JSON object", str(path), type(raw).__name__, "an object")
    if raw.get("peft_type") != "LORA":
        raise refused("E-ADAPT-033", "only LoRA adapters are read", f"{path}, key peft_type", repr(raw.get("peft_type"))[:80],
            "LORA (DoRA and rsLoRA included)")
    for key in raw:
        if key not in DEFAULTS:
            raise refused(
                "E-ADAPT-034", "every key of an adapter config must be known, because it can change the numbers", f"{path}, key {key[:80]}",
                repr(raw[key])[:80], "the keys of PEFT " + PEFT_VERSION, nearest(key,
                DEFAULTS) or "save the adapter again with that version of PEFT",
            )  # fmt: skip
    for key in ("r", "lora_alpha"):
        if key not in raw:
            raise refused("E-ADAPT-035", "rank and alpha must stand in the file, because together they are the scale", str(path),
                f"no {key}", "r and lora_alpha")
    for key, value in raw.items():
        _check_value(f"{path}, key {key}", key, value)
    return {**DEFAULTS, **raw}


def _check_value(place: str, key: str, value: object) -> None:
    """AdapterError unless the value is allowed for the key."""
    if key == "init_lora_weights" and isinstance(value, str) and value.startswith(BASE_CHANGING_STARTS):
        raise refused(
            "E-ADAPT-036", "an adapter must work on the base as published", place, value, "an adapter converted to plain LoRA",
            "save it with PEFT's path_initial_model_for_weight_conversion",
        )  # fmt: skip
    if key in CHECKS:
        test, allowed = CHECKS[key]
        if not test(value):
            raise refused("E-ADAPT-037", "a value of an adapter config is out of range or of the wrong kind", place, repr(value)[:120],
                allowed)
    elif value != DEFAULTS[key] or type(value) is not type(DEFAULTS[key]):
        raise refused(
            "E-ADAPT-038", "this feature of PEFT is not read", place, repr(value)[:120], repr(DEFAULTS[key]),
            "use PEFT to convert or merge this adapter"
        )


def refused(code: str, rule: str, place: str, found: str, expected: str, remedy: str = "") -> AdapterError:
    """The error of a folder that is not loaded."""
    return AdapterError(rule, code=code, place=place, found=found, expected=expected, remedy=remedy, nothing_done="Nothing was loaded.")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _no_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made


def pattern_value(table: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The entry whose key is the name or matches its end, first exact, then in order; PEFT's rule."""
    if name in table:
        return table[name]
    return next((value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def config_text(
    config: LoraConfig, *, kinds: Mapping[str, str], targets: tuple[str, ...], parameters: tuple[str, ...], task: str | None,
    base_name: str | None, revision: str | None,
) -> str:  # fmt: skip
    """The text of adapter_config.json: keys sorted, two blanks, no newline at the end, all 41 keys."""
    values = {
        **DEFAULTS, "r": config.rank, "lora_alpha": plain_number(config.alpha), "use_rslora": config.rslora, "use_dora": config.dora,
        "lora_dropout": config.dropout, "bias": config.train_bias, "lora_bias": config.lora_bias, "target_modules": list(targets),
        "target_parameters": list(parameters) or None, "rank_pattern": dict(config.ranks),
        "alpha_pattern": {name: plain_number(alpha) for name, alpha in config.alphas.items()},
        "modules_to_save": list(config.fully_trained) or None, "fan_in_fan_out": "conv1d" in kinds.values(),
        # Not "loftq": PEFT would quantize the base of whoever loads the file.
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "task_type": TASKS.get(task or ""), "base_model_name_or_path": base_name, "revision": revision,
    }  # fmt: skip
    return json.dumps(values, indent=2, sort_keys=True)


def plain_number(value: float) -> float | int:
    """16.0 as 16, as PEFT writes it."""
    return int(value) if float(value).is_integer() else value
