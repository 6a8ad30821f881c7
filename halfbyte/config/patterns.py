"""How a pattern of `lora.targets`, `exclude`, `ranks` or `layers` meets the name of a module.

| pattern | matches |
|---|---|
| `q_proj`, `self_attn.q_proj` | modules of exactly this name or ending in "." + it; a module `my_q_proj` is not meant |
| `.*layers\\.[01]\\..*_proj`  | (any other character than letters, digits, "_" and ".") whole names by regular expression |
| `experts.gate_up_proj`       | a fused expert parameter, by the name of its module + "." + its own |

Names are texts here: the layers of a model (lora/targets.py) and those of a config.json (plan/setting.py) are chosen by the same rules.
Sources: the rules are PEFT's, https://huggingface.co/docs/peft/package_reference/lora (exact ends instead of bare suffixes).
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from halfbyte.errors import TargetError

ALL_LINEAR = "all-linear"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+")


def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression; TargetError where it is not one."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise TargetError(
            "a pattern must be a module name or a regular expression", code="E-TARGET-005", found=pattern, expected=str(error),
        ) from None  # fmt: skip


def matches(pattern: str, name: str) -> bool:
    """Whether a target pattern means this module.

    >>> matches("q_proj", "model.layers.0.self_attn.q_proj"), matches("q_proj", "my_q_proj"), matches(r".*\\.[qv]_proj", "a.v_proj")
    (True, False, True)
    """
    if PLAIN_NAME.fullmatch(pattern):
        return name == pattern or name.endswith("." + pattern)
    return compiled(pattern).fullmatch(name) is not None


def skips(pattern: str, name: str) -> bool:
    """Whether a pattern of quant.skip means this layer: whole dotted parts, or a * pattern on the full name; "gate" is not "gate_proj".

    >>> layer = "model.layers.0.mlp.gate_proj"
    >>> skips("mlp", layer), skips("gate", layer), skips("*.gate_proj", layer)
    (True, False, True)
    """
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The pattern of a per-module table that means `name`: itself, else the first that matches at a dot of the name, else None."""
    patterns = list(patterns)
    if name in patterns:
        return name
    return next((pattern for pattern in patterns if compiled(rf"(.*\.)?({pattern})$").match(name)), None)


def in_layers(name: str, layers: tuple[int, ...]) -> bool:
    """Whether the first number among the parts of the name is one of `layers`; empty means all."""
    number = next((part for part in name.split(".") if part.isdigit()), None)
    return not layers or (number is not None and int(number) in layers)
