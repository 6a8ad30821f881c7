"""File-system steps that survive a crash in the order they were made; each passes a fault point before its system call.

    create a file: open(O_CREAT | O_EXCL), write all, fsync(file), close         its bytes are on the disk
    after creating or renaming: fsync(folder)                                    its name is on the disk

A file is written once and never again: after a failed fsync Linux marks the pages clean, so a second fsync of the same file could
report success for bytes that were lost (https://www.usenix.org/conference/atc20/presentation/rebello).  The caller starts a new file.

Every function raises the OSError of its system call; nothing is swallowed.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from halfbyte.train import faults

CHUNK = 1 << 20


def create(path: Path, content: bytes | Iterable[bytes | memoryview]) -> str:
    """Write a new file durably, whole or piece by piece; the sha256 of what was written, as hex.  Raises FileExistsError."""
    digest = hashlib.sha256()
    faults.point("checkpoint.open")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in (content,) if isinstance(content, bytes) else content:
            for start in range(0, len(piece), CHUNK):
                chunk = memoryview(piece)[start : start + CHUNK]
                digest.update(chunk)
                _write_all(descriptor, chunk, path)
        faults.point("checkpoint.fsync")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _write_all(descriptor: int, chunk: memoryview, path: Path) -> None:
    while chunk:
        faults.point("checkpoint.write")
        written = os.write(descriptor, chunk)
        if written == 0:
            raise OSError(errno.EIO, "the system wrote no byte", str(path))
        chunk = chunk[written:]


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        faults.point("checkpoint.fsync_folder")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder that must not exist yet."""
    faults.point("checkpoint.mkdir")
    os.mkdir(path)


def rename(old: Path, new: Path) -> None:
    """Rename within one folder and make it durable.  A non-empty folder at `new` is an error, a file is replaced."""
    faults.point("checkpoint.rename")
    os.rename(old, new)
    sync_folder(new.parent)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to), or a folder with all it holds."""
    if path.is_symlink() or not path.is_dir():
        faults.point("checkpoint.unlink")
        os.unlink(path)
        return
    for entry in sorted(path.iterdir()):
        remove(entry)
    faults.point("checkpoint.rmdir")
    os.rmdir(path)


def free_bytes(folder: Path) -> int:
    """Bytes this user may still write to the file system of `folder`."""
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError(ENOSPC) with both numbers unless `folder` has room for 1.2 times `needed` bytes."""
    free = free_bytes(folder)
    if free < 1.2 * needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are to be written, 1.2 times that is wanted, {free:,} are free", str(folder))
