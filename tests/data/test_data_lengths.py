"""Estimated lengths of rows beside what training counts: every shape, with the model's template and without one; and no torch for it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from halfbyte.config.data import DataConfig
from halfbyte.data import lengths as counting
from halfbyte.data.lengths import lengths
from halfbyte.data.load import load_data
from tests.data.conftest import dressed

TEXT = "Could you dim the kitchen lights, please? It is past midnight. "
ROWS: dict[str, Any] = {
    "messages": lambda n: {
        "messages": [
            {"role": "system", "content": "Reply in JSON."},
            {"role": "user", "content": TEXT * (1 + n % 3)},
            {"role": "assistant", "content": '{"do":"light","room":"kitchen","set":"dim"}'},
            *([{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Now it is dark."}] * (n % 2)),
        ]
    },
    "prompt-completion": lambda n: {"prompt": TEXT * (1 + n % 3), "completion": "dim", "unused": "x" * 400},
    "alpaca": lambda n: {"instruction": "Name the room.", "input": TEXT * (1 + n % 3), "output": "kitchen"},
    "text": lambda n: {"text": TEXT * (1 + n % 3)},
    "tokens": lambda n: {"input_ids": [5] * (9 + n)},
}


@pytest.fixture(scope="module", params=["qwen2_5", "llama3_2"])
def folder(request: pytest.FixtureRequest, backends: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a tokenizer and a template, without weights."""
    made = tmp_path_factory.mktemp("model")
    dressed(backends["bpe"], request.param).save_pretrained(made)
    return made


def written(at: Path, shape: str) -> Path:
    path = at / f"{shape}.jsonl"
    path.write_text("".join(json.dumps(ROWS[shape](number)) + "\n" for number in range(40)), encoding="utf-8")
    return path


def exact(path: Path, tokenizer: Any) -> list[int]:
    data = load_data(DataConfig(path=str(path), eval_rows=0), tokenizer)
    return [len(example.input_ids) for example in data.train]


@pytest.mark.parametrize("shape", ROWS)
def test_rows_are_counted_as_training_counts_them(shape: str, tmp_path: Path, folder: Path) -> None:
    path = written(tmp_path, shape)
    found = lengths(DataConfig(path=str(path)), folder / "tokenizer.json")
    assert list(found.tokens) == exact(path, PreTrainedTokenizerFast.from_pretrained(folder))


@pytest.mark.parametrize("shape", ROWS)
def test_beyond_the_rows_that_are_rendered_it_is_within_a_few_per_cent(
    shape: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, shape)
    monkeypatch.setattr(counting, "RENDERED", 5)
    found = lengths(DataConfig(path=str(path)), folder / "tokenizer.json")
    wanted = exact(path, PreTrainedTokenizerFast.from_pretrained(folder))
    assert sum(found.tokens) == pytest.approx(sum(wanted), rel=0.04)
    assert found.longest == pytest.approx(max(wanted), rel=0.04)


@pytest.mark.parametrize("shape", ["prompt-completion", "alpaca", "text"])
def test_a_model_without_a_template(shape: str, tmp_path: Path, folder: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    path = written(tmp_path, shape)
    found = lengths(DataConfig(path=str(path)), bare / "tokenizer.json")
    assert list(found.tokens) == exact(path, PreTrainedTokenizerFast.from_pretrained(bare))


def test_without_a_tokenizer_the_fields_count_and_not_the_json(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "x" * 292}, {"role": "assistant", "content": "yes"}]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    found = lengths(DataConfig(path=str(path)))
    assert found.tokens == (-(-(292 + 1 + 3) // 3) + 2 * counting.MESSAGE_TOKENS,) and "characters" in found.how


def test_rows_of_no_known_shape_are_counted_by_their_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"sms": "a" * 30, "kind": "b" * 29}) + "\n", encoding="utf-8")
    assert lengths(DataConfig(path=str(path))).tokens == (21,)


def test_the_columns_that_training_reads_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": "a" * 30, "other": "b" * 900}) + "\n" for _ in range(3)), encoding="utf-8")
    assert lengths(DataConfig(path=str(path), shape="text", text_field="body", max_rows=2)).tokens == (11, 11)


def test_counting_needs_no_torch(tmp_path: Path, folder: Path) -> None:
    path = written(tmp_path, "messages")
    program = (
        "import sys; from pathlib import Path; from halfbyte.data.lengths import lengths;"
        "from halfbyte.config.data import DataConfig;"
        f"lengths(DataConfig(path={str(path)!r}), Path({str(folder / 'tokenizer.json')!r}));"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
