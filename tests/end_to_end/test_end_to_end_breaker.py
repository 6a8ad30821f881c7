"""What hostile and clumsy users do: each of these once made the program lie, lose something or show a traceback."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

import halfbyte as hb
from halfbyte.cli.main import let_go
from halfbyte.cli.main import run as command
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.opened import open_model
from halfbyte.models.load import load_model
from halfbyte.models.packing_probe import require_separate

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("train.threads=1", "train.sample_prompts=0", "train.max_steps=2", "lora.rank=4")


def refused(capsys: pytest.CaptureFixture[str], code: str, *words: object) -> str:
    """The error block of a command line that must be refused with this code, and never as a bug."""
    status = command([str(word) for word in words])
    said = capsys.readouterr().err
    assert code in said and status in (2, 3, 4, 5), said
    return said


def family(folder: Path, tiny: Path, kind: str, **settings: Any) -> Path:
    """A small random model of another family with the tiny model's tokenizer."""
    import transformers

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config: PretrainedConfig = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **settings
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LEAKING: dict[str, dict[str, Any]] = {
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "OPT": {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    "Mamba": {"hidden_size": 64, "num_hidden_layers": 1},
}
SEPARATE: dict[str, dict[str, Any]] = {
    "GPTNeoX": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "Mixtral": {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", LEAKING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_mixes_packed_samples_is_found_out(kind: str, dtype: str, tmp_path: Path, tiny_folder: Path) -> None:
    model = load_model(family(tmp_path / kind, tiny_folder, kind, **LEAKING[kind]), dtype=dtype)
    with pytest.raises(HalfbyteError, match=r"E-UNSUP-046(.*\n)+.*data\.packing=false"):
        require_separate(model)


@pytest.mark.parametrize("kind", SEPARATE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_keeps_packed_samples_apart_is_not(kind: str, dtype: str, tmp_path: Path, tiny_folder: Path) -> None:
    require_separate(load_model(family(tmp_path / kind, tiny_folder, kind, **SEPARATE[kind]), dtype=dtype))


def test_packing_with_such_a_model_is_refused(
    tmp_path: Path, tiny_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = family(tmp_path / "bloom", tiny_folder, "Bloom", **LEAKING["Bloom"])
    words = ("train", "--model", folder, "--data", rows_file, "--method", "lora", "--out", tmp_path / "run", *SHORT)
    refused(capsys, "E-UNSUP-046", *words, "data.packing=true")
    assert command([str(word) for word in words]) == 0


def test_a_model_that_reads_weights_past_their_adapters_is_refused(
    tmp_path: Path, tiny_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = family(tmp_path / "mamba", tiny_folder, "Mamba", **LEAKING["Mamba"])
    refused(capsys, "E-UNSUP-047", "train", "--model", folder, "--data", rows_file, "--method", "lora", "--out", tmp_path / "run", *SHORT)
    model, _ = hb.load(tiny_folder)
    hb.inject(model, rank=4)
    assert not hasattr(model.model.layers[0].self_attn.q_proj, "weight")


def test_quantizing_a_model_without_layers_to_pack_is_refused(
    tmp_path: Path, tiny_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    folder = family(tmp_path / "falcon", tiny_folder, "Falcon", **sizes)  # its layers are of a class of their own
    refused(capsys, "E-UNSUP-048", "eval", folder, "--data", rows_file, "--quant", "nf4")
    refused(capsys, "E-UNSUP-048", "quantize", folder, "--out", tmp_path / "small")


def test_infinity_in_a_config_as_transformers_writes_it(tmp_path: Path, tiny_folder: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16}
    folder = family(tmp_path / "mamba2", tiny_folder, "Mamba2", **sizes)
    assert "__float__" in (folder / "config.json").read_text()
    assert load_model(folder).config.time_step_limit[1] == float("inf")


def test_rows_longer_than_the_model_can_see_are_not_asked_for(
    tmp_path: Path, tiny_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", "--model", tiny_folder, "--data", rows_file, "--method", "lora", "--out", tmp_path / "run", *SHORT)
    refused(capsys, "E-CONF-067", *words, "data.max_tokens=257")


def test_numbers_out_of_range(tmp_path: Path, tiny_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "E-CONF-088", "eval", tiny_folder, "--data", rows_file, "--batch-size", 0)
    for seed in (-1, 2**63):
        refused(capsys, "--seed", "generate", tiny_folder, "hello", "--max-new-tokens", 2, "--temperature", 1, "--seed", seed)
    refused(capsys, "E-CONF-024", "quantize", tiny_folder, "--out", tmp_path / "q", "--blocksize", 63)
    refused(capsys, "E-CONF-087", "quantize", tiny_folder, "--out", tmp_path / "q", "--format", "int8", "--blocksize", 128)


def test_a_quantized_folder_is_not_quantized_again(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["quantize", str(tiny_folder), "--out", str(tmp_path / "nf4")]) == 0
    refused(capsys, "E-MODEL-045", "quantize", tmp_path / "nf4", "--out", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_a_prompt_with_half_a_character(tiny_folder: Path, raw: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes on the command line that are not UTF-8 reach Python as lone surrogates."""
    refused(capsys, "E-DATA-083", "generate", tiny_folder, "caf\udce9", "--max-new-tokens", 2, *raw)


def test_rows_that_evaluation_leaves_out_are_counted(tmp_path: Path, tiny_folder: Path, rows_file: Path) -> None:
    rows = rows_file.read_text().splitlines()[:4]
    long = json.loads(rows[0])
    long["messages"][1]["content"] = "many words " * 200
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, json.dumps(long)]) + "\n")
    found = hb.evaluate(tiny_folder, tmp_path / "rows.jsonl")
    assert (found["rows"], found["rows_left_out"]) == (4, 1)
    assert "rows_left_out" not in hb.evaluate(tiny_folder, rows_file)


def test_evaluation_reads_the_columns_the_run_was_trained_on(tmp_path: Path, tiny_folder: Path) -> None:
    rows = [{"body": f"text {number}", "topic": "odd" if number % 2 else "even"} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = hb.train(
        model=tiny_folder, data=tmp_path / "rows.jsonl", method="lora", out=tmp_path / "run",
        **{"model.task": "sequence-classification", "data.text_field": "body", "data.label_field": "topic", "train.threads": 1,
           "train.max_steps": 1},
    )  # fmt: skip
    assert run.evaluate(tmp_path / "rows.jsonl")["rows"] == 12


@pytest.fixture(scope="module")
def run(tiny_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run in a folder with an unusual name."""
    out = tmp_path_factory.mktemp("runs") / "my första run"
    words = ["train", "--model", tiny_folder, "--data", rows_file, "--method", "lora", "--out", out, *SHORT]
    assert command([str(word) for word in words]) == 0
    return out


def test_a_run_in_a_folder_with_an_unusual_name_can_be_used(run: Path, rows_file: Path) -> None:
    assert open_model(run).active == "my-f-rsta-run"
    assert command(["eval", str(run), "--data", str(rows_file)]) == 0


def test_an_adapter_that_is_none_is_not_passed_over(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tiny_folder, tiny_folder / "nowhere"):
        refused(capsys, "E-ADAPT-082", "generate", tiny_folder, "hello", "--max-new-tokens", 2, "--adapter", folder)


def test_a_run_is_found_from_another_directory(
    tmp_path: Path, tiny_folder: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names were given relative to the directory of the training; another model of that name must not be taken for the base."""
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    shutil.copytree(tiny_folder, tmp_path / "there" / "model")
    shutil.copy(rows_file, tmp_path / "there" / "rows.jsonl")
    (tmp_path / "there" / "own.jinja").write_text((tiny_folder / "chat_template.jinja").read_text())
    monkeypatch.chdir(tmp_path / "there")
    words = ["train", "--model", "model", "--data", "rows.jsonl", "--method", "lora", "--out", "run", *SHORT, "model.template=own.jinja"]
    assert command(words) == 0
    monkeypatch.chdir(tmp_path / "here")
    assert command(["eval", "../there/run", "--data", "../there/rows.jsonl"]) == 0
    assert command(["generate", "../there/run/adapter", "hello", "--max-new-tokens", "2"]) == 0
    assert command(["merge", "../there/run", "--out", "merged"]) == 0
    assert command(["train", "--resume", "../there/run", "train.max_steps=3"]) == 0, capsys.readouterr().err
    named = json.loads((tmp_path / "there/run/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "there" / "model")


def test_a_template_that_writes_the_time_is_told_the_same_time_on_resume(tmp_path: Path, tiny_folder: Path, rows_file: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + (tiny_folder / "chat_template.jinja").read_text()
    )
    settings: dict[str, Any] = {"train.threads": 1, "train.sample_prompts": 0, "lora.rank": 4, "optim.schedule": "constant"}
    given: dict[str, Any] = {"model": folder, "data": rows_file, "method": "lora", **settings}
    first = hb.train(**given, out=tmp_path / "run", **{"train.max_steps": 2})
    noted = json.loads((tmp_path / "run" / "environment.json").read_text())["template_time"]
    time.sleep(1.1)
    again = hb.train(out=tmp_path / "run", resume=True, **{"train.max_steps": 4})
    assert again.summary["steps"] == 4 and first.folder == again.folder
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["template_time"] == noted


def test_text_that_nobody_will_read_is_let_go() -> None:
    """What is left in the buffer of a pipe whose reader has gone goes nowhere; else the next flush, at exit, would fail."""
    for last in (let_go, lambda stream: None):
        reader, writer = os.pipe()
        stream = os.fdopen(writer, "w")
        stream.write("left")
        os.close(reader)
        last(stream)
        if last is let_go:
            stream.close()
        else:
            with pytest.raises(BrokenPipeError):
                stream.close()


def test_training_goes_on_when_nobody_reads_its_lines(tmp_path: Path, tiny_folder: Path, rows_file: Path) -> None:
    """`halfbyte train ... 2>&1 | head -1`: the reader leaves, the run does not."""
    words = ["train", "--model", tiny_folder, "--data", rows_file, "--method", "lora", "--out", tmp_path / "run", *SHORT]
    process = subprocess.Popen(
        [sys.executable, "-m", "halfbyte", *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_types_are_asked_for_by_name(tiny_folder: Path) -> None:
    for dtype in ("float16", torch.float32):
        with pytest.raises(HalfbyteError, match="E-CONF-089"):
            hb.load(tiny_folder, dtype=dtype)  # type: ignore[arg-type]


def test_rows_and_task_must_agree(tmp_path: Path, tiny_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps({"text": f"text {number}", "label": "ab"[number % 2]}) + "\n" for number in range(8)))
    one = tmp_path / "one.jsonl"
    one.write_text("".join(json.dumps({"text": f"text {number}", "label": "a"}) + "\n" for number in range(8)))
    short = [word for word in SHORT if not word.startswith("train.sample_prompts")]
    words = ("train", "--model", tiny_folder, "--method", "lora", "--out", tmp_path / "run", *short)
    refused(capsys, "E-DATA-092", *words, "--data", labelled)
    refused(capsys, "E-DATA-092", *words, "--data", one, "model.task=sequence-classification")
    refused(capsys, "E-DATA-092", "eval", tiny_folder, "--data", labelled)
    assert command([str(word) for word in (*words, "--data", labelled, "model.task=sequence-classification")]) == 0
    refused(capsys, "E-CONF-068", "generate", tmp_path / "run", "hello", "--max-new-tokens", 2)


def test_a_damaged_log_does_not_stop_a_resume(tmp_path: Path, tiny_folder: Path, rows_file: Path) -> None:
    out = tmp_path / "run"
    words = ["train", "--model", tiny_folder, "--data", rows_file, "--method", "lora", "--out", out, *SHORT]
    assert command([str(word) for word in words]) == 0
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\xff torn by a power cut\n")
    (out / "environment.json").write_text("{")
    assert command(["train", "--resume", str(out), "train.max_steps=3"]) == 0
    assert [record["step"] for record in hb.Run.open(out).metrics() if "lr" in record] == [1, 2, 3]


def test_a_run_is_not_written_over_other_files(
    tmp_path: Path, tiny_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--out .` beside one's own config.yaml would replace it; `--out MODEL` would make the model's name mean the run."""
    own = tmp_path / "config.yaml"
    own.write_text(f"model: {tiny_folder}\ndata: {rows_file}\nmethod: lora\n")
    text = own.read_text()
    refused(capsys, "E-CONF-304", "train", own, "--out", tmp_path, *SHORT)
    assert own.read_text() == text and os.listdir(tmp_path) == ["config.yaml"]
    before = sorted(os.listdir(tiny_folder))
    refused(capsys, "E-CONF-304", "train", own, "--out", tiny_folder, *SHORT)
    assert sorted(os.listdir(tiny_folder)) == before


def test_an_update_with_a_bias_is_not_merged_into_layers_without(
    tmp_path: Path, tiny_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", "--model", tiny_folder, "--data", rows_file, "--method", "lora", "--out", tmp_path / "run", *SHORT)
    assert command([str(word) for word in (*words, "lora.lora_bias=true")]) == 0
    refused(capsys, "E-ADAPT-083", "merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
