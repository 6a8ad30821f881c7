"""Fault points do nothing unless asked, and then exactly what was asked at exactly that pass."""

import errno
import re
from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte.errors import ConfigError
from halfbyte.train import faults


def test_nothing_happens_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALFBYTE_FAULTS", raising=False)
    for _ in range(100):
        faults.point("checkpoint.write")


@pytest.mark.parametrize(("when", "due"), [("2", [2]), ("3+", [3, 4, 5]), ("*", [1, 2, 3, 4, 5])])
def test_a_fault_is_due_at_its_passes(monkeypatch: pytest.MonkeyPatch, when: str, due: list[int]) -> None:
    for name in ("checkpoint.write", "checkpoint.*"):
        monkeypatch.setenv("HALFBYTE_FAULTS", f"{name}:ENOSPC:{when}")
        hit = []
        for number in range(1, 6):
            faults.point("train.step_done")
            try:
                faults.point("checkpoint.write")
            except OSError as error:
                assert error.errno == errno.ENOSPC
                hit.append(number)
        assert hit == due


def test_counting_starts_again_with_another_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("a:stop:2", "a:stop:2,b:stop:1", "", "a:stop:2"):
        monkeypatch.setenv("HALFBYTE_FAULTS", text)
        faults.point("a")


def test_each_rule_counts_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_FAULTS", "here:EIO:1,here:ENOSPC:2")
    for number in (errno.EIO, errno.ENOSPC):
        with pytest.raises(OSError) as caught:
            faults.point("here")
        assert caught.value.errno == number


@pytest.mark.parametrize(("kind", "raised"), [("stop", faults.FaultStop), ("memory", torch.OutOfMemoryError)])
def test_each_kind(monkeypatch: pytest.MonkeyPatch, kind: str, raised: type[BaseException]) -> None:
    monkeypatch.setenv("HALFBYTE_FAULTS", f"here:{kind}:1")
    with pytest.raises(raised):
        faults.point("here")


def test_a_signal_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    monkeypatch.setenv("HALFBYTE_FAULTS", "here:sigterm:1")
    faults.point("here")
    signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


@pytest.mark.parametrize("text", ["x", "x:kill", "x:explode:1", "x:kill:0", "x:kill:-1", "x:kill:+", "x:EIO:1.5"])
def test_a_rule_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HALFBYTE_FAULTS", text)
    with pytest.raises(ConfigError, match="HALFBYTE_FAULTS"):
        faults.point("x")
    monkeypatch.setenv("HALFBYTE_FAULTS", "")
    faults.point("x")


def test_every_point_of_the_program_is_documented_and_the_other_way_round() -> None:
    used = set()
    for path in Path(halfbyte.__file__).parent.rglob("*.py"):
        used |= set(re.findall(r"(?:faults\.)?point\(\"((?:train|checkpoint)\.[a-z_]+)\"\)", path.read_text()))
    text = faults.__doc__ or ""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith(("| checkpoint.", "| train."))]
    named = set()
    for row in rows:
        first, *more = [name.strip() for name in row.split(",")]
        named |= {first} | {name if "." in name[1:] else first.partition(".")[0] + name for name in more}
    assert used == named
