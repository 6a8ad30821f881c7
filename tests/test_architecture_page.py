"""docs/ARCHITECTURE.md names every module as it is."""

import re
import runpy
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "ARCHITECTURE.md"


def test_the_tree_is_current() -> None:
    made = runpy.run_path(str(PAGE.with_name("make_tree.py")))["page"]()
    assert PAGE.read_text() == made, "run: python docs/make_tree.py"


def test_the_table_of_layers_is_the_contract_and_names_every_unit() -> None:
    """The contract is the one in pyproject.toml that import-linter checks; __main__ is the command's door and belongs to no level."""
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    told = {int(level): re.findall(r"`(\w+)`", units) for level, units in rows}
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one["type"] == "layers")
    assert told == {level: units.split(" | ") for level, units in enumerate(reversed(layers))}
    there = {path.stem for path in (ROOT / "halfbyte").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    units = [unit for level in told.values() for unit in level]
    assert sorted(units) == sorted(there - {"__init__", "__main__"})
