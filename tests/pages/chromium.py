"""A headless Chromium driven over its debugging pipe, with nothing but the standard library: open a page from disk, hear all it does.

Also a command, for the pictures of the docs: `python -m tests.pages.chromium PAGE.html PICTURE.png [WIDTH [HEIGHT]]`.
Source: https://chromedevtools.github.io/devtools-protocol/ (messages are JSON texts with a zero byte behind; fd 3 is read, fd 4 written).
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 240.0


def binary() -> str | None:
    """The Chromium of this machine, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Seen:
    """What a page did while it was opened, and how it looks."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    png: bytes = b""


class Browser:
    """Context manager around one headless browser with one tab."""

    def __enter__(self) -> "Browser":
        found = binary()
        assert found is not None
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # the browser's own children end a little later
        to_child, self._in = (_high(fd) for fd in os.pipe())
        self._out, from_child = (_high(fd) for fd in os.pipe())

        def place() -> None:
            os.dup2(to_child, 3)
            os.dup2(from_child, 4)

        self.process = subprocess.Popen(
            [found, *FLAGS, f"--user-data-dir={self.home.name}", "about:blank"], preexec_fn=place, pass_fds=(3, 4),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_child)
        os.close(from_child)
        self.number, self.buffer, self.session = 0, b"", ""
        self.seen = Seen()
        page = next(one for one in self.ask("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *reason: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        os.close(self._in)
        os.close(self._out)
        self.home.cleanup()

    def open(self, page: Path, *questions: str, width: int = 1200, height: int = 1000) -> Seen:
        """Open a file and wait until it is loaded; `questions` are expressions for the page, answered in `answers`."""
        self.seen = Seen()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.loaded = False
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not self.loaded:
            self._hear(self._message())
        self.seen.answers = [self.ask("Runtime.evaluate", expression=text, returnByValue=True)["result"].get("value") for text in questions]
        self.seen.png = base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
        return self.seen

    def ask(self, method: str, **parameters: Any) -> Any:
        """Send a command and return its result."""
        self.number += 1
        order: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session and not method.startswith("Target."):
            order["sessionId"] = self.session
        os.write(self._in, json.dumps(order).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self._hear(message)

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.buffer:
            assert select.select([self._out], [], [], max(0.0, end - time.monotonic()))[0], "the browser does not answer"
            piece = os.read(self._out, 1 << 20)
            assert piece, "the browser has gone"
            self.buffer += piece
        text, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(text))

    def _hear(self, message: dict[str, Any]) -> None:
        method, told = message.get("method", ""), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.seen.requests.append(told["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.seen.complaints.append(json.dumps(told))
        elif method == "Page.javascriptDialogOpening":
            self.seen.dialogs.append(told["message"])
            self.number += 1
            order = {"id": self.number, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}, "sessionId": self.session}
            os.write(self._in, json.dumps(order).encode() + b"\0")
        elif method == "Page.loadEventFired":
            self.loaded = True


def _high(descriptor: int) -> int:
    """The same pipe under a number that is not in the way of 3 and 4."""
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return high


def main(arguments: list[str]) -> int:
    """Take a picture of a page."""
    page, picture, *size = arguments
    width, height = [*map(int, size), *(1200, 1000)[len(size) :]]
    with Browser() as browser:
        Path(picture).write_bytes(browser.open(Path(page), width=width, height=height).png)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
