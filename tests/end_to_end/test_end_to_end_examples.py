"""Every Python example runs, and what it writes is there; every example is in this list."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RUNS = {
    "own_loop.py": ("{model}", "{out}/adapter"),
    "train_and_ask.py": ("{rows}", "{model}", "{out}/run"),
    "with_transformers_trainer.py": ("{model}", "{out}"),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("name", sorted(RUNS))
def test_an_example_runs(name: str, tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word.format(model=tiny_folder, rows=rows_file, out=tmp_path) for word in RUNS[name]]
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert list(tmp_path.rglob("adapter_model.safetensors"))
