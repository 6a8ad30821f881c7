"""Importing the package starts nothing, and asking for help loads nothing heavy.  Each check runs in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch", "transformers", "numba", "matplotlib", "triton", "gguf", "pyarrow", "sacrebleu", "jinja2", "safetensors", "numpy", "datasets",
)  # fmt: skip

# An audit hook sees every socket, every child process and every file opened for writing, whoever starts it.
WATCHED = """
import sys, threading
events = []
def watch(event, args):
    if event.startswith("socket.") or event in ("subprocess.Popen", "os.system", "os.fork", "os.posix_spawn", "os.mkdir"):
        events.append(event)
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+") and "__pycache__" not in str(args[0]):
        events.append(f"open {args[0]}")
sys.addaudithook(watch)
before = threading.active_count()
"""


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["halfbyte", "halfbyte.config", "halfbyte.shape", "halfbyte.cli.main"])
def test_import_opens_nothing_and_loads_nothing_heavy(module: str) -> None:
    code = WATCHED + (
        f"import {module}\n"
        f"assert events == [], events\n"
        f"assert threading.active_count() == before\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        f"assert loaded == [], loaded\n"
    )
    _run(code)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "--help"], ["quickstart", "--help"], ["trian"], []])
def test_help_and_a_mistyped_command_load_nothing_heavy(arguments: list[str]) -> None:
    code = WATCHED + (
        f"import io, contextlib\nfrom halfbyte.cli.main import run\n"
        f"with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:\n"
        f"    run({arguments!r})\n"
        f"assert out.getvalue() + err.getvalue()\n"
        f"assert events == [], events\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        f"assert loaded == [], loaded\n"
    )
    _run(code)


def test_a_bad_settings_file_is_refused_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: rows.jsonl\nlora: {rank: 0}\n", encoding="utf-8")
    code = (
        f"import sys\nfrom halfbyte.cli.main import run\n"
        f"assert run(['train', {str(tmp_path / 'run.yaml')!r}]) == 2\n"
        f"assert not [name for name in ('torch', 'transformers', 'numba', 'matplotlib') if name in sys.modules]\n"
    )
    _run(code)


def test_the_public_names_reach_no_accelerator() -> None:
    """Fetching every public name loads torch, but initialises no CUDA and starts no thread and no connection."""
    code = WATCHED + (
        "import halfbyte\nnames = [getattr(halfbyte, name) for name in halfbyte.__all__]\nimport torch\n"
        "assert not torch.cuda.is_initialized()\nassert threading.active_count() == before\n"
        "assert not [event for event in events if event.startswith('socket.')], events\nprint(len(names))\n"
    )
    assert int(_run(code)) >= 10
