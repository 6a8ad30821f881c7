"""Which checkpoints stay: the newest `keep`, the best, and any that somebody is reading; and the cleaning up after a crash.

A victim is first renamed to `.del-...`, so that it is out of sight in one step, then removed file by file.  Both functions want
the run's lock: what they find half done was left by a process that is gone.
"""

import fcntl
import os
import secrets
from pathlib import Path

from halfbyte.train import durable_files as durable
from halfbyte.train.checkpoint import DOOMED, STAGING, scan
from halfbyte.train.manifest import ASIDE, storage_error


def rotate(folder: Path, *, keep: int, best_step: int | None = None) -> list[int]:
    """Remove valid checkpoints beyond the newest `keep` (at least 1) but the one of `best_step`; returns the removed steps.

    Damaged folders are left for a person to look at and do not count.  Call it only after the new checkpoint is durable.
    Raises StorageError.
    """
    removed = []
    for victim in scan(folder).valid[max(keep, 1) :]:
        if victim.step != best_step and not _is_read(victim.path):
            _remove(victim.path)
            removed.append(victim.step)
    return removed


def clean(folder: Path) -> list[str]:
    """Finish what a killed process left: remove `.tmp-` and `.del-`, put back or drop `.old-`; returns a line for each.

    Raises StorageError.
    """
    notes: list[str] = []
    if not folder.is_dir():
        return notes
    try:
        valid = {found.path for found in scan(folder).valid}
        for path in sorted(folder.iterdir()):
            original = folder / path.name.removeprefix(ASIDE).rpartition("-")[0]
            if path.name.startswith((STAGING, DOOMED)):
                durable.remove(path)
                notes.append(f"removed {path.name}, left by a process that was stopped")
            elif path.name.startswith(ASIDE) and path in valid and original not in valid:
                if original.exists():
                    _remove(original)
                durable.rename(path, original)
                notes.append(f"put back {original.name}, whose replacement was not finished")
            elif path.name.startswith(ASIDE):
                _remove(path)
                notes.append(f"removed {path.name}, which was replaced")
    except OSError as error:
        raise storage_error(error, folder) from error
    return notes


def _remove(path: Path) -> None:
    doomed = path.parent / f"{DOOMED}{path.name.lstrip('.')}-{secrets.token_hex(4)}"
    try:
        durable.rename(path, doomed)
        durable.remove(doomed)
    except OSError as error:
        raise storage_error(error, path) from error


def _is_read(path: Path) -> bool:
    """True while another open file holds a lock on the checkpoint's folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


