"""What a field allows, in words, read from its annotation: for error blocks and for docs/config.md alike.

    Annotated[int, Field(ge=1, le=4096)]   ->  a whole number, 1 to 4096
    Literal["auto"] | float                ->  auto, or a number
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def _bounds(metadata: Iterable[Any]) -> str:
    low = high = ""
    inclusive = True
    for part in metadata:
        if isinstance(part, Ge):
            low = str(part.ge)
        elif isinstance(part, Gt):
            low, inclusive = str(part.gt), False
        elif isinstance(part, Le):
            high = f"at most {part.le}"
        elif isinstance(part, Lt):
            high = f"under {part.lt}" if part.lt != 2**63 else "under 2^63"
        elif isinstance(part, MinLen):
            return "not empty"
        elif hasattr(part, "metadata"):
            return _bounds(part.metadata)
    if low and inclusive and high.startswith("at most"):
        return f"{low} to {high.removeprefix('at most ')}"
    low_text = (f"at least {low}" if inclusive else f"over {low}") if low else ""
    return ", ".join(part for part in (low_text, high) if part)


def allowed_by(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """The legal values of an annotation as words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed_by(args[0], args[1:])
    if origin is Literal:
        words = [str(arg) for arg in args]
        return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
    if origin is tuple and args[-1] is Ellipsis:
        return f"a list, each {allowed_by(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}, each {allowed_by(args[0])}"
    if origin is dict:
        return f"a mapping of module name pattern to {allowed_by(args[1])}"
    if args:
        return ", or ".join(allowed_by(part) for part in args)
    bounds = _bounds(metadata)
    return _PLAIN[annotation] + (f", {bounds}" if bounds else "")


def allowed(field: FieldInfo) -> str:
    """The legal values of a settings field as words."""
    return allowed_by(field.annotation, field.metadata)
