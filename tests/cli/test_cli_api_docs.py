"""docs/python.md is what the docstrings say, names everything public, and its examples run."""

import re
import runpy
from pathlib import Path

import pytest

import halfbyte
from halfbyte import api
from halfbyte.cli import api_docs
from tests.end_to_end.tiny_world import rows, write_model, write_rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def test_the_python_page_is_that_of_the_docstrings() -> None:
    assert PAGE.read_text() == api_docs.markdown(), "run: python -m halfbyte.cli.api_docs > docs/python.md"


def test_the_page_has_every_public_name_and_all_that_a_run_can_do() -> None:
    assert sorted(api_docs.ORDER) == sorted(halfbyte.__all__)
    page = PAGE.read_text()
    named = {f"### Run.{name}" for name in vars(api.Run) if not name.startswith("_") and name != "folder"}
    assert named <= set(page.splitlines())
    assert all(f"\n## halfbyte.{name}\n" in page for name in halfbyte.__all__)


def test_a_docstring_keeps_its_parts_and_a_signature_its_defaults() -> None:
    made = api_docs.prose("Says it.\nTwice <so>.\n\na    one\n     and on\nb_c  two\nRaises X.\n\n>>> f(1)\n2\n\nEnd.")
    assert made == (
        "Says it. Twice \\<so>.\n\n- `a`: one and on\n- `b_c`: two\n\nRaises X.\n\n```python\n>>> f(1)\n2\n```\n\nEnd."
    )
    shown = api_docs.signature("halfbyte.inject", api.inject)
    assert shown == "halfbyte.inject(model: nn.Module, *, seed: int = 0, **settings: Any) -> Injected"
    assert "\n    format: str = 'nf4',\n    blocksize: int = 64,\n" in api_docs.signature("halfbyte.quantize", api.quantize)


def test_the_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand, but with a tiny model in the place of the starter."""
    base = write_model(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", rows(12))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", api_docs.HEAD, re.DOTALL)
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        program = tmp_path / f"example_{number}.py"
        program.write_text(block.replace('"starter"', f'"{base}"'))
        runpy.run_path(str(program))
    told = capsys.readouterr().out
    assert "% of the parameters train" in told and "'exact_match': 0.0" in told and "E-MODEL-001" in told
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file() and (tmp_path / "merged" / "config.json").is_file()


def test_the_programs_that_the_page_names_are_there() -> None:
    assert all((PAGE.parent / link).is_file() for link in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()))
