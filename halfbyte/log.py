"""One logger; only rank 0 speaks.

Text goes to standard error, so that what a command answers on standard output can be piped.
"""

import logging
import sys

from halfbyte import env, redact


class _Clean(logging.Formatter):
    """The message without what looks like a secret and without escape sequences."""

    def format(self, record: logging.LogRecord) -> str:
        return redact.terminal(redact.secrets(super().format(record)))


class _Current(logging.StreamHandler):
    """Writes to what standard error is when something is said, not to what it was when the logger was made."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def logger() -> logging.Logger:
    """The program's logger; level INFO on rank 0, ERROR elsewhere."""
    found = logging.getLogger("halfbyte")
    if not found.handlers:
        handler = _Current(sys.stderr)
        handler.setFormatter(_Clean("%(message)s"))
        found.addHandler(handler)
        found.propagate = False
        found.setLevel(logging.INFO if env.rank() == 0 else logging.ERROR)
    return found
