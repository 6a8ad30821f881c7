"""One training of a study: a process of `halfbyte train` in a run folder of its own, whose outcome is kept when the study is stopped.

    <name>.yaml   the run's settings      <name>/   the run folder      <name>.log   what it printed
    <name>.json   the outcome, written whole after the run has ended: a study that is started again does not repeat it

A process of its own makes the peak memory that of this run alone.  A run without an outcome goes on from its newest checkpoint where it
saved one, and begins anew where it did not; both give the same numbers, for training repeats to the bit.  The lock of the study is
inherited by its processes, so a run that goes on after the study was killed is waited for, never trained over.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.config import RunConfig, load_config, to_yaml
from halfbyte.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DoesNotFitError,
    EnvironmentFault,
    HalfbyteError,
    Interrupted,
    NumericError,
    StorageError,
    Terminated,
)
from halfbyte.train.metrics import read as read_metrics
from halfbyte.train.run_folder import RunFolder

DIVERGED, DOES_NOT_FIT = 6, 7
"""Exit codes of a run that are an outcome of the study, not a fault of it."""
STOPPED = (130, 143)
FAULTS: dict[int, tuple[type[HalfbyteError], str]] = {
    2: (ConfigError, "E-CONF-410"), 3: (EnvironmentFault, "E-ENV-410"), 4: (CheckpointError, "E-CKPT-410"),
    5: (StorageError, "E-STORE-410"), DIVERGED: (NumericError, "E-NUM-410"), DOES_NOT_FIT: (DoesNotFitError, "E-FIT-410"),
}  # fmt: skip
KEPT = (
    "steps", "total_steps", "tokens", "seconds", "peak_memory_bytes", "weight_bytes", "trainable_params", "total_params", "trainable_share",
    "first_eval_loss", "last_eval_loss", "final_eval_loss", "adapter_bytes", "model_bytes", "micro_batch_size", "activations",
    "train_rows", "eval_rows",
)  # fmt: skip
NEEDED = ("steps", "seconds", "peak_memory_bytes", "weight_bytes", "trainable_params", "trainable_share", "last_eval_loss", "rate", "jobs",
          "threads", "curve")  # fmt: skip
"""What a table is made of, of every run that finished."""
PARTS = ("rows", "bases", "sweep", "points", "runs", "judged")
"""What the stages of a study leave in its folder."""
BEGUN = "--- halfbyte study: "
"""Begins what one process says in a log that several share."""
RUNNING: "set[subprocess.Popen[bytes]]" = set()
"""Processes of this study that are at work."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Folder:
    """The folder of a study while this process holds its lock."""

    path: Path
    lock: int
    say: Say


@contextmanager
def opened(path: Path, say: Say) -> Iterator[Folder]:
    """The folder of a study for this process alone; a run of an earlier start that is still at work is waited for.

    Raises StorageError, also for a folder with something in it that no study has put there: it would be written over.
    """
    path = path.absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        _require_own(path)
        lock = os.open(path / "study.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as fault:
        raise StorageError(
            "a study needs a folder it can write", code="E-STORE-411", place=str(path), found=fault.strerror or "",
            remedy="name another folder with --out, or change who may write there", nothing_done="Nothing was trained.",
        ) from fault  # fmt: skip
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting: another start of this study, or a run it began, is at work in {path}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield Folder(path, lock, say)
    finally:
        os.close(lock)


def _require_own(path: Path) -> None:
    found = sorted(one.name for one in path.iterdir() if one.name != "study.lock" and not one.name.startswith("."))
    if found and not (path / "study.json").is_file():
        raise StorageError(
            "a study must not be written over other files", code="E-STORE-412", place=str(path), found=", ".join(found[:5]),
            expected="a new folder, or that of a study", remedy="name another folder with --out", nothing_done="Nothing was trained.",
        )  # fmt: skip


def write_json(path: Path, values: Any) -> None:
    """Replace a JSON file as a whole, durably.  Raises StorageError."""
    RunFolder(path.parent).write_json(path, values)


def read_json(path: Path, needs: Sequence[str] = ()) -> Any:
    """The object in a JSON file, None where there is no file.  Raises CheckpointError for a damaged one, or one without what it needs."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as fault:
        raise _damaged(path, str(fault)) from fault
    if not isinstance(values, dict):
        raise _damaged(path, f"{type(values).__name__}, no object")
    if missing := [key for key in needs if key not in values]:
        raise _damaged(path, f"no {', '.join(missing)} in it")
    return values


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "a file of a study must be as the study wrote it", code="E-CKPT-413", place=str(path), found=found[:200],
        expected="a JSON object", remedy="put it back, or name another folder with --out; without this file its part is done again",
    )  # fmt: skip


def require_same(path: Path, now: dict[str, Any]) -> None:
    """The study described by `now` begins, or goes on, where `path` describes one.

    Where that is another one: it is replaced, with a base that it made, if none of its runs took a step, for a first command that was
    refused leaves little worth keeping; otherwise CheckpointError.
    """
    before = read_json(path, ("settings",))
    if before is not None and not all(isinstance(before.get(key, {}), dict) for key in ("settings", "models")):
        raise _damaged(path, "settings that are no object")
    if before is not None and before != now and set(now) == set(before) and forgotten(path.parent):
        before = None
    if before is None:
        write_json(path, now)
    elif before != now:
        keys = [key for key in sorted(set(before) | set(now)) if before.get(key) != now.get(key)]
        keys = [told for key in keys for told in _differences(key, before.get(key), now.get(key))]
        raise CheckpointError(
            "a study goes on only with the settings it began with", code="E-CKPT-412", place=str(path),
            found=f"other {', '.join(keys)}", remedy="name another folder with --out, or the same settings as before",
            nothing_done="Nothing was trained.",
        )  # fmt: skip


def _differences(key: str, before: Any, now: Any) -> list[str]:
    """The keys below `key` that differ, each with both values.

    >>> _differences("settings", {"train": {"seed": 0, "epochs": 1}}, {"train": {"seed": 1, "epochs": 1}})
    ['settings.train.seed (0 before, 1 now)']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return [told for name in names for told in _differences(f"{key}.{name}", before.get(name), now.get(name))]
    return [f"{key} ({str(before)[:40]} before, {str(now)[:40]} now)"]


def forgotten(folder: Path) -> bool:
    """Remove what a study's stages left, unless one of its runs made an optimizer step: that is worth keeping."""
    if any("loss" in record for metrics in folder.rglob("metrics.jsonl") for record in read_metrics(metrics)):
        return False
    for part in PARTS:
        shutil.rmtree(folder / part, ignore_errors=True)
    return True


def call(folder: Folder, words: Sequence[str], log: Path) -> int:
    """Run `python -m ...` to its end, its words into `log`; returns the exit code.  Raises Interrupted where it was stopped."""
    with log.open("ab") as out:
        out.write(f"{BEGUN}{' '.join(words)}\n".encode())
        out.flush()
        child = subprocess.Popen(
            [sys.executable, "-m", *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=(folder.lock,)
        )
    RUNNING.add(child)
    try:
        code = child.wait()
    except KeyboardInterrupt as stop:
        end_all(stop)
        raise _interrupted(folder, 143 if isinstance(stop, Terminated) else 130) from None
    finally:
        RUNNING.discard(child)
    if code in STOPPED:
        raise _interrupted(folder, code)
    return code


def end_all(stop: KeyboardInterrupt) -> None:
    """End every run of the study: Ctrl-C reaches them by itself, SIGTERM is passed on."""
    running = list(RUNNING)
    if isinstance(stop, Terminated):
        for child in running:
            child.terminate()
    for child in running:
        _end(child)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Give a run that is asked to stop the time to save."""
    try:
        child.wait(timeout=60)
    except subprocess.TimeoutExpired:
        child.terminate()
        child.wait()


def _interrupted(folder: Folder, code: int) -> Interrupted:
    return Interrupted(
        "the study was stopped; what is finished is kept", code="E-STOP-410", exit_code=code, place=str(folder.path),
        remedy="the same command goes on from here",
    )  # fmt: skip


def failure(code: int, log: Path) -> HalfbyteError:
    """The error of a process that ended with an exit code, with the end of what it said."""
    kind, name = FAULTS.get(code, (EnvironmentFault, "E-ENV-410"))
    words = last_words(log)
    if kind is ConfigError and words.startswith("error E-DATA-"):
        kind, name = DataError, "E-DATA-414"
    ending = f"exit code {code}" if code >= 0 else f"ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return kind(
        "a run of the study failed", code=name, place=str(log), found=f"{ending}\n{words}",
        remedy="mend it; the same command then goes on from here; with other rows only while no run has made a step",
    )  # fmt: skip


def last_words(log: Path, most: int = 12) -> str:
    """The error block at the end of what the newest process said into a log, or its last lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    lines = lines[max((number + 1 for number, line in enumerate(lines) if line.startswith(BEGUN)), default=0) :]
    starts = [number for number, line in enumerate(lines) if line.startswith("error E-")]
    return "\n".join(lines[starts[-1] :][:most] if starts else lines[-most:])


def train(folder: Folder, name: str, config: RunConfig, *, beside: int = 1) -> dict[str, Any]:
    """The outcome of one run, trained now or kept from before: `status` is finished, diverged or "does not fit".

    A finished one has the summary of its run.json, `rate`, `threads`, `jobs` (`beside`: runs at a time), its held-out `curve`
    [[step, loss], ...] and its speed in tokens per second of stepping.  Raises what a run that failed otherwise said.
    """
    at = folder.path / name
    if (kept := _kept(at.with_name(at.name + ".json"))) is not None:
        return kept
    at.parent.mkdir(parents=True, exist_ok=True)
    run, log = RunFolder(at), at.with_name(at.name + ".log")
    if (read_json(run.summary) or {}).get("status") not in ("finished", "stopped early"):
        settings = at.with_name(at.name + ".yaml")
        run.write_text(settings, to_yaml(config.model_copy(update={"out": str(at)})))
        resume = any((at / "checkpoints").glob("step-*"))
        if not resume and at.exists():
            shutil.rmtree(at)
        code = call(folder, ["halfbyte", "train", str(settings), *(["--resume"] if resume else [])], log)
        if code in (DIVERGED, DOES_NOT_FIT):
            outcome = unfinished(run, "diverged" if code == DIVERGED else "does not fit", last_words(log))
            if code == DIVERGED:  # what does not fit is tried again by the same command: there may be more room then
                write_json(at.with_name(at.name + ".json"), outcome)
            return outcome
        if code:
            raise failure(code, log)
    outcome = {**outcome_of(run), "jobs": beside}
    write_json(at.with_name(at.name + ".json"), outcome)
    return outcome


def _kept(path: Path) -> dict[str, Any] | None:
    """The outcome of a run that ended before."""
    found: dict[str, Any] | None = read_json(path, ("status",))
    return found and read_json(path, NEEDED if found["status"] == "finished" else ("error",))


def unfinished(run: RunFolder, status: str, error: str) -> dict[str, Any]:
    """What a study keeps of a run that diverged or did not fit: why; its rate and its first held-out loss, where it came so far."""
    begun = {"rate": load_config(run.config).optim.learning_rate} if run.config.is_file() else {}
    first = (read_json(run.summary) or {}).get("first_eval_loss")
    return {"status": status, "error": error, **begun, **({} if first is None else {"first_eval_loss": first})}


def drop_weights(run: Path) -> None:
    """Remove what a run was trained to, and keep its record; its log ends with saying so."""
    if any((run / part).exists() for part in ("adapter", "model")):
        with run.with_name(run.name + ".log").open("a", encoding="utf-8") as log:
            log.write("a point of a study: its record is kept, its weights are not, so there is nothing to chat with or to merge\n")
    for part in ("adapter", "model", "base", "checkpoints"):
        shutil.rmtree(run / part, ignore_errors=True)


def outcome_of(run: RunFolder) -> dict[str, Any]:
    """What a study keeps of a finished run."""
    summary, config, records = read_json(run.summary), load_config(run.config), read_metrics(run.metrics)
    stepped = [record for record in records if "loss" in record]
    seconds = sum(record["seconds"] for record in stepped)
    study = f"{Path(config.data.path).parent.parent}/"
    return {
        "status": "finished", **{key: summary[key] for key in KEPT if summary.get(key) is not None},
        "data_notes": [note.replace(study, "") for note in summary.get("data_notes", ())],
        "rate": config.optim.learning_rate, "threads": config.train.threads, "max_tokens": config.data.max_tokens,
        "tokens_per_second": sum(record["tokens"] for record in stepped) / seconds if seconds else None,
        "curve": [[record["step"], record["eval_loss"]] for record in records if "eval_loss" in record],
        "machine": (read_json(run.environment) or {}).get("machine", {}),
    }  # fmt: skip
