"""How transformers is called: without its progress bars and reports, and with the errors of its Rust parts made catchable."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from types import TracebackType

import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' progress bars and reports are off inside; both are put back.

    Its GGUF reader draws a bar of its own on standard error: in a log file that would be hundreds of lines.
    """
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


class plain_exceptions:
    """Inside, an error of exactly the class Exception becomes a RuntimeError; any other passes.

    The tokenizers library raises plain Exception for a damaged file, which nothing narrower can catch.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        if kind is Exception:
            raise RuntimeError(str(fault)) from fault
