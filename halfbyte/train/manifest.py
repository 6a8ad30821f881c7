"""The files of one checkpoint folder: written once each, listed with size and sha256 in MANIFEST.json, and read only where both agree.

MANIFEST.json is JSON in one fixed form (sorted keys, one space of indent) and carries the sha256 of itself without that field; so any
changed byte of any file of a checkpoint shows.  Tensors are safetensors, numbers are JSON: nothing that is read can run code.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from halfbyte.errors import CheckpointError, StorageError
from halfbyte.formats.safetensors_io import pieces
from halfbyte.train import durable_files as durable
from halfbyte.train.state import Progress, TrainState

FORMAT, VERSION = "halfbyte-checkpoint", 1
PART_BYTES = 64 << 20
MANIFEST_LIMIT = 16 << 20
TENSOR_GROUPS = ("trainables", "optimizer", "rng")
ASIDE = ".old-"
STEP_NAME = re.compile(r"step-(\d{6,})")
_FILE_NAME = re.compile(r"(trainables|optimizer|rng)(-\d+)?\.safetensors|state\.json")
_FIELDS: dict[str, type] = {
    "format": str, "version": int, "step": int, "tokens_seen": int, "files": dict, "identity": dict, "rng": list, "written_by": str,
    "written_at": str,
}


@dataclass(frozen=True)
class Manifest:
    """The part of MANIFEST.json that is used: `files` is {name: (bytes, sha256)}."""

    step: int
    files: dict[str, tuple[int, str]]
    identity: dict[str, object]
    written_by: str


def storage_error(error: OSError, place: Path) -> StorageError:
    """The OSError of a failed save as a StorageError; the caller raises it from the OSError."""
    return StorageError(
        "the files of a run must be readable and writable", code="E-STORE-001", place=str(place),
        found=f"{error.strerror or error} ({error.filename or 'no file named'})",
        remedy="free space, restore access to the folder, or choose another --out; the checkpoints already there are untouched",
    )


def unusable(path: Path, reason: str) -> CheckpointError:
    """A checkpoint that may not be used, with the reason as its `found`."""
    return CheckpointError(
        "a checkpoint must be whole", code="E-CKPT-010", place=str(path), found=reason,
        remedy="remove it or restore it from a backup; the newest whole one is used",
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Hold a shared lock on a checkpoint's folder, so that rotation leaves it alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise storage_error(error, path) from error
        raise unusable(path, f"it cannot be opened as a folder: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def write(folder: Path, state: TrainState) -> None:
    """Write every file of a checkpoint into an empty folder, the manifest last, and make all of it durable.  Raises OSError."""
    files: dict[str, dict[str, object]] = {}

    def add(name: str, content: bytes | Iterable[bytes | memoryview]) -> None:
        digest = durable.create(folder / name, content)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}

    for group in TENSOR_GROUPS:
        for name, content in _parts(group, getattr(state, group)):
            add(name, content)
    add("state.json", canonical(state.progress.to_json()))
    manifest = {
        "format": FORMAT, "version": VERSION, "step": state.progress.step, "tokens_seen": state.progress.tokens_seen,
        "files": files, "identity": state.identity, "rng": sorted(state.rng),
        "written_by": f"halfbyte {importlib.metadata.version('halfbyte')}, torch {torch.__version__}",
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    durable.create(folder / "MANIFEST.json", canonical(manifest | {"manifest_sha256": sha256(canonical(manifest))}))
    durable.sync_folder(folder)


def check(path: Path) -> Manifest:
    """The manifest of a checkpoint all of whose files agree with it.  Raises CheckpointError with the reason as its `found`."""
    with reading(path):
        manifest = _manifest(path)
        for name, (size, digest) in manifest.files.items():
            _require_same(path, name, size, digest)
        return manifest


def read(path: Path) -> TrainState:
    """Read one checkpoint; every byte that is used was hashed first.  Raises CheckpointError with the reason as its `found`."""
    with reading(path):
        manifest = _manifest(path)
        tensors: dict[str, dict[str, Tensor]] = {group: {} for group in TENSOR_GROUPS}
        for name in manifest.files:
            content = _content(path, name, manifest)
            if name == "state.json":
                progress = _progress(path, content)
            else:
                tensors[_group_of(name)] |= _tensors(path, name, content)
        return TrainState(progress=progress, identity=manifest.identity, **tensors)


def read_group(path: Path, group: str) -> dict[str, Tensor]:
    """One of TENSOR_GROUPS of a checkpoint, hashed first; what is not asked for is not read.  Raises CheckpointError."""
    with reading(path):
        manifest, tensors = _manifest(path), dict[str, Tensor]()
        for name in manifest.files:
            if _group_of(name) == group:
                tensors |= _tensors(path, name, _content(path, name, manifest))
        return tensors


def canonical(values: Mapping[str, object]) -> bytes:
    """One byte form per value, so that any changed byte shows.  Floats keep all their bits; NaN is a ValueError."""
    return (json.dumps(values, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def sha256(content: bytes) -> str:
    """As hex."""
    return hashlib.sha256(content).hexdigest()


def _parts(group: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Iterator[bytes | memoryview]]]:
    """(file name, content) of the safetensors files of one group, each about PART_BYTES, so that reading one stays bounded."""
    part: dict[str, Tensor] = {}
    size, number = 0, 1
    for name in sorted(tensors):
        tensor = tensors[name]
        if part and size + tensor.nbytes > PART_BYTES:
            yield _part_name(group, number), pieces(part)
            part, size, number = {}, 0, number + 1
        part[name] = tensor
        size += tensor.nbytes
    yield _part_name(group, number), pieces(part)


def _part_name(group: str, number: int) -> str:
    return f"{group}.safetensors" if number == 1 else f"{group}-{number}.safetensors"


def _group_of(name: str) -> str:
    return name.removesuffix(".safetensors").partition("-")[0]


def _manifest(path: Path) -> Manifest:
    """MANIFEST.json, checked against its own hash, this program's version and the folder's name."""
    content = _bytes(path, "MANIFEST.json", MANIFEST_LIMIT)
    try:
        values = json.loads(content)
        unchanged = isinstance(values, dict) and canonical(values) == content
    except (ValueError, RecursionError) as error:
        raise unusable(path, f"MANIFEST.json is not the JSON this program writes: {error}") from error
    if not unchanged or values.pop("manifest_sha256", None) != sha256(canonical(values)):
        raise unusable(path, "MANIFEST.json does not have the sha256 it states: its bytes were changed")
    if values.get("format") != FORMAT or values.get("version") != VERSION:
        raise unusable(path, f"its format is {values.get('format')} version {values.get('version')}, this program reads {FORMAT} {VERSION}")
    odd = sorted(name for name, kind in _FIELDS.items() if not isinstance(values.get(name), kind))
    if odd or set(values) != set(_FIELDS):
        raise unusable(path, f"MANIFEST.json lacks or does not know these fields: {odd + sorted(set(values) - set(_FIELDS))}")
    match = STEP_NAME.match(path.name.removeprefix(ASIDE))
    if match is None or int(match[1]) != values["step"]:
        raise unusable(path, f"the folder is named {path.name}, its manifest is of step {values['step']}")
    needed = {_part_name(group, 1) for group in TENSOR_GROUPS} | {"state.json"}
    if not needed <= set(values["files"]) or not all(_FILE_NAME.fullmatch(name) and _is_entry(e) for name, e in values["files"].items()):
        raise unusable(path, "MANIFEST.json does not list the files of a checkpoint")
    files = {name: (entry["bytes"], entry["sha256"]) for name, entry in values["files"].items()}
    return Manifest(values["step"], files, values["identity"], values["written_by"])


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)


def _require_same(path: Path, name: str, size: int, digest: str) -> None:
    """Raise CheckpointError unless a file has this size and hash; reads it piece by piece."""
    with _opened(path, name, size) as file:
        if os.fstat(file.fileno()).st_size != size:
            raise unusable(path, f"{name} has {os.fstat(file.fileno()).st_size:,} bytes, its manifest says {size:,}")
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise unusable(path, f"{name} does not have the sha256 of its manifest: its bytes were changed")


def _content(path: Path, name: str, manifest: Manifest) -> bytes:
    """The bytes of one file, after its size and hash agreed."""
    size, digest = manifest.files[name]
    content = _bytes(path, name, size)
    if len(content) != size:
        raise unusable(path, f"{name} has {len(content):,} bytes, its manifest says {size:,}")
    if sha256(content) != digest:
        raise unusable(path, f"{name} does not have the sha256 of its manifest: its bytes were changed")
    return content


def _bytes(path: Path, name: str, limit: int) -> bytes:
    """A regular file's bytes; one that is longer than `limit` is not read."""
    with _opened(path, name, limit) as file:
        return file.read()


@contextmanager
def _opened(path: Path, name: str, limit: int) -> Iterator[BufferedReader]:
    """A regular file of at most `limit` bytes, to be read; what the system says against it is told as a checkpoint's fault."""
    try:
        status = (path / name).stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise unusable(path, f"{name} is not a regular file of at most {limit:,} bytes")
        with (path / name).open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise unusable(path, f"{name} is missing") from error
    except PermissionError as error:
        raise storage_error(error, path / name) from error
    except OSError as error:
        raise unusable(path, f"{name} cannot be read: {error.strerror}") from error


def _tensors(path: Path, name: str, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise unusable(path, f"{name} is not a safetensors file: {error}") from error


def _progress(path: Path, content: bytes) -> Progress:
    try:
        return Progress.from_json(json.loads(content))
    except ValueError as error:
        raise unusable(path, f"state.json is not JSON: {error}") from error
    except CheckpointError as error:
        raise unusable(path, f"state.json: {error.found}") from error
