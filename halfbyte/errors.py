"""Every exception Halfbyte raises on purpose, and the one form in which it speaks.

    HalfbyteError
    |-- ConfigError          which key, what came, what is allowed              exit 2
    |-- DataError            file, line, field, what was expected               exit 2
    |-- ModelError                                                              exit 2
    |   |-- WeightError      tensor name, expected and found shape or dtype
    |   `-- TargetError      pattern, nearest module names
    |-- AdapterError         adapter names, what does not agree                 exit 2
    |-- UnsupportedError     op or feature, device, reason, alternative         exit 3
    |-- EnvironmentFault     something this machine lacks                       exit 3
    |-- CheckpointError      path, missing or mismatching part                  exit 4
    |-- StorageError         path, needed and free bytes, what the system said  exit 5
    |-- NumericError         step, first bad tensor, rows                       exit 6
    |-- DoesNotFitError      needed and available GiB, what to change first     exit 7
    `-- Interrupted          a signal asked to stop; the run was saved          exit 130 or 143

Form: *rule, place, found, expected, remedy* in one block, no traceback.  The command line prints `str(error)` and exits with
`error.exit_code`.  This module holds no logic beyond the text.
"""

import difflib
from collections.abc import Iterable


class HalfbyteError(Exception):
    """Base of all errors a user can cause or repair.

    rule      the sentence that was broken, e.g. "a role must be one of system, user, assistant, tool"
    code      stable name for searching and tests, e.g. "E-DATA-014"
    place     file, line, field, tensor or key: where to look
    found     the offending value, as text
    expected  what is allowed
    remedy    what to do next
    nothing_done  closes the block with what was not done, e.g. "Nothing was trained."

    >>> print(DataError("a role must be known", code="E-DATA-014", place="rows.jsonl line 3, field messages[0].role",
    ...                 found="asistant", expected="system, user, assistant, tool", remedy='did you mean "assistant"?'))
    error E-DATA-014: a role must be known
      where:    rows.jsonl line 3, field messages[0].role
      found:    asistant
      expected: system, user, assistant, tool
      fix:      did you mean "assistant"?
    """

    exit_code = 2

    def __init__(
        self, rule: str, *, code: str, place: str = "", found: str = "", expected: str = "", remedy: str = "", nothing_done: str = ""
    ) -> None:
        self.rule, self.code, self.place, self.found = rule, code, place, found
        self.expected, self.remedy, self.nothing_done = expected, remedy, nothing_done
        super().__init__(self.text())

    def text(self) -> str:
        """The block that is printed."""
        lines = [f"error {self.code}: {self.rule}"]
        for label, value in (("where", self.place), ("found", self.found), ("expected", self.expected), ("fix", self.remedy)):
            text = str(value)  # a caller in Python may have given a number or a type where a name is wanted
            if text:
                lines.append(f"  {label + ':':<9} " + text.replace("\n", "\n" + " " * 12))
        if self.nothing_done:
            lines.append(f"  {self.nothing_done}")
        return "\n".join(lines)


class ConfigError(HalfbyteError):
    """A setting is unknown, of the wrong type, out of range, or in conflict with another."""


class DataError(HalfbyteError):
    """A data file or one of its rows cannot be used."""


class ModelError(HalfbyteError):
    """A model folder, file or architecture cannot be used."""


class WeightError(ModelError):
    """A tensor of a model file is missing, of another shape or dtype, or not finite."""


class TargetError(ModelError):
    """A target pattern matches no module, or one that cannot carry an adapter."""


class AdapterError(HalfbyteError):
    """An adapter does not fit the model, or does not agree with another adapter."""


class UnsupportedError(HalfbyteError):
    """An op, feature or device combination that this program does not serve."""

    exit_code = 3


class EnvironmentFault(HalfbyteError):
    """Something this machine lacks: a package, a registry, a permission."""

    exit_code = 3


class CheckpointError(HalfbyteError):
    """A checkpoint is missing, damaged, or belongs to another run."""

    exit_code = 4


class StorageError(HalfbyteError):
    """The file system refused: full, read-only, gone."""

    exit_code = 5


class NumericError(HalfbyteError):
    """A loss, gradient or weight is not finite."""

    exit_code = 6


class DoesNotFitError(HalfbyteError):
    """Memory does not suffice, foreseen or met."""

    exit_code = 7


class Interrupted(HalfbyteError):
    """A signal asked to stop; what was trained is saved.  exit_code is 130 (SIGINT) or 143 (SIGTERM)."""

    def __init__(self, rule: str, *, code: str, exit_code: int, remedy: str = "", place: str = "") -> None:
        self.exit_code = exit_code
        super().__init__(rule, code=code, remedy=remedy, place=place)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does; no error of the user's, so no HalfbyteError."""


def nearest(word: str, legal: Iterable[str], count: int = 3) -> str:
    """"did you mean a, b?" for the legal names nearest to `word`; empty when none is near.

    >>> nearest("learnig_rate", ["learning_rate", "rank"])
    'did you mean learning_rate?'
    """
    close = difflib.get_close_matches(word, list(legal), n=count, cutoff=0.6)
    return f"did you mean {', '.join(close)}?" if close else ""
