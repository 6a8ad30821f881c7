"""A sequence classifier trained with QLoRA: better than always saying the commonest label, and PEFT reads its adapter."""

import json
import random
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.cli.main import run as command
from halfbyte.evaluate import opened
from halfbyte.quickstart import task


def label_of(request: str) -> str:
    """A rule a small model can learn from the words alone."""
    return "heat" if "degrees" in request else "light" if "light" in request.lower() else "other"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """(rows to train on, held-out rows, share of the commonest held-out label)."""
    folder = tmp_path_factory.mktemp("classify")
    rows = [row for row in task.make(train_rows=640)[0] if row.filling[0] in ("light", "heat", "music", "buy")]
    random.Random(0).shuffle(rows)
    lines = [json.dumps({"text": row.request, "label": label_of(row.request)}) + "\n" for row in rows]
    held_out = [json.loads(line)["label"] for line in lines[:60]]
    (folder / "held_out.jsonl").write_text("".join(lines[:60]))
    (folder / "rows.jsonl").write_text("".join(lines[60:]))
    return folder / "rows.jsonl", folder / "held_out.jsonl", max(held_out.count(one) for one in set(held_out)) / len(held_out)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers for it
def test_a_classifier_learns_and_peft_reads_it(
    tiny_folder: Path, files: tuple[Path, Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    rows, held_out, majority = files
    words = [
        "train", "--model", tiny_folder, "--data", rows, "--method", "qlora", "--out", tmp_path / "run",
        "model.task=sequence-classification",
        f"data.eval_path={held_out}", "train.threads=1", "train.max_steps=60", "optim.learning_rate=0.003", "lora.rank=8",
        "train.eval_every_steps=30", "train.save_every_steps=30", "model.dtype=float32",
    ]  # fmt: skip
    assert command([str(word) for word in words]) == 0
    closing = capsys.readouterr().out
    assert f"next     halfbyte eval {tmp_path / 'run'} --data {held_out}\n" in closing
    assert f"then     halfbyte label {tmp_path / 'run'} --data FILE --out NEW.jsonl\n" in closing
    with monkeypatch.context() as patch:
        patch.setattr(opened, "load_model", lambda *ignored, **too: pytest.fail("loaded"))
        for asked in (["chat", "run"], ["generate", "run", "hello"], ["chat", str(tiny_folder), "--adapter", "run"]):
            assert command([str(tmp_path / "run") if word == "run" else word for word in asked]) == 2
            told = capsys.readouterr()
            assert "E-CONF-068" in told.err and "halfbyte eval" in told.err and not told.out
    assert command(["eval", str(tmp_path / "run"), "--data", str(held_out), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert list(found) == ["loss", "rows", "accuracy", "macro_f1"] and found["rows"] == 60
    assert found["accuracy"] > majority + 0.2 and 0 < found["macro_f1"] <= 1
    assert command(["eval", str(tmp_path / "run"), "--data", str(held_out)]) == 0
    assert "loss in nats per row" in capsys.readouterr().err
    for words in (["--metrics", "rougeL"], ["--max-new-tokens", "5"], ["--metrics", "bleu", "--max-new-tokens", "5"]):
        assert command(["eval", str(tmp_path / "run"), "--data", str(held_out), *words]) == 2
        assert "E-CONF-098" in (told := capsys.readouterr().err) and "a classifier" in told and words[0] in told
    run = hb.Run.open(tmp_path / "run")
    assert run.config.model.labels == ("heat", "light", "other")
    assert run.summary["accuracy"] == pytest.approx(found["accuracy"], abs=1e-6)
    assert "label accuracy" in (page := run.report.read_text()) and ">trained rows<" in page

    assert run.adapter_folder is not None
    assert json.loads((run.adapter_folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    merged = hb.merge(tmp_path / "run", tmp_path / "base", dtype="float32")
    assert merged.difference.largest < 1e-3
    assert f"next     halfbyte eval {tmp_path / 'base'} --data" in merged.text()
    assert command(["generate", str(tmp_path / "base"), "hello"]) == 2 and "E-CONF-068" in capsys.readouterr().err
    ids = torch.arange(3, 40)[None]
    ours = hb.load(tiny_folder, dtype="float32", quant="none", adapter=run.adapter_folder)[0](input_ids=ids).logits
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=3, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, run.adapter_folder)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
