"""A trained classifier labels new texts: as transformers and PEFT do text by text, one line for each row, whole or not at all."""

import datetime
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

import halfbyte as hb
from halfbyte.cli.main import run as command
from halfbyte.evaluate.labelling import label_texts
from halfbyte.evaluate.opened import open_model
from halfbyte.export.labelled import label_to_file
from halfbyte.train import durable_files, faults
from tests.end_to_end.tiny_world import write_model

LIMIT = 256  # tokens of the tiny model; its tokenizer makes one of each byte
TEXTS = ["lamp on", "music!", "a much longer text on heating in the hall", "", "x" * LIMIT, "y" * (LIMIT + 1), " \n", "lamp<|im_end|>"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, whose config names no padding token, and `run`, a classifier of three labels trained on column `review`."""
    folder = tmp_path_factory.mktemp("labels")
    base = write_model(folder / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "pad_token_id": None}))
    words = (("lamp", "light"), ("music", "sound"), ("heating", "heat"))
    rows = [{"review": f"{'very ' * (number % 5)}{words[number % 3][0]}", "label": words[number % 3][1]} for number in range(48)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hb.train(
        base, folder / "rows.jsonl", "lora", folder / "run", lora={"rank": 4}, optim={"learning_rate": 0.01},
        train={"max_steps": 12, "threads": 1},
        **{"model.task": "sequence-classification", "model.dtype": "float32", "data.text_field": "review"},
    )  # fmt: skip
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers for it
def test_labels_are_those_of_transformers_and_peft_text_by_text(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = hb.Run.open(world / "run")
    base = AutoModelForSequenceClassification.from_pretrained(world / "base", num_labels=3, dtype=torch.float32)
    oracle, tokenizer = PeftModel.from_pretrained(base, str(run.adapter_folder)).eval(), AutoTokenizer.from_pretrained(world / "base")
    rows = [{"review": text, "id": number, "größe": [1.5, None]} for number, text in enumerate(TEXTS)]
    words = ["label", world / "run", "--data", write(tmp_path / "new.jsonl", rows), "--out", tmp_path / "deep" / "out.jsonl"]
    assert command([str(word) for word in words]) == 0
    told, found = capsys.readouterr().out, read(tmp_path / "deep" / "out.jsonl")
    assert f"out.jsonl, {len(rows)} rows" in told and f"null     2 rows without text, 1 over the model's {LIMIT} tokens" in told
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    assert all(list(row) == [*rows[0], "label", "probability"] for row in found)
    assert len({row["label"] for row in found}) > 2  # more than one label, and null
    for row in found:
        if row["id"] in (3, 5, 6):
            assert row["label"] is row["probability"] is None
            continue
        with torch.no_grad():
            wanted = oracle(input_ids=tokenizer(row["review"], return_tensors="pt").input_ids).logits[0].softmax(-1)
        assert row["label"] == run.config.model.labels[int(wanted.argmax())]
        assert row["probability"] == pytest.approx(float(wanted.max()), abs=1e-5)
    assert os.listdir(tmp_path / "deep") == ["out.jsonl"]


def test_a_label_does_not_depend_on_the_texts_beside_it(world: Path) -> None:
    opened = open_model(world / "run")
    alone = [label_texts(opened, [text])[0] for text in TEXTS]
    for size in (1, 3, 8):
        for one, wanted in zip(label_texts(opened, TEXTS, batch_size=size), alone, strict=True):
            assert (one and one.label) == (wanted and wanted.label)
            assert (one and one.probability) == pytest.approx(wanted and wanted.probability, abs=1e-6)
    run = hb.Run.open(world / "run")
    assert run.label("lamp on") == alone[0]
    assert run.label(TEXTS[:2], batch_size=1) == alone[:2] == hb.label(world / "run", TEXTS[:2], batch_size=1)
    assert run.label([]) == [] and run.label("") is None


def test_the_scores_of_eval_are_those_of_the_labels(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same texts through `eval` and through `label`, whose new columns stand beside the true label."""
    rows = [{"review": text, "label": "light"} for text in TEXTS if text.strip() and len(text) <= LIMIT]
    data = write(tmp_path / "rows.jsonl", rows)
    words = ["--data", str(data), "--batch-size", "3"]
    assert command(["label", str(world / "run"), *words, "--out", str(tmp_path / "out.jsonl"), "--prefix", "predicted_"]) == 0
    found = read(tmp_path / "out.jsonl")
    assert list(found[0]) == ["review", "label", "predicted_label", "predicted_probability"]
    right = sum(row["predicted_label"] == row["label"] for row in found) / len(found)
    assert hb.evaluate(world / "run", data, batch_size=3)["accuracy"] == pytest.approx(right)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_classifier_folder_without_a_run_labels_the_same(world: Path, tmp_path: Path) -> None:
    hb.merge(world / "run", tmp_path / "whole", dtype="float32")
    (tmp_path / "new.csv").write_text('words,n\n"lamp on",1\n"music, loud",2\n')
    words = ["label", tmp_path / "whole", "--data", tmp_path / "new.csv", "--out", tmp_path / "out.jsonl", "--text-field", "words"]
    assert command([str(word) for word in words]) == 0
    found, wanted = read(tmp_path / "out.jsonl"), hb.label(world / "run", ["lamp on", "music, loud"])
    assert [(row["words"], row["n"], row["label"]) for row in found] == [
        ("lamp on", "1", wanted[0].label), ("music, loud", "2", wanted[1].label),
    ]  # fmt: skip
    assert [row["probability"] for row in found] == pytest.approx([one.probability for one in wanted], abs=0.02)  # perhaps in bfloat16


@pytest.mark.parametrize(
    ("code", "words", "told"),
    [
        ("E-STORE-085", lambda data: ["--out", data], "the file that the rows are read from"),
        ("E-STORE-085", lambda data: ["--out", data.with_name("there.jsonl")], "something is there"),
        ("E-STORE-085", lambda data: ["--out", data.with_name("out.csv")], ".csv"),
        ("E-DATA-056", lambda data: ["--out", data.with_name("out.jsonl"), "--text-field", "body"], "body for the shape text"),
        ("E-DATA-097", lambda data: ["--out", data.with_name("out.jsonl")], "--prefix predicted_"),
        ("E-CONF-088", lambda data: ["--out", data.with_name("out.jsonl"), "--prefix", "p_", "--batch-size", "0"], "--batch-size"),
        ("E-DATA-001", lambda data: ["--out", data.with_name("out.jsonl"), "--data", data.with_name("none.jsonl")], "no such file"),
        ("E-STORE-085", lambda data: ["--out", data / "deep" / "out.jsonl"], "new.jsonl, which is no folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_labelled_is_told_and_nothing_is_written(
    code: str, words: Callable[[Path], list[Any]], told: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "new.jsonl", [{"review": "lamp on", "label": "light"}])
    (tmp_path / "there.jsonl").write_text("kept\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert command(["label", str(world / "run"), "--data", str(data), *map(str, words(data))]) != 0
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("error E-") == 1 and code in shown.err and told in shown.err
    assert shown.err.rstrip().endswith("Nothing was written.") or code == "E-CONF-088"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("at", ["checkpoint.write", "checkpoint.fsync", "checkpoint.rename"])
def test_a_disk_that_fails_leaves_nothing(at: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str) -> None:
        if name == at:
            raise OSError(errno.ENOSPC, "no room")

    data = write(tmp_path / "new.jsonl", [{"review": "lamp on"}])
    monkeypatch.setattr(faults, "point", full)
    with pytest.raises(hb.HalfbyteError, match="E-STORE-086"):
        label_to_file(world / "run", data, tmp_path / "out.jsonl")
    assert os.listdir(tmp_path) == ["new.jsonl"]


def test_a_file_that_came_while_the_model_was_at_work_stays(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out, real = write(tmp_path / "new.jsonl", [{"review": "lamp on"}]), tmp_path / "out.jsonl", durable_files.create

    def create(path: Path, content: bytes) -> str:
        out.write_text("another's\n")
        return real(path, content)

    monkeypatch.setattr(durable_files, "create", create)
    with pytest.raises(hb.HalfbyteError, match="E-STORE-085"):
        label_to_file(world / "run", data, out)
    assert out.read_text() == "another's\n" and sorted(os.listdir(tmp_path)) == ["new.jsonl", "out.jsonl"]


def test_what_json_cannot_hold_is_refused_or_written_as_text(world: Path, tmp_path: Path) -> None:
    dates = pyarrow.table({"review": ["lamp on"], "day": [datetime.date(2026, 11, 2)]})
    pyarrow.parquet.write_table(dates, tmp_path / "dates.parquet")
    label_to_file(world / "run", tmp_path / "dates.parquet", tmp_path / "dates.jsonl")
    assert read(tmp_path / "dates.jsonl")[0]["day"] == "2026-11-02"
    for name, value, code in (("bytes", b"a", "E-DATA-098"), ("nan", math.nan, "E-DATA-024")):
        pyarrow.parquet.write_table(pyarrow.table({"review": ["lamp on"], "x": [value]}), tmp_path / f"{name}.parquet")
        with pytest.raises(hb.HalfbyteError, match=code):
            label_to_file(world / "run", tmp_path / f"{name}.parquet", tmp_path / f"{name}.jsonl")
        assert not (tmp_path / f"{name}.jsonl").exists()


def test_a_model_that_writes_text_labels_nothing(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "new.jsonl", [{"text": "lamp on"}])
    assert command(["label", str(world / "base"), "--data", str(data), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "E-MODEL-093" in (told := capsys.readouterr().err) and "LlamaForCausalLM, trained to write text" in told
    assert os.listdir(tmp_path) == ["new.jsonl"]
    with pytest.raises(hb.HalfbyteError, match="E-MODEL-093"):
        hb.label(world / "base", ["lamp on"])


def test_damaged_weights_give_no_label(world: Path) -> None:
    opened = open_model(world / "run")
    with torch.no_grad():
        opened.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(hb.HalfbyteError, match="E-NUM-305"):
        label_texts(opened, ["lamp on"])
