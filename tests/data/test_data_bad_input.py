"""Every bad data file gives one block: code, place, found, expected, remedy, exit code 2, and nothing trained.

The cases write a file each; the golden file tests/golden/bad_data.json holds the blocks, with the test's folder left out.
Run `python -m tests.data.test_data_bad_input` to write the golden file anew, and read the difference.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from halfbyte.config.data import DataConfig
from halfbyte.data.load import load_data
from halfbyte.errors import DataError
from tests.data.conftest import KINDS, dressed

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bad_data.json"
GOOD = '{"prompt": "one", "completion": "two"}\n'
Make = Callable[[Path], Path]


def jsonl(*lines: str | bytes, name: str = "rows.jsonl") -> Make:
    """A file of these lines, as they are."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))
        return path

    return make


def rows(*values: Any) -> Make:
    """A .jsonl file of these values."""
    return jsonl(*[json.dumps(value) + "\n" for value in values])


def chat(*messages: tuple[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]} | (more or {})


OK = chat(("user", "hello"), ("assistant", "world"))


def _parquet(folder: Path) -> Path:
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b", None], "completion": ["c", "d", "e"]}), path)
    return path


def _cut_parquet(folder: Path) -> Path:
    path = _parquet(folder)
    path.write_bytes(path.read_bytes()[:200])
    return path


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def _folder(*names: str) -> Make:
    def make(folder: Path) -> Path:
        inside = folder / "data"
        inside.mkdir()
        for name in names:
            (inside / name).write_text(GOOD)
        return inside

    return make


def _overlap(folder: Path) -> Path:
    (folder / "eval.jsonl").write_text(GOOD)
    return jsonl(GOOD, '{"prompt": "three", "completion": "four"}\n')(folder)


SHORT, LONG = (json.dumps({"input_ids": [5] * count}) + "\n" for count in (9, 4_000))  # tokens, so that no trained vocabulary counts
DEEP = '{"prompt": "x", "completion": ' + "[" * 70 + "]" * 70 + "}\n"
CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "missing file": (lambda folder: folder / "nowhere.jsonl", {}),
    "missing file with a near name": (lambda folder: jsonl(GOOD)(folder).with_name("row.jsonl"), {}),
    "missing folder": (lambda folder: folder / "nowhere" / "rows.jsonl", {}),
    "path through a file": (lambda folder: jsonl(GOOD)(folder) / "inside.jsonl", {}),
    "empty file": (jsonl(""), {}),
    "only blank lines": (jsonl("\n\n  \n"), {}),
    "empty json": (jsonl("", name="rows.json"), {}),
    "empty json array": (jsonl("[]", name="rows.json"), {}),
    "empty csv": (jsonl("", name="rows.csv"), {}),
    "csv of a header only": (jsonl("prompt,completion\n", name="rows.csv"), {}),
    "empty parquet": (jsonl("", name="rows.parquet"), {}),
    "invalid json": (jsonl(GOOD, '{"prompt": "a" "completion": "b"}\n', GOOD), {}),
    "three invalid lines": (jsonl('{"prompt" "a"}\n', GOOD, "nonsense\n", "{'a': 1}\n"), {}),
    "more than twenty invalid lines": (jsonl(*["nonsense\n"] * 25), {}),
    "more bad rows than may go": (jsonl("nonsense\n", "nonsense\n", GOOD), {"skip_bad_rows": 1}),
    "half-copied last line": (jsonl(GOOD, '{"prompt": "a", "compl'), {}),
    "half-copied array": (jsonl('[{"prompt": "a", "completion": "b"}, {"prompt": "c"', name="rows.json"), {}),
    "missing comma in an array": (jsonl('[{"prompt": "a", "completion": "b"}\n {"prompt": "c"}]', name="rows.json"), {}),
    "row is a list": (jsonl(GOOD, "[1, 2]\n"), {}),
    "row is a number": (jsonl(GOOD, "7\n"), {}),
    "array of texts": (jsonl('["a", "b"]', name="rows.json"), {}),
    "name stands twice": (jsonl('{"prompt": "a", "prompt": "b", "completion": "c"}\n'), {}),
    "NaN": (jsonl('{"prompt": "a", "completion": "b", "score": NaN}\n'), {}),
    "Infinity": (jsonl('{"prompt": "a", "completion": "b", "score": -Infinity}\n'), {}),
    "a number beyond doubles": (jsonl('{"prompt": "a", "completion": "b", "score": 1e999}\n'), {}),
    "a whole number beyond 64 bits": (jsonl('{"prompt": "a", "completion": "b", "id": 9223372036854775808}\n'), {}),
    "nested too deep": (jsonl(GOOD, DEEP), {}),
    "nested so deep that parsers fall": (jsonl("[" * 100_000, "\n"), {}),
    "half a surrogate pair": (jsonl('{"prompt": "a\\ud800", "completion": "b"}\n'), {}),
    "NUL escape": (jsonl('{"prompt": "a\\u0000", "completion": "b"}\n'), {}),
    "NUL byte": (jsonl(GOOD, b'{"prompt": "a\x00", "completion": "b"}\n'), {}),
    "raw control character in text": (jsonl(b'{"prompt": "a\x07b", "completion": "c"}\n'), {}),
    "latin-1": (jsonl(GOOD, '{"prompt": "caf\u00e9", "completion": "b"}\n'.encode("latin-1")), {}),
    "utf-16": (jsonl(GOOD.encode("utf-16")), {}),
    "utf-16 without a mark": (jsonl((GOOD * 4).encode("utf-16-le")), {}),
    "utf-32": (jsonl(GOOD.encode("utf-32")), {}),
    "latin-1 csv": (jsonl("prompt,completion\na,b\ncaf\u00e9,d\n".encode("latin-1"), name="rows.csv"), {}),
    "gzip": (jsonl(b"\x1f\x8b", name="rows.jsonl.gz"), {}),
    "zip": (jsonl(b"PK", name="rows.zip"), {}),
    "unknown ending": (jsonl(GOOD, name="rows.txt"), {}),
    "no ending": (jsonl(GOOD, name="rows"), {}),
    "folder without a training file": (_folder("notes.md", "test.jsonl"), {}),
    "empty folder": (_folder(), {}),
    "pattern that matches nothing": (lambda folder: folder / "*.jsonl", {}),
    "pipe": (_fifo, {}),
    "device": (lambda folder: Path("/dev/null"), {}),
    "semicolons": (jsonl("prompt;completion\na;b\n", name="rows.csv"), {}),
    "tabs in a csv": (jsonl("prompt\tcompletion\na\tb\n", name="rows.csv"), {}),
    "ragged csv": (jsonl("prompt,completion\na,b\nc\nd,e,f\n", name="rows.csv"), {}),
    "csv without a header": (jsonl("what is one,two\nwhat is two,three\n", name="rows.csv"), {}),
    "csv names a column twice": (jsonl("prompt,prompt\na,b\n", name="rows.csv"), {}),
    "csv with an empty name": (jsonl("prompt,completion,\na,b,c\n", name="rows.csv"), {}),
    "csv with an open quote": (jsonl('prompt,completion\na,b\n"c,d\ne,f\n', name="rows.csv"), {}),
    "cut parquet": (_cut_parquet, {}),
    "null in parquet": (_parquet, {}),
    "unknown fields": (rows({"question": "a", "answer": "b"}), {}),
    "misspelt field": (rows({"promt": "a", "completion": "b"}), {}),
    "mixed shapes": (rows({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}, OK), {}),
    "preference pairs": (rows({"prompt": "a", "chosen": "b", "rejected": "c"}), {}),
    "shape asked for is not there": (rows({"prompt": "a", "completion": "b"}), {"shape": "messages"}),
    "null completion": (rows({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}), {}),
    "missing completion": (rows({"prompt": "a", "completion": "b"}, {"prompt": "c"}), {}),
    "number as text": (rows({"prompt": 7, "completion": "b"}), {}),
    "object as text": (rows({"prompt": "a", "completion": {"text": "b"}}), {}),
    "two fields of one row": (rows({"prompt": None, "completion": 3}), {}),
    "unknown role": (rows(OK, chat(("user", "a"), ("asistant", "b"))), {}),
    "a bad line and a bad role in one pass": (
        jsonl(json.dumps(OK) + "\n", "nonsense\n", json.dumps(chat(("user", "a"), ("bott", "b")))), {}),
    "unknown role in four rows": (rows(OK, *[chat(("user", "a"), ("asistant", str(number))) for number in range(4)]), {}),
    "missing role": (rows({"messages": [{"content": "a"}]}), {}),
    "role is a number": (rows({"messages": [{"role": 1, "content": "a"}]}), {}),
    "missing content": (rows({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}), {}),
    "null content": (rows(chat(("user", "a"), ("assistant", None))), {}),
    "image part": (rows(chat(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "b"))), {}),
    "messages is text": (rows({"messages": "hello"}), {}),
    "messages is empty": (rows({"messages": []}), {}),
    "message is text": (rows({"messages": ["hello"]}), {}),
    "no user message": (rows(chat(("system", "a"), ("assistant", "b"))), {}),
    "ends with the user": (rows(chat(("user", "a"), ("assistant", "b"), ("user", "c"))), {}),
    "two system messages": (rows(chat(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d"))), {}),
    "late system message": (rows(chat(("user", "c"), ("system", "a"), ("assistant", "d"))), {}),
    "tools are text": (rows(chat(("user", "c"), ("assistant", "d"), more={"tools": "search"})), {}),
    "sharegpt with an unknown speaker": (rows({"conversations": [{"from": "humen", "value": "a"}, {"from": "gpt", "value": "b"}]}), {}),
    "alpaca history that is no list of pairs": (rows({"instruction": "a", "output": "b", "history": [["q"]]}), {}),
    "tokens that are no numbers": (rows({"input_ids": [1, "2", 3]}), {}),
    "negative token": (rows({"input_ids": [1, -2]}), {}),
    "token outside the vocabulary": (rows({"input_ids": [1, 999_999]}), {}),
    "labels of another length": (rows({"input_ids": [1, 2, 3], "labels": [1, 2]}), {}),
    "shifted labels": (rows({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}), {}),
    "label that is a list": (rows({"text": "a", "label": ["x"]}), {}),
    "null label": (rows({"text": "a", "label": "x"}, {"text": "b", "label": None}), {}),
    "empty answers": (rows(*[{"prompt": "a", "completion": " "}] * 3), {}),
    "no answers": (rows(*[chat(("user", "a"))] * 3), {}),
    "all rows too long": (jsonl(LONG, LONG), {"max_tokens": 64}),
    "a long row where none may be": (jsonl(SHORT, LONG), {"max_tokens": 64, "long_rows": "refuse"}),
    "duplicates in strict mode": (jsonl(GOOD, GOOD), {"strict": True}),
    "overlap in strict mode": (_overlap, {"strict": True, "eval_path": "eval.jsonl"}),
    "every row held out": (jsonl(GOOD, GOOD), {"eval_rows": 2}),
    "misspelt hub name": (lambda folder: Path("hub:just-a-name"), {}),
}


def block_of(case: str, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The error of a case as a dict, with the folder's name left out."""
    make, settings = CASES[case]
    path = make(folder)
    if "eval_path" in settings:
        settings = settings | {"eval_path": str(folder / settings["eval_path"])}
    try:
        load_data(DataConfig(path=str(path), **({"eval_rows": 0} | settings)), tokenizer)
    except DataError as fault:
        names = ("code", "rule", "place", "found", "expected", "remedy", "nothing_done", "exit_code")
        fields = {name: getattr(fault, name) for name in names}
        return {name: value.replace(str(folder) + os.sep, "").replace(str(folder), ".") if isinstance(value, str) else value
                for name, value in fields.items()}
    raise AssertionError(f"{case}: the file was accepted")


@pytest.mark.parametrize("case", list(CASES))
def test_bad_data_gives_its_block(case: str, tmp_path: Path, chatml: Any) -> None:
    """Code, place, found, expected, remedy and exit code are those of the golden file."""
    block = block_of(case, tmp_path, chatml)
    assert block == json.loads(GOLDEN.read_text())[case]
    assert block["exit_code"] == 2 and block["nothing_done"] == "Nothing was trained."
    assert all(block[name] for name in ("code", "place", "found", "expected", "remedy"))


def test_the_golden_file_has_no_other_cases() -> None:
    """A case that is removed leaves the golden file too."""
    assert list(json.loads(GOLDEN.read_text())) == list(CASES)
    assert len(CASES) >= 60


def test_file_without_permission(tmp_path: Path, chatml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that may not be read is named, also where the tests run as root."""
    path = jsonl(GOOD)(tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(path=str(path)), chatml)
    assert (caught.value.code, caught.value.found, caught.value.exit_code) == ("E-DATA-002", "Permission denied", 2)


def test_file_that_changes_while_it_is_read(tmp_path: Path, chatml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row appended meanwhile is noticed."""
    from halfbyte.data import json_rows
    from halfbyte.data import rows as rows_module

    path = jsonl(GOOD)(tmp_path)

    def read_and_append(*given: Any) -> Any:
        result = json_rows.read_lines(*given)
        with open(path, "a") as opened:
            opened.write(GOOD)
        return result

    monkeypatch.setitem(rows_module.READERS, ".jsonl", read_and_append)
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(path=str(path)), chatml)
    assert caught.value.code == "E-DATA-009" and "39 bytes before, 78 bytes after" in caught.value.found


def test_line_over_16_mib(tmp_path: Path, chatml: Any) -> None:
    """One huge line is named; the lines after it keep their numbers."""
    path = jsonl('{"prompt": "', "x" * (17 * 2**20), '", "completion": "b"}\n', "nonsense\n")(tmp_path)
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(path=str(path)), chatml)
    assert (caught.value.code, caught.value.place) == ("E-DATA-013", f"{path} line 1")
    assert "also line 2: column 1" in caught.value.found


def main() -> None:
    """Write the golden file."""
    tokenizer = dressed(KINDS["bpe"](), "qwen2_5")
    blocks = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            blocks[case] = block_of(case, Path(folder), tokenizer)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(blocks, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
