"""A new folder for what is exported: refused when something is there, checked before any work is done."""

from pathlib import Path

from halfbyte.errors import StorageError


def require_new(out: Path) -> Path:
    """`out`, which must not exist or be an empty folder.  Raises StorageError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(
            "an export never overwrites",
            code="E-STORE-081",
            place=str(out),
            found="a file" if not out.is_dir() else "a folder with files in it",
            expected="a new or an empty folder",
            remedy="name another folder with --out",
            nothing_done="Nothing was written.",
        )
    return out


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
