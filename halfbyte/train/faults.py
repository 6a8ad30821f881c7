"""Named points at which a crash test can kill, fail or stop the program; in a normal run a point does nothing.

`HALFBYTE_FAULTS` holds rules `name:kind:when`, separated by commas:

    name   a point's name, or a pattern: checkpoint.write, checkpoint.*, train.*
    kind   kill     SIGKILL to this process, as `kill -9` or the kernel's memory killer would
           sigterm, sigint   the signal, to this process
           stop     raise FaultStop (a BaseException: nothing on the way may catch it)
           memory   raise torch.OutOfMemoryError
           ENOSPC, EIO, EACCES, EROFS ... any name of the errno module: raise that OSError
    when   7   the 7th pass only;   7+   the 7th and all after it;   *   always.  Passes of all points that match are counted together.

Example: `HALFBYTE_FAULTS=checkpoint.write:kill:7`.  Counting starts again whenever the text of the variable changes.

Points of the program (a test lists them from here):

| point | stands |
|---|---|
| checkpoint.open, .write, .fsync, .fsync_folder, .mkdir, .rename, .unlink, .rmdir | before that call of a save, a rotation or a cleaning |
| train.micro_batch   | before the forward pass of each micro-batch |
| train.backward_done | after the last backward of a window, before the optimizer step |
| train.step_done     | after each optimizer step, before its log line |
| train.before_eval, train.after_eval | around each evaluation |
| train.before_save, train.after_save | around each save |
| train.epoch_end     | after the last step of each epoch |

What this is not: a switch users need, and it never changes numbers.  Idea: FoundationDB's BUGGIFY,
https://apple.github.io/foundationdb/testing.html
"""

import errno
import fnmatch
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from halfbyte import env
from halfbyte.errors import ConfigError


class FaultStop(BaseException):
    """Raised by the fault kind "stop": the run ends here as if its process had gone, but the test's process lives on."""


@dataclass
class Rule:
    """One `name:kind:when` and how often its points were passed."""

    pattern: str
    kind: str
    first: int
    last: int | None
    passes: int = 0

    def due(self, name: str) -> bool:
        """Count this pass if the pattern matches; True when the fault is due."""
        if not fnmatch.fnmatchcase(name, self.pattern):
            return False
        self.passes += 1
        return self.first <= self.passes and (self.last is None or self.passes <= self.last)


@dataclass
class Plan:
    """The rules of one text of HALFBYTE_FAULTS."""

    text: str = ""
    rules: list[Rule] = field(default_factory=list)


def _send(number: signal.Signals) -> Callable[[str], None]:
    return lambda name: os.kill(os.getpid(), number)


def _stop(name: str) -> None:
    raise FaultStop(name)


def _memory(name: str) -> None:
    raise torch.OutOfMemoryError(f"fault injected at {name}")


KINDS: dict[str, Callable[[str], None]] = {
    "kill": _send(signal.SIGKILL), "sigterm": _send(signal.SIGTERM), "sigint": _send(signal.SIGINT), "stop": _stop, "memory": _memory,
}
_ERRNO = {name: number for number, name in errno.errorcode.items()}
_plan = Plan()


def parse(text: str) -> list[Rule]:
    """The rules of a HALFBYTE_FAULTS text.  Raises ConfigError for a rule that cannot be read.

    >>> parse("checkpoint.write:kill:7, checkpoint.*:ENOSPC:2+")[1]
    Rule(pattern='checkpoint.*', kind='ENOSPC', first=2, last=None, passes=0)
    """
    rules = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        pattern, _, rest = part.partition(":")
        kind, _, when = rest.partition(":")
        number = when.removesuffix("+")
        if (kind not in KINDS and kind not in _ERRNO) or not (when == "*" or (number.isdecimal() and int(number) > 0)):
            raise ConfigError(
                "a fault is name:kind:when", code="E-CONF-090", place="environment variable HALFBYTE_FAULTS", found=part,
                expected=f"kind one of {', '.join(KINDS)} or an errno name; when a number, a number and +, or *",
                remedy="unset HALFBYTE_FAULTS: it is for crash tests only",
            )
        first = 1 if when == "*" else int(number)
        rules.append(Rule(pattern, kind, first, first if when.isdecimal() else None))
    return rules


def point(name: str) -> None:
    """Do what HALFBYTE_FAULTS asks for at this point; nothing when it is unset.

    Raises FaultStop, torch.OutOfMemoryError or OSError as the rule says, or does not return at all.
    """
    text = env.faults()
    if not text and not _plan.rules:
        return
    if text != _plan.text:
        _plan.text, _plan.rules = text, parse(text)
    for rule in [rule for rule in _plan.rules if rule.due(name)]:
        if rule.kind in KINDS:
            KINDS[rule.kind](name)
        else:
            raise OSError(_ERRNO[rule.kind], os.strerror(_ERRNO[rule.kind]) + f" (fault injected at {name})")
