"""What a study reads and must not change under it, as plain values: by its contents, for a path says nothing about them.

A name that is no path here (starter, a hub id) says itself which model it is.
"""

import hashlib

from halfbyte import env
from halfbyte.models.calibrated_base import START
from halfbyte.models.source import file_digest, folder_digest


def digests_of(*paths: str | None) -> dict[str, str]:
    """{path: sha256} of the files and folders among them: templates and general text, read as a whole."""
    found = {}
    for path in sorted({path for path in paths if path}):
        place, digest = env.at_home(path), hashlib.sha256()
        files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
        for file in files:
            digest.update(file.read_bytes())
        if files:
            found[path] = digest.hexdigest()
    return found


def models_of(*names: str) -> dict[str, str]:
    """{path: digest} of the models that lie here: of a file, or of a folder and of its low-rank start (see `folder_digest`)."""
    found: dict[str, str] = {}
    for name in sorted(set(names)):
        place = env.at_home(name)
        found |= {str(folder): folder_digest(folder) for folder in (place, place / START) if folder.is_dir()}
        found |= {str(place): file_digest(place)} if place.is_file() else {}
    return found
