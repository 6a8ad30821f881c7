"""What a crash, a full disk or a changed byte can do to a run: the full counts, as one file of results.

    python -m benchmarks.crash_study [--scale 0.05]        about ten minutes on two cores at scale 1

    kills             SIGKILL at random moments of a training run that saves every step; the next process goes on with it each time
    every call        SIGKILL before each system call of a save, a rotation and a replacement
    resume            24 stop points x 4 kinds of run; adapters, optimizer, generators, log lines compared to the bit
    controls          one saved item dropped; the comparison must see it
    errors            6 errors at every system call of a save, once and lasting; no false success
    power loss        crash states by the weakest promises of a file system
    changed bytes     single bits flipped, files cut

Each count is made by the same functions the tests call; a loss raises, so a file of results exists only when nothing was lost, and
the fields `lost`, `different` and `found` are what was counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import record
from tests.train.test_train_kill import kills, power_losses
from tests.train.test_train_kill_run import kills_of_a_run
from tests.train.test_train_storage_faults import corruptions

COUNTED_TESTS = {
    "resume_stop_points": "test_train_resume.py -k test_a_run_stopped",
    "controls_one_item_dropped": "test_train_resume.py -k test_each_saved_item",
    "storage_errors": "test_train_storage_faults.py -k test_an_error_at_every_call",
    "kill_before_every_call": "test_train_kill.py -k every_system_call",
}


def count_tests(selection: str) -> dict[str, object]:
    """Run a selection of tests, slow ones too, and count them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        file, *more = selection.split()
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", f"tests/train/{file}", *more, f"--junit-xml={report}", "-p", "no:cacheprovider"]
        subprocess.run(command, cwd=record.ROOT, stdout=subprocess.DEVNULL, check=False)
        suite = next(ElementTree.parse(report).getroot().iter("testsuite")).attrib
        failed = int(suite["failures"]) + int(suite["errors"])
        return {"tests": int(suite["tests"]), "failed": failed, "seconds": round(time.monotonic() - began, 1)}


def timed(counts: dict[str, int], began: float) -> dict[str, object]:
    """The counts and how long they took."""
    return {**counts, "seconds": round(time.monotonic() - began, 1)}


def study(scale: float, with_tests: bool) -> dict[str, object]:
    """All counts; `scale` below 1 makes a smaller study, which says so."""
    body: dict[str, object] = {"scale": scale}

    def some(count: int) -> int:
        return max(1, round(count * scale))

    with tempfile.TemporaryDirectory() as folder:
        work, began = Path(folder), time.monotonic()
        body["kill_training_run"] = timed(kills_of_a_run(work / "stage", work / "run", some(200)), began)
        began = time.monotonic()
        body["kill_save_loop"] = timed(kills(work / "saves", some(200)), began)
        began = time.monotonic()
        (work / "bytes").mkdir()
        body["changed_bytes"] = timed(corruptions(work / "bytes", some(2000), some(300)), began)
        began = time.monotonic()
        (work / "power").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            refused = power_losses(work / "power", patch, some(1000))
        body["power_loss"] = timed({"states": some(1000), "torn_and_refused": refused, "lost": 0}, began)
    if with_tests:
        body |= {name: count_tests(selection) for name, selection in COUNTED_TESTS.items()}
    return body


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the counts; below 1 nothing is written")
    parser.add_argument("--no-tests", action="store_true", help="leave out what is counted by running tests; nothing is written")
    options = parser.parse_args()
    body = study(options.scale, not options.no_tests)
    print(json.dumps(body, indent=1))
    if options.scale == 1.0 and not options.no_tests:
        print(f"wrote {record.write('crash', body)}")
    failed = sum(part["failed"] for part in body.values() if isinstance(part, dict) and "failed" in part)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
