"""The parent's side of the template worker: starts it, sends conversations, ends it, and tells what went wrong.

A render over its limits ends the worker and the call; the next call starts a fresh one.  The worker ends with this process, since its
standard input closes, and its own alarm ends it even in the middle of an endless loop.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

BATCH_JOBS = 64
BATCH_BYTES = 2 * 2**20
START_SECONDS = 60.0  # a loaded machine may need long to start Python
PATIENCE_SECONDS = 60.0  # the worker's own alarm rings after 2 s of processor time, which a loaded machine may stretch


class RenderFault(Exception):
    """A render that failed: its number in the call, the kind (template, syntax, time, memory, size) and the words."""

    def __init__(self, number: int, kind: str, words: str) -> None:
        super().__init__(words)
        self.number, self.kind, self.words = number, kind, words


class TemplateProcess:
    """A worker for one template; started at the first render, ended by `close`, by garbage collection or at exit."""

    def __init__(self, source: str, specials: dict[str, str], now: str) -> None:
        self.setup = {"template": source, "specials": specials, "now": now}
        self._process: subprocess.Popen[bytes] | None = None
        self._received = bytearray()
        self._end: weakref.finalize[..., TemplateProcess] | None = None

    @property
    def pid(self) -> int | None:
        """Process number of the running worker."""
        return None if self._process is None else self._process.pid

    def render(self, jobs: Sequence[dict[str, Any]]) -> list[str | RenderFault]:
        """Text of each job, or the words with which the template refused it; raises RenderFault on a breach of limits or syntax."""
        made: list[str | RenderFault] = []
        for batch in _batches(jobs):
            process = self._started()
            self._send(process, f'{{"jobs": [{", ".join(batch)}]}}')
            for _ in batch:
                reply = self._reply(process, len(made), PATIENCE_SECONDS)
                fault = None if "text" in reply else RenderFault(len(made), reply["kind"], reply["error"])
                if fault is not None and fault.kind != "template":
                    self.close()
                    raise fault
                made.append(fault or reply["text"])
        return made

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None:
            return self._process
        process = subprocess.Popen(
            [sys.executable, "-m", "halfbyte.data.template_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._process, self._received = process, bytearray()
        self._end = weakref.finalize(self, _end, process)
        self._send(process, json.dumps(self.setup))
        reply = self._reply(process, 0, START_SECONDS)
        if "error" in reply:
            self.close()
            raise RenderFault(0, reply["kind"], reply["error"])
        return process

    @staticmethod
    def _send(process: "subprocess.Popen[bytes]", line: str) -> None:
        """Write one line.  A worker that is gone is noticed at the reply."""
        assert process.stdin is not None
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass

    def _reply(self, process: "subprocess.Popen[bytes]", number: int, seconds: float) -> dict[str, str]:
        """The next line; raises RenderFault when the worker ended or is silent for `seconds`."""
        assert process.stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self._received:
            ready = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]
            chunk = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if not chunk:
                raise self._breach(number, silent=not ready)
            self._received += chunk
        line, _, rest = self._received.partition(b"\n")
        self._received = rest
        answer: dict[str, str] = json.loads(line)
        return answer

    def _breach(self, number: int, *, silent: bool) -> RenderFault:
        """What the end of the worker means."""
        code = self.close()
        if silent or code == -signal.SIGPROF:
            return RenderFault(number, "time", "more than 2 s")
        return RenderFault(number, "memory", f"the template's process ended with {code}; most likely more than 256 MiB")

    def close(self) -> int | None:
        """End the worker; its exit code when it had ended by itself."""
        process, self._process = self._process, None
        if process is None or self._end is None:
            return None
        if process.stdin is not None and not process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            code: int | None = process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            code = None
        self._end()
        return code


def _batches(jobs: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Jobs as JSON, in groups that fit the worker's memory."""
    batch: list[str] = []
    size = 0
    for job in jobs:
        text = json.dumps(job)
        if batch and (len(batch) >= BATCH_JOBS or size + len(text) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End and reap a worker and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
