"""docs/ARCHITECTURE.md names every module as it is."""

import runpy
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "ARCHITECTURE.md"


def test_the_tree_is_current() -> None:
    made = runpy.run_path(str(PAGE.with_name("make_tree.py")))["page"]()
    assert PAGE.read_text() == made, "run: python docs/make_tree.py"
