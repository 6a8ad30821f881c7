"""The Triton kernels: in Triton's interpreter on any machine, as the compiler makes them, and on a GPU where there is one.

The checks are in triton_checks.py and triton_compiles.py.  They run in processes of their own, for TRITON_INTERPRET is read when Triton is
imported, and a kernel is either interpreted or compiled.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

HERE = Path(__file__).parent
Outcomes = Callable[[str, bool], dict[str, list[str]]]


def _names(file: str) -> list[str]:
    tree = ast.parse((HERE / file).read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """(file of checks, interpreted?) -> name of a check -> what went wrong in its cases; a file runs once, with the checks asked for."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    wanted = {item.callspec.params["name"] for item in request.session.items if "outcomes" in getattr(item, "fixturenames", ())}  # type: ignore[attr-defined]
    known: dict[tuple[str, bool], dict[str, list[str]]] = {}

    def run(file: str, interpret: bool) -> dict[str, list[str]]:
        if (file, interpret) not in known:
            report = tmp_path_factory.mktemp("triton") / "report.xml"
            environment = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "PYTEST_"))}
            environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
            cases = [f"{HERE / file}::{name}" for name in _names(file) if name in wanted]
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *cases]
            done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
            assert report.exists(), f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            known[file, interpret] = _read(report)
        return known[file, interpret]

    return run


def _read(report: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        faults = found.setdefault(case.attrib["name"].partition("[")[0], [])
        faults += [f"{case.attrib['name']}: {part.text}" for part in case if part.tag in ("failure", "error")]
    return found


def _check(outcomes: dict[str, list[str]], name: str) -> None:
    assert name in outcomes, "the check did not run"
    assert not outcomes[name], "\n".join(outcomes[name])[-6000:]


@pytest.mark.parametrize("name", _names("triton_checks.py"))
def test_in_the_interpreter(name: str, outcomes: Outcomes) -> None:
    _check(outcomes("triton_checks.py", True), name)


@pytest.mark.parametrize("name", _names("triton_compiles.py"))
def test_what_the_compiler_makes(name: str, outcomes: Outcomes) -> None:
    _check(outcomes("triton_compiles.py", False), name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("name", _names("triton_checks.py"))
def test_on_the_gpu(name: str, outcomes: Outcomes) -> None:
    _check(outcomes("triton_checks.py", False), name)
