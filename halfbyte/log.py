"""One logger; only rank 0 speaks.

Text goes to standard error, so that what a command answers on standard output can be piped.
"""

import logging
import sys

from halfbyte import env


def logger() -> logging.Logger:
    """The program's logger; level INFO on rank 0, ERROR elsewhere."""
    found = logging.getLogger("halfbyte")
    if not found.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        found.addHandler(handler)
        found.propagate = False
        found.setLevel(logging.INFO if env.rank() == 0 else logging.ERROR)
    return found
