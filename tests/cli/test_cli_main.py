"""The border of the command line: help at once, one block for an error, one exit code, no secret and no escape sequence on the screen."""

import json
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from halfbyte import redact
from halfbyte.cli import docs, main, terminal
from halfbyte.cli import train as train_command
from halfbyte.errors import CheckpointError, ConfigError, DoesNotFitError, Interrupted, NumericError, StorageError, UnsupportedError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "numba", "matplotlib", "pyarrow", "tokenizers", "rich.console")


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["train", "--help"], ["data", "show", "--help"], ["chat", "--help"], ["nonsense"]]
)
def test_help_and_mistakes_load_nothing_heavy(words: list[str]) -> None:
    code = f"import sys\nfrom halfbyte.cli.main import run\nrun({words!r})\nprint([n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("[]"), done.stdout[-300:]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["merge", "runs/mien", "--out", "x"], "E-MODEL-014"), (["chat", "runs/mien"], "E-MODEL-001"),
        (["generate", "runs/mien", "hello"], "E-MODEL-001"), (["eval", "runs/mien", "--data", "rows.jsonl"], "E-MODEL-001"),
        (["generate", "meta-llama/Llama-3", "hello"], "E-MODEL-003"),
        (["label", "runs/mien", "--data", "rows.jsonl", "--out", "x.jsonl"], "E-MODEL-001"),
    ],
)  # fmt: skip
def test_a_mistyped_folder_is_told_before_anything_heavy_is_loaded(words: list[str], code: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    script = f"import sys\nfrom halfbyte.cli.main import run\nprint(run({words!r}), [n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "2 []" and f"error {code}:" in done.stderr, done
    assert code == "E-MODEL-003" or ("no such folder" in done.stderr and "did you mean runs/mine?" in done.stderr)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """As the package has it, whatever stands behind it."""
    assert main.run(["--version"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"halfbyte {metadata.version('halfbyte')}\n" and not shown.err
    assert main.run(["--version", "train"]) == 0 and capsys.readouterr().out == shown.out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("quickstart", "train", "data", "eval", "generate", "chat", "merge", "quantize", "doctor"):
        assert f"\n  {name} " in shown


def test_the_commands_page_is_that_of_the_program() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == docs.markdown(), "run: python -m halfbyte.cli.docs > docs/cli.md"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("r", code="E-CONF-999"), 2), (UnsupportedError("r", code="E-UNSUP-999"), 3),
        (CheckpointError("r", code="E-CKPT-999"), 4),
        (StorageError("r", code="E-STORE-999"), 5), (NumericError("r", code="E-NUM-999"), 6), (DoesNotFitError("r", code="E-FIT-999"), 7),
        (Interrupted("r", code="E-STOP-999", exit_code=143), 143), (KeyboardInterrupt(), 130), (ZeroDivisionError("oh"), 1),
        (MemoryError(), 7), (OSError(12, "Cannot allocate memory"), 7),
    ],
)  # fmt: skip
def test_one_block_and_one_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Command:
        def main(self, **_: object) -> None:
            raise error

    monkeypatch.setattr(main, "command", Command)
    assert main.run(["train", "x.yaml"]) == code
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err
    if code == 1:
        assert "this is a bug" in shown.err and "ZeroDivisionError: oh" in shown.err and "halfbyte --debug train x.yaml" in shown.err
    main.run(["train", "--debug", "x.yaml"])
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_a_command_without_memory_says_what_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def train(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("halfbyte.config.load_config", train)
    assert main.run(["train", "x.yaml"]) == 7
    shown = capsys.readouterr().err
    assert shown.startswith("error E-FIT-404") and "GiB" in shown and "E-BUG" not in shown


@pytest.mark.parametrize("words", [["quantize", "starter", "--out", "x"], ["generate", "starter", "hi"], ["chat"], ["quickstart"]])
@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_a_seed_has_the_bounds_of_the_generators(words: list[str], seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([*words, "--seed", seed]) == 2 and "--seed" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["quantize", "starter", "--out", "x"], ["rank", "--data", "rows.jsonl"]])
def test_ctrl_c_is_answered_in_one_line(words: list[str]) -> None:
    """A process of its own, typer and the signal are real; only the work is replaced by a long sleep."""
    code = (
        "import signal, sys, time\n"
        "from halfbyte import api, config\n"
        "from halfbyte.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell leaves it ignored in what it starts in the background
        "def work(*given, **named):\n"
        "    print('at work', flush=True)\n"
        "    time.sleep(60)\n"
        "api.quantize = config.load_config = work\n"
        f"sys.exit(main.run({words!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip().splitlines()[-1] == "stopped by Ctrl-C" and "Traceback" not in err


def test_errors_show_no_secret_and_no_escape_sequence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Command:
        def main(self, **_: object) -> None:
            raise ConfigError("a rule", code="E-CONF-999", found="hf_CANARYcanary0123456789 \x1b[31m\x1b]0;title\x07red")

    monkeypatch.setattr(main, "command", Command)
    main.run([])
    shown = capsys.readouterr().err
    assert "CANARY" not in shown and "\x1b" not in shown and "\x07" not in shown and "red" in shown


def test_a_mistyped_option_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["train", "--modle", "x"]) == 2
    assert "--model" in capsys.readouterr().err


def test_two_config_files_are_refused() -> None:
    assert train_command.split_settings(["a.yaml", "lora.rank=4"]) == (Path("a.yaml"), ["lora.rank=4"])
    with pytest.raises(ConfigError, match="at most one config file"):
        train_command.split_settings(["a.yaml", "b.yaml"])


def test_flags_and_file_give_the_same_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: starter\ndata: rows.jsonl\nmethod: lora\nout: runs/x\n")
    assert main.run(["train", str(file), "lora.rank=32", "--dry-run"]) == 0
    from_file = capsys.readouterr().out
    flags = ["--model", "starter", "--data", "rows.jsonl", "--method", "lora", "--out", "runs/x"]
    assert main.run(["train", *flags, "lora.rank=32", "--dry-run"]) == 0
    assert capsys.readouterr().out == from_file
    assert "rank: 32" in from_file


def test_resume_takes_the_settings_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("model: starter\ndata: rows.jsonl\nmethod: lora\nout: elsewhere\n")
    for words in (["--resume", str(tmp_path)], ["--resume", "--out", str(tmp_path)]):
        assert main.run(["train", *words, "--dry-run"]) == 0
        assert f"out: {tmp_path}" in capsys.readouterr().out


def test_marks_where_there_is_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [("ask\x1b[31m ", False), ("answer", True)]
    assert terminal.marked(pieces) == "ask [[answer]]"
    monkeypatch.setattr(terminal, "colour", lambda: True)
    assert terminal.marked(pieces) == "ask \x1b[30;42manswer\x1b[0m"


def test_a_table_with_hostile_cells_stays_a_table() -> None:
    shown = terminal.table(["name"], [["a\x1b[2Jb"], ["c\r"]])
    assert shown.splitlines()[2:] == ["ab", "c"]


SECRETS = [
    "hf_abcdefghIjklmnopqrst", "sk-proj-abcdefghijklmnop1", "ghp_abcdefghijklmnop1234", "github_pat_11ABCDEFG0abcdefg",
    "glpat-abcdefghijklmnopq",
    "xoxb-1234567890-abc", "AKIAABCDEFGHIJKLMNOP", "eyJhbGciOiJI.eyJzdWIiOiIx.abc", "https://me:hunter22@host/x",
    "WANDB_API_KEY=0123456789abcdef",
    'password: "correcthorse"', "token=abcdef123456",
]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_secret_is_blanked(secret: str) -> None:
    shown = redact.secrets(f"before {secret} after")
    assert redact.BLANK in shown and "before" in shown and "after" in shown
    for part in ("abcdef", "hunter22", "correcthorse", "1234567890", "eyJhbG", "ABCDEFGHIJ"):
        assert part not in shown


def test_ordinary_text_is_left_alone() -> None:
    text = "max_tokens: 512, trained_tokens 8,064, https://example.org/a?b=c, the token was long"
    text += ", skip-this-one-please, /data/hf_models/hf_Llama32Instruct/sk-learn-experiments-2024/x"
    assert redact.secrets(text) == text
    assert (
        redact.terminal(json.dumps({"a": "ä\n\tb"}, ensure_ascii=False) + "ä\n\tb")
        == json.dumps({"a": "ä\n\tb"}, ensure_ascii=False) + "ä\n\tb"
    )


def test_a_look_at_data_does_not_say_that_nothing_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Hi", "completion": "Hello"}\n{"prompt": "Hi"}\n', encoding="utf-8")
    assert main.run(["data", "check", str(path)]) == 2
    told = capsys.readouterr().err
    assert "E-DATA-043" in told and "trained" not in told


@pytest.mark.parametrize(("name", "word"), [("rank", "measured"), ("train", "trained")])
def test_a_shared_check_speaks_of_the_command_that_was_given(name: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([name, "one.yaml", "two.yaml"]) == 2
    shown = capsys.readouterr().err
    assert "E-CONF-080" in shown and shown.strip().endswith(f"Nothing was {word}.")


def test_a_number_of_rows_begins_at_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["rank", "--adapter", "x", "--data", "y", "--max-rows", "0"]) == 2 and "--max-rows" in capsys.readouterr().err
