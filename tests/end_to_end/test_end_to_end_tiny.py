"""The whole road on a small random model, through the real command line: train, resume, judge, use, merge, quantize."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.cli.main import run as command
from halfbyte.config import load_config
from halfbyte.evaluate.opened import open_model
from halfbyte.train import finished, from_config

QUIET = (
    "train.threads=1",
    "train.sample_prompts=1",
    "train.max_steps=4",
    "optim.learning_rate=0.01",
    "lora.rank=4",
    "train.eval_every_steps=2",
)


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run of each method."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("qlora", "lora", "full"):
        own = [word for word in QUIET if method != "full" or not word.startswith("lora.")]
        words = ["train", "--model", tiny_folder, "--data", rows_file, "--method", method, "--out", folder / method, *own]
        assert command([str(word) for word in words]) == 0
    return folder


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_run_folder_has_everything(runs: Path, method: str) -> None:
    folder = runs / method
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "run.json", "samples.json", "report.html", "loss.png"):
        assert (folder / name).is_file(), name
    summary = json.loads((folder / "run.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 4
    assert summary["final_eval_loss"] < summary["first_eval_loss"]
    weights = folder / ("model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors")
    assert weights.is_file()
    page = (folder / "report.html").read_text()
    assert "Before" in page or "before" in page
    assert f"{summary['final_eval_loss']:.4f}" in page


def test_full_trains_all_and_adapters_a_part(runs: Path) -> None:
    shares = {method: json.loads((runs / method / "run.json").read_text())["trainable_share"] for method in ("qlora", "lora", "full")}
    assert shares["full"] == 1.0 and 0 < shares["qlora"] == shares["lora"] < 0.5


def test_eval_prints_the_loss_the_run_reported(runs: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("qlora", "lora", "full"):
        run = hb.Run.open(runs / method)
        held_out = tmp_path / f"{method}.jsonl"
        lines = rows_file.read_text().splitlines(keepends=True)
        rows = sorted({int(line) for record in run.metrics() for line in record.get("rows", [])})
        held_out.write_text("".join(line for number, line in enumerate(lines) if number not in rows))
        capsys.readouterr()
        assert command(["eval", str(run.folder), "--data", str(held_out)]) == 0
        told = capsys.readouterr()
        printed = dict(line.split() for line in told.out.splitlines())
        assert "nats per scored token" in told.err
        assert float(printed["loss"]) == pytest.approx(run.summary["final_eval_loss"], rel=2e-3)
        assert float(printed["perplexity"]) == pytest.approx(float(torch.tensor(float(printed["loss"])).exp()), rel=1e-4)


def test_eval_scores_answers(runs: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "eval",
        str(runs / "lora"),
        "--data",
        str(rows_file),
        "--metrics",
        "exact_match,rougeL,bleu,chrf",
        "--max-new-tokens",
        "6",
        "--max-rows",
        "6",
    ]
    assert command([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == ["loss", "perplexity", "tokens", "rows", "exact_match", "rougeL", "bleu", "chrf"] and found["rows"] == 6
    assert command(["eval", str(runs / "lora"), "--data", str(rows_file), "--metrics", "exact_mach"]) == 2
    assert "did you mean exact_match" in capsys.readouterr().err
    assert command(["eval", str(runs / "lora"), "--data", str(rows_file), "--max-new-tokens", "6"]) == 2
    assert "E-CONF-098" in (told := capsys.readouterr().err) and "no --metrics" in told


def test_eval_does_not_depend_on_the_batch_size(runs: Path, rows_file: Path) -> None:
    model = open_model(runs / "lora", dtype="float32")
    losses = [hb.evaluate(model, rows_file, batch_size=size)["loss"] for size in (1, 2, 5, 24)]
    assert max(losses) - min(losses) <= 1e-6 * losses[0]


def test_an_existing_run_is_refused_and_resume_goes_on(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "again"
    shutil.copytree(runs / "qlora", folder)
    words = [str(folder / "config.yaml"), f"out={folder}"]
    before = (folder / "metrics.jsonl").read_bytes()
    assert command(["train", *words]) == 2
    assert "a new run needs a folder of its own" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert command(["train", "--resume", str(folder), "train.max_steps=6"]) == 0
    assert [record["step"] for record in hb.Run.open(folder).metrics() if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_loads_nothing_and_changes_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its folder alone and by its settings; a folder that lacks what it delivers, or is to be longer, is gone on with."""
    folder = tmp_path / "again"
    shutil.copytree(runs / "lora", folder)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(from_config, "prepare", lambda *ignored, **too: pytest.fail("prepared"))
        for words in (["--out", str(folder)], [str(runs / "lora" / "config.yaml"), f"out={folder}", "train.save_every_steps=1"]):
            assert command(["train", "--resume", *words]) == 0
            said = capsys.readouterr()
            assert "this run is finished: step 4 of 4" in said.err and f"adapter  {folder / 'adapter'}" in said.out
        assert hb.train(out=folder, resume=True).summary["status"] == "finished"
        assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()} == before
        assert finished.finished(load_config(folder / "config.yaml", flags={"out": str(folder), "train.max_steps": 2})) is not None
        for change in ({"train.max_steps": 5}, {"train.keep_best": False}, {"lora.rank": 5}):
            assert finished.finished(load_config(folder / "config.yaml", flags={"out": str(folder), **change})) is None
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("max_steps: 4", "max_steps: 9"))  # was to be longer, and was killed
    assert finished.finished(load_config(folder / "config.yaml", flags={"out": str(folder)})) is None
    (folder / "config.yaml").write_text(config)
    for name in ("run.json", "report.html", "adapter/adapter_model.safetensors"):
        content = (folder / name).read_bytes()
        for damaged in (content[:1], b""):
            (folder / name).write_bytes(damaged)
            if name == "run.json" or not damaged:
                assert finished.finished(load_config(folder / "config.yaml", flags={"out": str(folder)})) is None
        (folder / name).write_bytes(content)
    assert finished.finished(load_config(folder / "config.yaml", flags={"out": str(folder)})) is not None
    shutil.rmtree(folder / "adapter")
    assert command(["train", "--resume", "--out", str(folder)]) == 0 and (folder / "adapter" / "adapter_config.json").is_file()


def test_generate_answers_each_prompt(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(runs / "qlora"), "Lights on in the hall.", "Play jazz.", "--system", "Reply in JSON.", "--max-new-tokens", "5"]
    assert command(words) == 0
    first = capsys.readouterr().out
    assert first.count("-" * 40) == 1
    assert command(words) == 0
    assert capsys.readouterr().out == first
    assert command(["generate", str(runs / "qlora"), ""]) == 2


def test_chat_by_pipe(runs: Path, tmp_path: Path, cli: Callable[..., object]) -> None:
    saved = tmp_path / "talk.jsonl"
    lines = f"Lights on.\n/adapters\n/adapter none\nLights on.\n/adapter {runs / 'qlora'}\n/save {saved}\n/quit\n"
    done = cli("chat", runs / "qlora", "--max-new-tokens", "4", text=lines)
    out = done.stdout  # type: ignore[attr-defined]
    assert "* qlora\n  none" in out and "adapter: none" in out and "adapter: qlora" in out
    assert len(json.loads(saved.read_text())["messages"]) == 4


class Terminal(io.StringIO):
    """Standard input as a terminal has it."""

    def isatty(self) -> bool:
        return True


def test_chat_begins_with_the_first_adapter_given(
    runs: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model and on a run, which keeps its own at hand; the greeting says who answers."""
    given = ["--adapter", str(runs / "qlora"), "--adapter", str(runs / "lora" / "adapter")]
    for words, listed, greeting in (
        ([str(tiny_folder), *given], "* qlora\n  lora\n  none", f"{tiny_folder} with adapter qlora answers; /help lists the commands, /ad"),
        ([str(runs / "lora"), *given], "  lora\n* qlora\n  none", "with adapter qlora answers"),
        ([str(runs / "lora")], "* lora\n  none", "with adapter lora answers"),
        ([str(tiny_folder)], "* none", f"{tiny_folder} answers; /help lists the commands, Ctrl-D"),
    ):
        monkeypatch.setattr("sys.stdin", Terminal("/adapters\n"))
        assert command(["chat", *words]) == 0
        said = capsys.readouterr().out
        assert greeting in said and listed in said
    assert command(["chat", str(tiny_folder), "--adapter", str(runs / "qlroa")]) == 2
    assert f"did you mean {runs / 'qlora'}?" in capsys.readouterr().err


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_the_umask_decides_who_may_read_what_is_delivered(umask: int, tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """Every file of a run, of a merged and of a quantized model, checkpoints and locks too."""
    before = os.umask(umask)
    try:
        words = ["train", "--model", tiny_folder, "--data", rows_file, "--method", "qlora", "--out", tmp_path / "run", *QUIET]
        assert command([str(word) for word in words]) == 0
        hb.merge(tmp_path / "run", tmp_path / "merged")
        hb.quantize(tiny_folder, tmp_path / "packed")
    finally:
        os.umask(before)
    files = {str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*") if path.is_file()}
    wanted = oct(0o666 & ~umask)
    assert len(files) > 20 and {name: mode for name, mode in files.items() if mode != wanted} == {}


def test_merge_keeps_the_model_that_was_trained(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    run = str(runs / "qlora")
    assert command(["merge", run, "--out", str(tmp_path / "m"), "--dtype", "float32"]) == 0
    assert "logits beside those of the unmerged model" in capsys.readouterr().out
    ids = torch.arange(3, 60)[None]
    unmerged = hb.load(run, dtype="float32")[0](input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    original = hb.merge(run, tmp_path / "o", onto="original", dtype="float32")
    faithful = hb.merge(run, tmp_path / "f", dtype="float32")
    assert original.difference.largest > 10 * faithful.difference.largest
    assert "what this changes" in original.text() and "what this changes" not in faithful.text()
    assert command(["merge", run, "--out", str(tmp_path / "m")]) == 5
    assert "never overwrites" in capsys.readouterr().err
    assert command(["merge", str(runs / "full"), "--out", str(tmp_path / "x")]) == 2
    assert command(["merge", run, "--out", str(tmp_path / "x"), "--onto", "sky"]) == 2


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantize_writes_what_bitsandbytes_reads(
    tiny_folder: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    assert command(["quantize", str(tiny_folder), "--out", str(tmp_path / "q"), "--format", format]) == 0
    shown = capsys.readouterr().out
    assert f"14 layers in {format}" in shown and "relative error" in shown
    ids = torch.arange(3, 60)[None]
    ours = hb.load(tmp_path / "q", dtype="float32")[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    if format == "nf4":
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits.float(), rtol=3e-2, atol=3e-2)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[format]


def test_data_check_and_show(tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["data", "check", str(rows_file), "--model", str(tiny_folder), "eval_rows=5"]) == 0
    shown = capsys.readouterr().out
    assert "messages: the rows have messages" in shown and "43 to train on, 5 held out" in shown and "<|im_end|>" in shown
    assert command(["data", "show", str(rows_file), "--model", str(tiny_folder), "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    answers = [json.loads(line)["messages"][-1]["content"] for line in rows_file.read_text().splitlines()[:2]]
    assert all(f"[[{answer}<|im_end|>]]" in shown for answer in answers) and shown.count("[[") == 2
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": 3}\n')
    assert command(["data", "check", str(bad), "--model", str(tiny_folder)]) == 2


def test_doctor_says_what_serves_and_what_a_model_needs(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["doctor", str(tiny_folder)]) == 0
    shown = capsys.readouterr().out
    for text in ("matmul_4bit", "serves", "compute type", "missing for", "llama, 2 layers, width 64", "weights, nf4"):
        assert text in shown
    parameters = sum(tensor.numel() for tensor in hb.load(tiny_folder)[0].parameters())
    assert f"({parameters:,})" in shown


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers for it
def test_python_does_the_same(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = {"max_steps": 3, "threads": 1, "sample_prompts": 0}
    run = hb.train(
        model=tiny_folder, data=rows_file, method="lora", out=tmp_path / "run", train=settings, **{"lora.rank": 4, "model.dtype": "float32"}
    )
    assert isinstance(run.generate("Lights on.", max_new_tokens=3), str)
    assert len(run.generate(["a", "b"], max_new_tokens=3)) == 2
    assert run.evaluate(rows_file)["rows"] == 48
    assert run.summary["steps"] == 3 and run.config.lora.rank == 4 and run.model_folder is None
    ids = torch.arange(3, 60)[None]
    assert run.adapter_folder is not None
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), run.adapter_folder)
    torch.testing.assert_close(theirs(input_ids=ids).logits, run.opened.model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_an_own_loop_trains_and_saves_an_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    model, _ = hb.load(tiny_folder, quant="nf4", dtype="float32")
    done = hb.inject(model, rank=4, alpha=8, targets="all-linear")
    assert 0 < done.share < 0.5
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    ids = torch.arange(3, 40)[None]
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    hb.save_adapter(model, tmp_path / "adapter", base=str(tiny_folder))
    again, _ = hb.load(tiny_folder, quant="nf4", dtype="float32")
    hb.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-6, atol=1e-6)


def test_an_adapter_is_not_fetched_from_where_it_says(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_folder: Path
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(runs / "lora" / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/some-model"}))
    assert command(["generate", str(folder), "hi"]) == 2
    assert "someone/some-model" in capsys.readouterr().err
    assert command(["generate", str(tiny_folder), "hi", "--adapter", str(folder), "--max-new-tokens", "2"]) == 0


def test_no_output_holds_a_secret(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, cli: Callable[..., object], capfd: pytest.CaptureFixture[str]
) -> None:
    """A key in the environment, in the data's path and in a setting: nothing that is printed or written shows it."""
    canary = "hf_CANARYcanary0123456789"
    rows = tmp_path / canary / "rows.jsonl"
    rows.parent.mkdir()
    shutil.copy(rows_file, rows)
    words = [
        "train",
        "--model",
        tiny_folder,
        "--data",
        rows,
        "--out",
        tmp_path / "run",
        "train.max_steps=2",
        "train.threads=1",
        "lora.rank=4",
    ]
    done = cli(*words, HF_TOKEN=canary, WANDB_API_KEY=canary)
    shown = done.stdout + done.stderr  # type: ignore[attr-defined]
    for words in (["data", "check", rows, "--model", tiny_folder], ["eval", tmp_path / "run", "--data", rows.with_name("absent.jsonl")]):
        command([str(word) for word in words])
    command(["train", "--data", str(rows), "--out", str(tmp_path / "x"), "--dry-run"])
    command(["train", "--resume", str(tmp_path / "run"), f"data={rows}", "train.max_steps=3"])
    captured = capfd.readouterr()
    assert "rows.jsonl" in captured.out + captured.err
    assert canary not in shown + captured.out + captured.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path.name for path in files if canary.encode() in path.read_bytes()] == []
