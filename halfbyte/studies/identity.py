"""What a study reads and must not change under it, as plain values: files by their contents, a model by what tells two of them apart.

A template or general text is small and digested whole.  Weights are not read: of a file of more than WHOLE bytes its size and time of
change stand for it, for a base that was trained on or merged into was written anew.  A name that is no path here (starter, a hub id) says
itself which model it is.
"""

import hashlib
from pathlib import Path

from halfbyte.models.calibrated_base import START

WHOLE = 1 << 20
MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".gguf")
"""What of a model folder is read."""


def digests_of(*paths: str | None) -> dict[str, str]:
    """{path: sha256} of the files and folders among them."""
    found = {}
    for path in sorted({path for path in paths if path}):
        place, digest = Path(path).expanduser(), hashlib.sha256()
        files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
        for file in files:
            digest.update(file.read_bytes())
        if files:
            found[path] = digest.hexdigest()
    return found


def models_of(*names: str) -> dict[str, str]:
    """{file: what tells it from another} of the models that lie here: of a folder and its low-rank start, or of one file."""
    found = {}
    for name in sorted(set(names)):
        place = Path(name).expanduser()
        inside = [file for folder in (place, place / START) if folder.is_dir() for file in sorted(folder.iterdir())]
        for file in [place] if place.is_file() else inside:
            if file.is_file() and file.suffix in MODEL_FILES:
                found[str(file)] = _told(file)
    return found


def _told(file: Path) -> str:
    seen = file.stat()
    if seen.st_size > WHOLE:
        return f"{seen.st_size} bytes of {seen.st_mtime_ns}"
    return f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
