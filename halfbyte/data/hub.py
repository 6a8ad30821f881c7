"""Rows of a data set on the Hugging Face hub, only when the user wrote `hub:owner/name` or `hub:owner/name:split`.

Needs the extra `hub` (`pip install 'halfbyte[hub]'`), whose `datasets` >= 4 reads data files only and runs no dataset script.
"""

import re
from typing import Any

from halfbyte.data.faults import Problem, error_of, shown
from halfbyte.errors import EnvironmentFault

NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


def read(name: str, max_rows: int | None) -> tuple[list[dict[str, Any]], str]:
    """(rows, fingerprint) of the data set's split ("train" unless named)."""
    match = NAME.fullmatch(name)
    if match is None:
        raise error_of(Problem("E-DATA-086", name, found=shown(name)))
    try:
        import datasets
    except ImportError:
        raise EnvironmentFault(
            "hub data sets need the extra named hub",
            code="E-ENV-061",
            place=name,
            found="the package datasets is not installed",
            remedy="pip install 'halfbyte[hub]', or download the files and name them instead",
            nothing_done="Nothing was trained.",
        ) from None
    try:
        loaded = datasets.load_dataset(match[1], split=match[2] or "train")
    except (OSError, ValueError, RuntimeError) as refusal:
        raise error_of(Problem("E-DATA-087", name, found=shown(f"{type(refusal).__name__}: {refusal}", 200))) from None
    wanted = loaded if max_rows is None else loaded.select(range(min(max_rows, len(loaded))))
    return [dict(row) for row in wanted], str(loaded._fingerprint)
