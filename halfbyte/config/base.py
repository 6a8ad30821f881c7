"""What all settings classes share: frozen, unknown keys refused, one docstring under each field, and the few field types they use.

Texts that are numbers ("16", "1e-4") are read as numbers, because YAML and shells blur the two; switches are true or false only,
because a quiet `yes` -> true is how a model name or a country code turns into a boolean.

Does not know files (load.py), rules between fields (rules.py, inert.py) or error texts (problems.py).
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Switch = Annotated[bool, Strict()]
RANK_LIMIT, ALPHA_LIMIT = 4096, 1e6
"""The largest rank and alpha of an adapter: what is set, what is written to its folder, and what is read from one."""

Rank = Annotated[int, Field(ge=1, le=RANK_LIMIT)]
Alpha = Annotated[float, Field(gt=0, le=ALPHA_LIMIT)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Auto = Literal["auto"]

INTEGER = re.compile(r"[-+]?[0-9]+\Z")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")


def leaves(annotation: Any) -> Iterator[Any]:
    """The plain types and literal values inside an annotation: int, "auto", None ... (containers are not entered).

    >>> list(leaves(float | Literal["auto"]))
    [<class 'float'>, 'auto']
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from leaves(get_args(annotation)[0])
    elif origin is Literal:
        yield from get_args(annotation)
    elif origin in (tuple, list, dict):
        yield origin
    elif get_args(annotation):
        for part in get_args(annotation):
            yield from leaves(part)
    else:
        yield annotation


def number_from(text: str) -> int | float | None:
    """The number a text spells, or None.

    >>> number_from("1e-4"), number_from(" 16"), number_from("16")
    (0.0001, None, 16)
    """
    if INTEGER.match(text) and len(text) < 20:
        return int(text)
    return float(text) if NUMBER.match(text) and len(text) < 40 else None


class Settings(BaseModel):
    """Base of every settings class."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_blurred_types(cls, value: Any, info: ValidationInfo) -> Any:
        """A switch is not a number; a text that spells a number is one where a number is wanted."""
        kinds = list(leaves(cls.model_fields[info.field_name or ""].annotation))
        wants_number = any(kind in (int, float) or (isinstance(kind, int) and not isinstance(kind, bool)) for kind in kinds)
        if isinstance(value, bool) and bool not in kinds:
            raise PydanticCustomError("not_a_switch", "a switch where something else is wanted")
        if isinstance(value, str) and wants_number and str not in kinds and value not in kinds:
            number = number_from(value)
            return value if number is None else number
        return value
