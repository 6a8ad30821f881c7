"""One writer per run folder: an flock on `run.lock`, which the kernel gives up when the process ends, however it ends.

The file also says who holds it (pid, boot id, host), for the message to a second process.  A data worker forked from a killed run
may hold the lock for a few seconds more; so when the owner is dead or unknown the lock is waited for.
"""

import fcntl
import json
import os
import platform
import time
from pathlib import Path
from types import TracebackType

from halfbyte.errors import CheckpointError
from halfbyte.train.manifest import storage_error

WAIT_SECONDS = 15.0


class RunLock:
    """Context manager: this process is the only writer of `folder` (which must exist) inside it.

    Raises CheckpointError naming the other process, and StorageError when the lock file cannot be made.
    """

    def __init__(self, folder: Path, wait_seconds: float = WAIT_SECONDS) -> None:
        self.path = folder / "run.lock"
        self.wait_seconds = wait_seconds
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise storage_error(error, self.path) from error
        end = time.monotonic() + self.wait_seconds
        while not self._try():
            owner = read_owner(self.path)
            if (owner and is_alive(owner)) or time.monotonic() > end:
                self._close()
                raise CheckpointError(
                    "a run folder has one writer", code="E-CKPT-003", place=str(self.path.parent),
                    found=f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown machine')} is training here",
                    remedy="wait for it, stop it, or train with another --out", nothing_done="Nothing was trained.",
                )
            time.sleep(0.05)
        owner_text = json.dumps({"pid": os.getpid(), "boot_id": boot_id(), "host": platform.node()}) + "\n"
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, owner_text.encode(), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing alone would leave it to data workers that inherited the file
        self._close()

    def _try(self) -> bool:
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def boot_id() -> str:
    """A text that changes at every start of the machine; empty where the system does not tell."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def read_owner(path: Path) -> dict[str, object]:
    """What a lock file says about its holder; empty when it says nothing readable."""
    try:
        values = json.loads(path.read_text())
    except (ValueError, FileNotFoundError):
        return {}
    return values if isinstance(values, dict) else {}


def is_alive(owner: dict[str, object]) -> bool:
    """True unless the owner is known to be gone: another boot of this machine, or no such process."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or owner.get("host") != platform.node():
        return True
    if owner.get("boot_id") != boot_id():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
