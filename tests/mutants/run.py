"""Run every mutant and print caught/total: `python -m tests.mutants.run [--trap T47] [--table docs/numerics.md] [--jobs 2]`.

Each mutant is applied to a copy of the tree, its test is run there, and the test must fail by an assertion or error of the
test itself (exit 1).  A test that does not run (exit 2 to 5) does not count as caught.
"""

import argparse
import concurrent.futures
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tests.mutants as here
from tests.mutants.mutant import Mutant
from tests.mutants.traps import ABSENT, TITLES

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("halfbyte", "tests", "benchmarks", "pyproject.toml", "examples", "docs")


def collect() -> list[Mutant]:
    """All mutants, in order of trap number, then name."""
    found: list[Mutant] = []
    for module in pkgutil.iter_modules(here.__path__):
        if module.name not in ("mutant", "run", "traps"):
            found += importlib.import_module(f"tests.mutants.{module.name}").MUTANTS
    return sorted(found, key=lambda mutant: (int(mutant.trap.lstrip("T") or 0), mutant.name))


def try_one(mutant: Mutant) -> tuple[Mutant, bool, str]:
    """Apply one mutant to a fresh copy of the tree and run its test."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, tree / name)
        target = tree / mutant.file
        text = target.read_text()
        if text.count(mutant.find) != 1:
            return mutant, False, f"the text to break stands {text.count(mutant.find)} times in {mutant.file}"
        target.write_text(text.replace(mutant.find, mutant.replace))
        env = dict(os.environ, PYTHONPATH=str(tree), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout=300", mutant.test]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        return mutant, done.returncode == 1, f"pytest exit {done.returncode}" + ("" if done.returncode == 1 else "\n" + done.stdout[-800:])


def table(mutants: list[Mutant]) -> str:
    """The list for docs/numerics.md: every trap, the mutants and tests that guard it, or why this code cannot have it."""
    lines = ["| trap | bug put in on purpose | test that fails on it |", "|---|---|---|"]
    for trap in sorted(TITLES, key=lambda name: int(name[1:])):
        rows = [mutant for mutant in mutants if mutant.trap == trap]
        lines += [f"| {trap} {TITLES[trap]} | {mutant.name} (`{mutant.file}`) | `{mutant.test}` |" for mutant in rows]
        if not rows:
            lines.append(f"| {trap} {TITLES[trap]} | not in this code: {ABSENT[trap]} | |")
    return "\n".join(lines)


def write_table(path: Path, mutants: list[Mutant]) -> None:
    """Put the table between the markers of the page."""
    head, rest = path.read_text().split("<!-- mutants -->\n")
    tail = rest.split("<!-- /mutants -->")[1]
    path.write_text(f"{head}<!-- mutants -->\n{table(mutants)}\n<!-- /mutants -->{tail}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", type=Path, help="only write the list of mutants into this page, between its markers")
    parser.add_argument("--trap", help="only this trap")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--result", type=Path, help="write the outcome as JSON")
    options = parser.parse_args()
    if options.table:
        write_table(options.table, collect())
        return 0
    mutants = [mutant for mutant in collect() if options.trap in (None, mutant.trap)]
    rows = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for mutant, caught, why in pool.map(try_one, mutants):
            rows.append({"trap": mutant.trap, "mutant": mutant.name, "file": mutant.file, "test": mutant.test, "caught": caught})
            print(f"{'caught' if caught else 'MISSED'}  {mutant.trap:<4} {mutant.name}{'' if caught else ': ' + why}", flush=True)
    caught = sum(row["caught"] for row in rows)
    print(f"{caught}/{len(rows)} mutants caught, {len({row['trap'] for row in rows})} traps")
    if options.result:
        from benchmarks import record

        options.result.write_text(json.dumps({**record.header(), "caught": caught, "total": len(rows), "mutants": rows}, indent=1) + "\n")
    return 0 if caught == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
