"""TrainState <-> folder: atomic, hashed, readable without pickle.

    checkpoints/
      step-000120/
        trainables.safetensors     further parts of a large state: trainables-2.safetensors ...
        optimizer.safetensors
        rng.safetensors
        state.json                 Progress
        MANIFEST.json              written last: format version, step, every file's size and sha256, the run's identity, its own sha256
      LATEST                       name of the newest; a hint for people, never read back: the valid manifests are the truth

A save builds `.tmp-...` beside its target, syncs every file, the manifest last, then the folder; renames it; syncs the parent; reads
everything back.  A crash at any point leaves the old checkpoints as they were and at most a `.tmp-`, `.old-` or `.del-` folder, which
`rotation.clean` finishes at the next start.  A reader holds a shared flock on the checkpoint's folder.

Not here: which checkpoints to keep (rotation.py), what to do when a save fails (saver.py).
Sources: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014; https://lwn.net/Articles/752063/ on failed fsyncs.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from halfbyte.errors import CheckpointError, NumericError, StorageError
from halfbyte.train import durable_files as durable
from halfbyte.train.state import Progress, TrainState

VERSION = 1
PART_BYTES = 64 << 20
STAGING, ASIDE, DOOMED = ".tmp-", ".old-", ".del-"
TENSOR_GROUPS = ("trainables", "optimizer", "rng")
_STEP_NAME = re.compile(r"step-(\d{6,})")
_FILE_NAME = re.compile(r"[a-z0-9-]+\.(safetensors|json)")


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every byte agrees with its manifest."""

    step: int
    path: Path
    identity: dict[str, object]
    written_by: str


@dataclass(frozen=True)
class Skipped:
    """A folder that looks like a checkpoint and cannot be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Scan:
    """What a checkpoints folder holds: `valid` newest first, and what was `skipped`, newest first."""

    valid: list[Found]
    skipped: list[Skipped]


@dataclass(frozen=True)
class Loaded:
    """A state, where it came from, and lines to print: which newer checkpoints were skipped and why."""

    state: TrainState
    path: Path
    notes: list[str]


def step_name(step: int) -> str:
    """
    >>> step_name(120)
    'step-000120'
    """
    return f"step-{step:06d}"


def save(folder: Path, state: TrainState, *, verify: bool = True) -> Path:
    """Write `state` durably as `folder/step-<step>` and return that path; the folder's parent must exist.

    Deletes nothing but a checkpoint of the very same step, which stays until the new one is in place.
    Raises NumericError for a non-finite trainable or optimizer tensor (nothing is written), and StorageError, with the OSError
    as its __cause__, when the file system refuses; then the checkpoints that were there are untouched.
    """
    require_finite(state)
    staging = folder / f"{STAGING}{step_name(state.progress.step)}-{os.getpid()}-{secrets.token_hex(4)}"
    target = folder / step_name(state.progress.step)
    try:
        if not folder.is_dir():
            durable.make_folder(folder)
            durable.sync_folder(folder.parent)
        durable.require_space(folder, state_bytes(state))
        durable.make_folder(staging)
        _write_all(staging, state)
        _promote(staging, target)
        if verify:
            _verify(target)
        _point_to(target)
    except OSError as error:
        raise storage_error(error, target) from error
    finally:
        if staging.is_dir():
            durable.remove(staging)
    return target


def scan(folder: Path) -> Scan:
    """Check every checkpoint in `folder` byte by byte.  Raises StorageError when the folder itself may not be read."""
    valid: list[Found] = []
    skipped: list[Skipped] = []
    for path in _candidates(folder):
        try:
            manifest = _check(path)
        except CheckpointError as error:
            skipped.append(Skipped(path, error.found))
        else:
            valid.append(Found(manifest["step"], path, manifest["identity"], manifest["written_by"]))
    return Scan(valid, skipped)


def load_newest(folder: Path) -> Loaded:
    """The newest valid checkpoint in `folder`, read and checked.  Compare its identity with `identity.require_same` before restoring.

    Raises CheckpointError naming every candidate with its reason when none is valid, and when there is none at all.
    """
    notes: list[str] = []
    for path in _candidates(folder):
        try:
            return Loaded(load(path), path, notes)
        except CheckpointError as error:
            notes.append(f"{path.name} was skipped: {error.found}")
    if notes:
        raise CheckpointError("a run can only go on from a checkpoint that is whole", code="E-CKPT-001", place=str(folder), found="\n".join(notes),
                              remedy="restore one of these from a backup, or start a new run", nothing_done="Nothing was trained.")
    foreign = sorted(path.name for path in folder.parent.glob("checkpoint-*") if (path / "trainer_state.json").exists())
    if foreign:
        raise CheckpointError(
            "a checkpoint of transformers' Trainer cannot be resumed here", code="E-CKPT-005", place=str(folder.parent), found=", ".join(foreign),
            remedy="export its adapter with PEFT's save_pretrained and start a new run from it, or go on with the program that wrote it",
            nothing_done="Nothing was trained.")
    raise CheckpointError("there is no checkpoint to go on from", code="E-CKPT-004", place=str(folder), found="no step-... folder",
                          remedy="start the run without resume", nothing_done="Nothing was trained.")


def load(path: Path) -> TrainState:
    """Read one checkpoint; every byte that is used was hashed first.  Raises CheckpointError with the reason as its `found`."""
    with reading(path):
        manifest, contents = _read(path)
        tensors: dict[str, dict[str, Tensor]] = {group: {} for group in TENSOR_GROUPS}
        for name, content in contents.items():
            if name != "state.json":
                group = name.removesuffix(".safetensors").partition("-")[0]
                tensors[group] |= _tensors(path, name, content)
        values = json.loads(contents["state.json"])
        try:
            progress = Progress.from_json(values)
        except CheckpointError as error:
            raise unusable(path, f"state.json: {error.found}") from error
        return TrainState(progress=progress, identity=manifest["identity"], **tensors)


def require_finite(state: TrainState) -> None:
    """Raise NumericError naming the first tensor with a NaN or infinity, and how many values; such a state is never saved."""
    for group, tensors in (("trainable", state.trainables), ("optimizer", state.optimizer)):
        for name, tensor in tensors.items():
            bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
            if bad:
                raise NumericError(
                    "a checkpoint holds finite numbers only", code="E-NUM-020", place=f"{group} tensor {name}, step {state.progress.step}",
                    found=f"{bad} of {tensor.numel()} values are NaN or infinite",
                    remedy="lower the learning rate and resume from the last checkpoint, which is sound",
                )


def state_bytes(state: TrainState) -> int:
    """Bytes a checkpoint of this state takes on disk, headers estimated from above."""
    groups = (state.trainables, state.optimizer, state.rng)
    return sum(tensor.numel() * tensor.element_size() + 256 + len(name) for group in groups for name, tensor in group.items()) + (64 << 10)


def storage_error(error: OSError, place: Path) -> StorageError:
    """The OSError of a failed save as a StorageError; the caller raises it from the OSError."""
    return StorageError(
        "a checkpoint must reach the disk", code="E-STORE-001", place=str(place), found=f"{error.strerror or error} ({error.filename or 'no file named'})",
        remedy="free space, restore access to the folder, or choose another --out; the checkpoints already there are untouched",
    )


def unusable(path: Path, reason: str) -> CheckpointError:
    """A checkpoint that may not be used, with the reason as its `found`."""
    return CheckpointError("a checkpoint must be whole", code="E-CKPT-010", place=str(path), found=reason,
                           remedy="remove it or restore it from a backup; the newest whole one is used")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Hold a shared lock on a checkpoint's folder, so that rotation leaves it alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise unusable(path, f"it is not a folder: {error.strerror}") from error
    except PermissionError as error:
        raise storage_error(error, path) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _parts(group: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of the safetensors files of one group, each about PART_BYTES, so that memory stays bounded."""
    part: dict[str, Tensor] = {}
    size, number = 0, 1
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", copy=True).contiguous()
        if part and size + tensor.nbytes > PART_BYTES:
            yield _part_name(group, number), safetensors.torch.save(part)
            part, size, number = {}, 0, number + 1
        part[name] = tensor
        size += tensor.nbytes
    yield _part_name(group, number), safetensors.torch.save(part)


def _part_name(group: str, number: int) -> str:
    return f"{group}.safetensors" if number == 1 else f"{group}-{number}.safetensors"


def _write_all(staging: Path, state: TrainState) -> None:
    """Every file of a checkpoint, the manifest last, all durable."""
    files: dict[str, dict[str, object]] = {}

    def add(name: str, content: bytes) -> None:
        files[name] = {"bytes": len(content), "sha256": durable.create(staging / name, content)}

    for group in TENSOR_GROUPS:
        for name, content in _parts(group, getattr(state, group)):
            add(name, content)
    add("state.json", _canonical(state.progress.to_json()))
    manifest = {
        "format": "halfbyte-checkpoint", "version": VERSION, "step": state.progress.step, "tokens_seen": state.progress.tokens_seen,
        "files": files, "identity": state.identity, "rng": sorted(state.rng),
        "written_by": f"halfbyte {importlib.metadata.version('halfbyte')}, torch {torch.__version__}",
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    durable.create(staging / "MANIFEST.json", _canonical(manifest | {"manifest_sha256": _sha256(_canonical(manifest))}))
    durable.sync_folder(staging)


def _promote(staging: Path, target: Path) -> None:
    """Give the staging folder its name.  A checkpoint of the same step is moved aside first and removed after."""
    aside = target.parent / f"{ASIDE}{target.name}-{secrets.token_hex(4)}"
    if target.is_symlink() or target.is_file():
        raise FileExistsError(17, "a file or link stands where the checkpoint belongs", str(target))
    replaces = target.is_dir()
    if replaces:
        durable.rename(target, aside)
    try:
        durable.rename(staging, target)
    except OSError:
        if replaces and not target.exists():
            durable.rename(aside, target)
        raise
    if replaces:
        durable.remove(aside)


def _verify(target: Path) -> None:
    """Read everything back.  A checkpoint that does not read as written is taken out of sight and reported as an I/O error."""
    try:
        _check(target)
    except CheckpointError as error:
        durable.rename(target, target.parent / f"{DOOMED}{target.name}-{secrets.token_hex(4)}")
        raise OSError(5, f"what was written does not read back: {error.found}", str(target)) from error


def _point_to(target: Path) -> None:
    """Let LATEST name the newest checkpoint."""
    new = target.parent / f"{STAGING}LATEST-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        durable.create(new, f"{target.name}\n".encode())
        durable.rename(new, target.parent / "LATEST")
    finally:
        if new.exists():
            durable.remove(new)


def _candidates(folder: Path) -> list[Path]:
    """Folders to consider, newest step first; one moved aside by a save that was cut off comes after the one in its place."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error(error, folder) from error
    rated = []
    for name in names:
        shown = name.removeprefix(ASIDE)
        match = _STEP_NAME.match(shown) if shown != name else _STEP_NAME.fullmatch(name)
        if match:
            rated.append((int(match[1]), shown == name, name))
    return [folder / name for _, _, name in sorted(rated, reverse=True)]


def _check(path: Path) -> dict:
    """The manifest of a checkpoint whose files all agree with it.  Raises CheckpointError with the reason as its `found`."""
    with reading(path):
        return _read(path, keep=False)[0]


def _read(path: Path, keep: bool = True) -> tuple[dict, dict[str, bytes]]:
    """Manifest and, with `keep`, the contents of all files, after every size and hash agreed."""
    manifest = _manifest(path)
    contents = {}
    for name, entry in manifest["files"].items():
        content = _bytes(path, name)
        if len(content) != entry["bytes"]:
            raise unusable(path, f"{name} has {len(content):,} bytes, its manifest says {entry['bytes']:,}")
        if _sha256(content) != entry["sha256"]:
            raise unusable(path, f"{name} does not have the sha256 of its manifest: its bytes were changed")
        if keep:
            contents[name] = content
    return manifest, contents


def _manifest(path: Path) -> dict:
    """MANIFEST.json, checked against its own hash, this program's version and the folder's name."""
    content = _bytes(path, "MANIFEST.json")
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise unusable(path, f"MANIFEST.json is not JSON: {error}") from error
    if not isinstance(manifest, dict) or _canonical(manifest) != content:
        raise unusable(path, "MANIFEST.json was changed: it is not in the form this program writes")
    claimed = manifest.pop("manifest_sha256", None)
    if claimed != _sha256(_canonical(manifest)):
        raise unusable(path, "MANIFEST.json does not have its own sha256: its bytes were changed")
    if manifest.get("format") != "halfbyte-checkpoint" or manifest.get("version") != VERSION:
        raise unusable(path, f"its format is {manifest.get('format')} version {manifest.get('version')}, this program reads version {VERSION}")
    match = _STEP_NAME.match(path.name.removeprefix(ASIDE))
    if match is None or int(match[1]) != manifest["step"]:
        raise unusable(path, f"the folder's name does not agree with its manifest, which is of step {manifest['step']}")
    needed = {f"{group}.safetensors" for group in TENSOR_GROUPS} | {"state.json"}
    if not needed <= set(manifest["files"]) or not all(_FILE_NAME.fullmatch(name) for name in manifest["files"]):
        raise unusable(path, "MANIFEST.json does not list the files of a checkpoint")
    return manifest


def _bytes(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
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


def _canonical(values: Mapping[str, object]) -> bytes:
    """One byte form per value, so that any changed byte shows."""
    return (json.dumps(values, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
