"""SIGTERM, SIGUSR1 and Ctrl-C as a flag that the run looks at between two micro-batches and inside evaluation.

The handler only notes the signal; the run raises `StopRequested` at its next `poll()`, leaves the half-done step, saves, and exits with
143 (SIGTERM, SIGUSR1) or 130 (Ctrl-C).  A second Ctrl-C quits at once: the newest checkpoint on disk is safe whatever is interrupted.
Handlers are restored afterwards.  Outside the main thread Python allows no handlers; there the flag never rises.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from halfbyte.log import logger

T = TypeVar("T")
WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequested(BaseException):
    """Unwinds a step or an evaluation after a signal; a BaseException, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def exit_code(number: int) -> int:
    """130 for Ctrl-C, 143 for the others."""
    return 130 if number == signal.SIGINT else 143


class Stop:
    """The flag."""

    def __init__(self) -> None:
        self.number = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; a second Ctrl-C ends the process here and now."""
        if number == signal.SIGINT and self.number:
            os._exit(130)
        if number == signal.SIGINT:
            os.write(2, b"\nstopping after this micro-batch and saving; press Ctrl-C again to quit now\n")
        self.number = number

    def poll(self) -> None:
        """Raise StopRequested when a signal has come."""
        if self.number:
            raise StopRequested(self.number)

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, with a poll before each is handed out."""
        for item in items:
            self.poll()
            yield item


@contextmanager
def listen() -> Iterator[Stop]:
    """Put the handlers in place for the body and the previous ones back after it."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        logger().info("not in the main thread: signals do not stop this run")
        yield stop
        return
    previous: dict[int, Callable[..., Any] | int | None] = {number: signal.signal(number, stop.handle) for number in WATCHED}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
