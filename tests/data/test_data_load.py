"""From files to examples: kinds of file, shapes, split, duplicates, identity."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from halfbyte.config.data import DataConfig
from halfbyte.data import show
from halfbyte.data.load import TrainData, load_data
from halfbyte.data.rows import read_rows
from halfbyte.data.samples import ClassSample, Conversation, TextSample, TokenSample, detect, samples_of
from halfbyte.errors import DataError, EnvironmentFault
from tests.data.conftest import dressed, words

PAIRS = [{"prompt": f"what is {word}", "completion": f"it is {word[::-1]}"} for word in words(5, 40)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, tokenizer: Any, **settings: Any) -> TrainData:
    return load_data(DataConfig(path=str(path), **settings), tokenizer)


def trained_text(data: TrainData, tokenizer: Any, number: int = 0) -> str:
    return "".join(text for text, trained in show.segments(data.train[number], tokenizer) if trained)


# --- kinds of file


def _csv(folder: Path) -> Path:
    lines = ["prompt,completion", *[f'"{row["prompt"]}","{row["completion"]}"' for row in PAIRS]]
    (folder / "rows.csv").write_text("\r\n".join(lines) + "\r\n")
    return folder / "rows.csv"


def _tsv(folder: Path) -> Path:
    (folder / "rows.tsv").write_text("prompt\tcompletion\n" + "".join(f"{row['prompt']}\t{row['completion']}\n" for row in PAIRS))
    return folder / "rows.tsv"


def _parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), folder / "rows.parquet")
    return folder / "rows.parquet"


def _json(text: Callable[[list[dict[str, str]]], str], name: str = "rows.json") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text(PAIRS), encoding="utf-8")
        return folder / name

    return make


def _folder(folder: Path) -> Path:
    write(folder / "train.jsonl", PAIRS)
    return folder


def _pattern(folder: Path) -> Path:
    write(folder / "a.jsonl", PAIRS[:10])
    write(folder / "b.jsonl", PAIRS[10:])
    return folder / "*.jsonl"


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "jsonl": (lambda folder: write(folder / "rows.jsonl", PAIRS), ""),
    "blank lines": (_json(lambda rows: "\n\n".join(map(json.dumps, rows)), "rows.jsonl"), ""),
    "no line end at the end": (_json(lambda rows: "\n".join(map(json.dumps, rows)), "rows.jsonl"), ""),
    "windows line ends": (_json(lambda rows: "\r\n".join(map(json.dumps, rows)), "rows.jsonl"), ""),
    "byte order mark": (_json(lambda rows: "\ufeff" + "\n".join(map(json.dumps, rows)), "rows.jsonl"), "byte order mark"),
    "array in jsonl": (_json(json.dumps, "rows.jsonl"), "JSON array"),
    "array": (_json(lambda rows: json.dumps(rows, indent=2)), ""),
    "lines in json": (_json(lambda rows: "\n".join(map(json.dumps, rows))), "one JSON object per line"),
    "object with rows": (_json(lambda rows: json.dumps({"version": 1, "data": rows})), "field data"),
    "csv": (_csv, ""),
    "tsv": (_tsv, ""),
    "parquet": (_parquet, ""),
    "folder": (_folder, ""),
    "pattern": (_pattern, ""),
}


@pytest.mark.parametrize("kind", list(FILES))
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    """The same 40 rows, each with its place, and a note where the file is not what its name says."""
    make, note = FILES[kind]
    read = read_rows(make(tmp_path))
    assert [row.values for row in read.rows] == PAIRS
    assert len({row.place for row in read.rows}) == 40
    assert (note in " ".join(read.notes)) if note else read.notes == []
    assert len(read.digest) == 64
    assert len(read_rows(make(tmp_path), max_rows=7).rows) == 7


def test_lines_of_an_indented_array(tmp_path: Path) -> None:
    """A row of a JSON array is named by the line on which it starts."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(PAIRS[:3], indent=2))
    assert [row.line for row in read_rows(path).rows] == [2, 6, 10]


def test_bad_rows_may_go(tmp_path: Path, chatml: Any) -> None:
    """Up to skip_bad_rows rows of any fault are left out and listed."""
    path = tmp_path / "rows.jsonl"
    path.write_text('nonsense\n{"prompt": null, "completion": "x"}\n' + "".join(json.dumps(row) + "\n" for row in PAIRS))
    data = load(path, chatml, skip_bad_rows=2, eval_rows=0)
    assert len(data.train) == 40
    assert any("2 bad rows" in note and "line 1, 2" in note for note in data.notes)


def test_hub_data_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the way to it is named."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFault, match=r"halfbyte\[hub\]"):
        read_rows("hub:someone/something")


# --- shapes

CHAT = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
SHAPES: dict[str, tuple[dict[str, Any], str, str]] = {
    "messages": ({"messages": CHAT}, "messages", "say"),
    "content parts": ({"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "say"}]}]}, "messages", "say"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]}, "sharegpt", "say"),
    "prompt and completion": ({"prompt": "ask", "completion": "say"}, "prompt-completion", "say"),
    "lists of messages": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt-completion", "say"),
    "alpaca": ({"instruction": "ask", "input": "this", "output": "say"}, "alpaca", "say"),
    "alpaca with history": ({"instruction": "ask", "output": "say", "history": [["q", "a"]], "system": "s"}, "alpaca", "say"),
    "text": ({"text": "ask and say"}, "text", " and say"),
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_shapes_are_found_by_looking(name: str, tmp_path: Path, chatml: Any) -> None:
    """The shape, the fields used and ignored, and what is trained."""
    row, shape, trained = SHAPES[name]
    data = load(write(tmp_path / "rows.jsonl", [row | {"source": "here"}] * 2), chatml, eval_rows=0)
    assert data.shape.name == shape and data.shape.ignored == ("source",) and set(data.shape.used) == set(row)
    text = trained_text(data, chatml)
    assert text.endswith(trained + "<|im_end|>")
    if shape != "text":
        assert "ask" not in text


def test_earlier_answers_of_a_prompt_are_not_trained(tmp_path: Path, chatml: Any) -> None:
    """A prompt given as messages is all prompt."""
    row = {"prompt": [*CHAT, {"role": "user", "content": "more"}], "completion": [{"role": "assistant", "content": "last"}]}
    assert trained_text(load(write(tmp_path / "rows.jsonl", [row]), chatml, eval_rows=0), chatml) == "last<|im_end|>"


def test_samples_have_their_kind() -> None:
    """Each shape becomes its kind of sample."""
    from halfbyte.data.rows import Row

    kinds = {"tokens": TokenSample, "classification": ClassSample, "text": TextSample, "messages": Conversation}
    rows = {
        "tokens": {"input_ids": [3, 4], "labels": [-100, 4]},
        "classification": {"text": "a", "label": 1},
        "text": {"text": "a"},
        "messages": {"messages": CHAT},
    }
    for name, values in rows.items():
        shape = detect([Row(values, "f", 1)])
        assert shape.name == name and isinstance(samples_of([Row(values, "f", 1)], shape)[0], kinds[name])


def test_tokens_are_taken_as_they_are(tmp_path: Path, chatml: Any) -> None:
    """Ids and labels untouched, but for the first label, which nothing predicts; without labels all is trained."""
    path = write(tmp_path / "rows.jsonl", [{"input_ids": [5, 0, 7], "labels": [5, -100, 7]}, {"input_ids": [0, 8, 0]}])
    data = load(path, chatml, eval_rows=0)
    assert [(one.input_ids, one.labels) for one in data.train] == [([5, 0, 7], [-100, -100, 7]), ([0, 8, 0], [-100, 8, 0])]


def test_classes(tmp_path: Path, chatml: Any) -> None:
    """Labels are numbered in order, numbers by value; given names win."""
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "label": "10"}, {"text": "b", "label": 9}, {"text": "c", "label": "10"}])
    data = load(path, chatml, eval_rows=0)
    assert data.labels == ("9", "10") and [one.label for one in data.train] == [1, 0, 1]
    named = load_data(DataConfig(path=str(path), eval_rows=0), chatml, labels=("10", "9"))
    assert [one.label for one in named.train] == [0, 1, 0]


def test_text_begins_and_ends_once(tmp_path: Path, backends: Any) -> None:
    """Begin token where the tokenizer puts one, end token, and the text's own special tokens stay text."""
    from tokenizers import processors

    tokenizer = dressed(backends["bpe"], "llama3")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", tokenizer.bos_token_id)]
    )
    try:
        path = write(tmp_path / "rows.jsonl", [{"text": "some text"}, {"text": "a <|end_of_text|> b"}])
        data = load(path, tokenizer, eval_rows=0)
    finally:
        backends["bpe"].post_processor = processors.ByteLevel()
    for one in data.train:
        assert (one.input_ids[0], one.input_ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert one.input_ids.count(tokenizer.bos_token_id) == one.input_ids.count(tokenizer.eos_token_id) == 1
        assert one.labels == [-100, *one.input_ids[1:]]


# --- dropped, cut, told


def test_what_is_dropped_is_counted_and_told(tmp_path: Path, chatml: Any) -> None:
    """Empty answers and long rows, each with its number; tokens in are tokens kept and tokens dropped.  # T17 T18"""
    rows = [*PAIRS, {"prompt": "x", "completion": "  "}, {"prompt": "y " * 300, "completion": "z"}]
    data = load(write(tmp_path / "rows.jsonl", rows), chatml, eval_rows=0, max_tokens=200)
    assert data.report.dropped == {"an empty assistant message": 1, "over 200 tokens": 1}
    assert (data.report.rows, data.report.kept) == (42, 40) and data.report.longest_place.endswith("line 42")
    assert any("1 of 42 rows exceed 200 tokens" in note and "line 42" in note for note in data.notes)
    assert all(any(label != -100 for label in one.labels) for one in data.train)
    cut = load(write(tmp_path / "rows.jsonl", rows), chatml, eval_rows=0, max_tokens=200, long_rows="cut-prompt")
    assert cut.report.cut == 1 and len(cut.train[-1].input_ids) == 200
    assert trained_text(cut, chatml, 40) == "z<|im_end|>"
    assert cut.report.tokens + cut.report.tokens_dropped == data.report.tokens + data.report.tokens_dropped


def test_what_is_dropped_of_the_held_out_rows_is_told_too(tmp_path: Path, chatml: Any) -> None:
    held_out = write(tmp_path / "held_out.jsonl", [*PAIRS[:3], {"prompt": "y " * 300, "completion": "z"}])
    data = load(write(tmp_path / "rows.jsonl", PAIRS[3:]), chatml, eval_path=str(held_out), max_tokens=200)
    assert len(data.eval) == 3
    assert [note for note in data.notes if note.startswith("held out: 1 of 4 rows exceed 200 tokens")]


def test_what_a_template_adds_is_told(tmp_path: Path, backends: Any) -> None:
    """A date, an empty reasoning block, and a generation prompt that the rows do not have."""
    path = write(tmp_path / "rows.jsonl", PAIRS)
    for name, words_of_note in (("llama3_2", "writes the date"), ("qwen3", "it is not trained"), ("deepseekv3", "does not stand before")):
        notes = load(path, dressed(backends["bpe"], name)).notes
        assert any(words_of_note in note for note in notes), (name, notes)
    token = backends["bpe"].token_to_id("<|eot_id|>")
    ends = f'answers end with "<|eot_id|>" (token {token}); the tokenizer\'s own end token is "<|end_of_text|>"'
    assert load(path, dressed(backends["bpe"], "llama3")).notes == [ends]


# --- split, duplicates, overlap


def test_split_keeps_equal_rows_on_one_side_and_ignores_order(tmp_path: Path, chatml: Any) -> None:
    """No held-out row is trained on, also with every row there twice; the same rows are held out in any order."""
    tripled = [row for row in PAIRS for _ in range(2)]
    data = load(write(tmp_path / "rows.jsonl", tripled), chatml, eval_rows=10)
    held, trained = ({tuple(one.input_ids) for one in side} for side in (data.eval, data.train))
    assert len(data.eval) == 10 and not held & trained
    again = load(write(tmp_path / "rows.jsonl", tripled[::-1]), chatml, eval_rows=10)
    assert {tuple(one.input_ids) for one in again.eval} == held
    assert any("40 exact duplicates (50.0 %)" in note for note in data.notes)


def test_auto_holds_out_a_tenth(tmp_path: Path, chatml: Any) -> None:
    """A tenth, at most 200; an own file or the folder's valid file is taken whole."""
    assert len(load(write(tmp_path / "train.jsonl", PAIRS), chatml).eval) == 4
    write(tmp_path / "valid.jsonl", PAIRS[:3])
    data = load(tmp_path, chatml)
    assert (len(data.train), len(data.eval)) == (40, 3)
    assert any("3 evaluation rows are also training rows" in note for note in data.notes)


# --- identity

CHANGES: dict[str, Callable[[Path, Any, dict[str, Any]], Any]] = {
    "a byte of the file": lambda path, tokenizer, settings: path.write_text(path.read_text() + "\n"),
    "a remark in the template": lambda path, tokenizer, settings: setattr(tokenizer, "chat_template", tokenizer.chat_template + "{##}"),
    "the tokenizer": lambda path, tokenizer, settings: tokenizer.add_tokens(["zzzzzz"]),
    "a limit that cuts a row": lambda path, tokenizer, settings: settings.update(max_tokens=24, long_rows="cut-prompt"),
    "what is trained": lambda path, tokenizer, settings: settings.update(train_on="all"),
    "the number of evaluation rows": lambda path, tokenizer, settings: settings.update(eval_rows=5),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_the_digest_changes_with_everything_that_decides_the_tokens(change: str, tmp_path: Path, chatml: Any) -> None:
    """One character is enough; nothing stale is ever taken for the same data.  # T71"""
    from tokenizers import Tokenizer

    def digest(altered: bool) -> str:
        path = write(tmp_path / "rows.jsonl", PAIRS)
        tokenizer = dressed(Tokenizer.from_str(chatml.backend_tokenizer.to_str()), "qwen2_5")
        settings: dict[str, Any] = {"eval_rows": 4}
        if altered:
            CHANGES[change](path, tokenizer, settings)
        return load(path, tokenizer, **settings).digest

    assert digest(False) == digest(False) != digest(True)


def test_the_digest_changes_with_the_format_version(tmp_path: Path, chatml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new version of this code's format is other data; another place, worker count or packing is the same.  # T71"""
    from halfbyte.data import load as module

    path = write(tmp_path / "rows.jsonl", PAIRS)
    first = load(path, chatml).digest
    moved = write(tmp_path / "moved.jsonl", PAIRS)
    assert load(moved, chatml, workers=2, packing=True).digest == first
    monkeypatch.setattr(module, "FORMAT", "halfbyte data 2")
    assert load(path, chatml).digest != first


def test_the_digest_is_equal_in_another_process(tmp_path: Path, chatml: Any) -> None:
    """Whatever the seed of Python's hashes.  # T71"""
    path = write(tmp_path / "rows.jsonl", PAIRS)
    chatml.save_pretrained(tmp_path / "tokenizer")
    script = (
        "import sys\nfrom transformers import AutoTokenizer\nfrom halfbyte.config.data import DataConfig\n"
        "from halfbyte.data.load import load_data\n"
        "print(load_data(DataConfig(path=sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])).digest)"
    )
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "tokenizer")]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ, PYTHONHASHSEED="1")).stdout.strip()
    assert other == load(path, AutoTokenizer.from_pretrained(tmp_path / "tokenizer")).digest


# --- show


def test_segments_show_what_is_trained(tmp_path: Path, chatml: Any) -> None:
    """The text in order, trained stretches marked, nothing that could move the cursor."""
    row = {"prompt": "say \x1b[31mred\x1b[0m \u202e", "completion": "\x1b]0;title\x07red"}
    data = load(write(tmp_path / "rows.jsonl", [row]), chatml, eval_rows=0)
    made = show.segments(data.train[0], chatml)
    assert [trained for _, trained in made] == [False, True, False]
    assert made[1][0] == "\\x1b]0;title\\x07red<|im_end|>"
    whole = "".join(text for text, _ in made)
    assert "\x1b" not in whole and "\x07" not in whole and "\u202e" not in whole


# --- real data


@pytest.mark.parametrize("name", ["gsm8k/train.jsonl", "e2e_nlg/train.jsonl"])
def test_real_data(name: str, shared_data: Callable[[str], Path], chatml: Any) -> None:
    """Real rows: every answer is trained whole, with its stop token."""
    path = shared_data(name)
    data = load(path, chatml, max_rows=300, eval_rows=0, max_tokens=4096)
    rows = read_rows(path, max_rows=300).rows
    assert len(data.train) == 300
    for one, row in zip(data.train, rows):
        wanted = row.values["completion"] if "completion" in row.values else row.values["messages"][-1]["content"]
        assert chatml.decode([label for label in one.labels if label != -100]) == wanted + "<|im_end|>"


def test_every_problem_of_a_file_is_told_in_one_block_in_the_order_of_its_lines(tmp_path: Path, chatml: Any) -> None:
    good = json.dumps({"prompt": "Hi", "completion": "Hello"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good, '{"prompt": "Hi"}', '{"text": "Hi"}', '{"prompt": "Hi"', good, good]) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(path=str(path), eval_rows=0), chatml)
    told = caught.value.text()
    assert caught.value.place.endswith("line 2, field completion")
    assert (
        told.index("also line 3: text, most rows are prompt-completion") < told.index("also line 4: column")
        and "3 problems in 3 rows" in told
    )
    assert len(load_data(DataConfig(path=str(path), eval_rows=0, skip_bad_rows=3), chatml).train) == 3


def test_what_is_dropped_is_a_share_of_the_file_not_of_its_held_out_part(tmp_path: Path, chatml: Any) -> None:
    """One bad row of 20 is 5 % wherever its hash puts it; a held-out row that is too long leaves nothing to evaluate, and says so."""
    held = set()
    for number in range(20):
        rows = [row if place != number else {**row, "completion": ""} for place, row in enumerate(PAIRS[:20])]
        data = load(write(tmp_path / "rows.jsonl", rows), chatml, eval_rows=4)
        assert len(data.train) + len(data.eval) == 19
        held.add(len(data.eval))
    assert held == {3, 4}
    left = set()
    for number in range(12):
        rows = [row if place != number else {**row, "prompt": "long " * 200} for place, row in enumerate(PAIRS[:12])]
        data = load(write(tmp_path / "rows.jsonl", rows), chatml, eval_rows=1, max_tokens=100)
        assert len(data.train) + len(data.eval) == 11
        left.add((len(data.eval), any("nothing is evaluated" in note for note in data.report.notes)))
    assert left == {(0, True), (1, False)}
    rows = [{**row, "completion": ""} if place < 2 else row for place, row in enumerate(PAIRS[:20])]
    with pytest.raises(DataError, match="E-DATA-060"):
        load(write(tmp_path / "rows.jsonl", rows), chatml)
