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

Not here: the files of one checkpoint (manifest.py), which to keep (rotation.py), what to do when a save fails (saver.py).
Sources: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014,
https://www.usenix.org/conference/osdi14/technical-sessions/presentation/pillai; https://lwn.net/Articles/752063/ on failed fsyncs.
"""

import errno
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfbyte import log
from halfbyte.errors import CheckpointError, NumericError
from halfbyte.train import durable_files as durable
from halfbyte.train import manifest
from halfbyte.train.manifest import ASIDE, STEP_NAME, storage_error
from halfbyte.train.state import TrainState

STAGING, DOOMED = ".tmp-", ".del-"


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
        manifest.write(staging, state)
        _promote(staging, target)
        if verify:
            _verify(target)
        _point_to(target)
    except OSError as error:
        raise storage_error(error, target) from error
    finally:
        _sweep(staging)
    return target


def scan(folder: Path) -> Scan:
    """Check every checkpoint in `folder` byte by byte.  Raises StorageError when something may not be read at all."""
    valid: list[Found] = []
    skipped: list[Skipped] = []
    for path in _candidates(folder):
        try:
            found = manifest.check(path)
        except CheckpointError as error:
            skipped.append(Skipped(path, error.found))
        else:
            valid.append(Found(found.step, path, found.identity, found.written_by))
    return Scan(valid, skipped)


def load(path: Path) -> TrainState:
    """Read one checkpoint; every byte that is used was hashed first.  Raises CheckpointError with the reason as its `found`."""
    return manifest.read(path)


def load_trainables(path: Path) -> dict[str, Tensor]:
    """The trained tensors of one checkpoint alone, hashed first.  Raises CheckpointError."""
    return manifest.read_group(path, "trainables")


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
    raise _none_valid(folder, notes)


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


def _none_valid(folder: Path, notes: list[str]) -> CheckpointError:
    """The error for a folder without a usable checkpoint, by what it holds instead."""
    nothing = "Nothing was trained."
    if notes:
        return CheckpointError(
            "a run can only go on from a checkpoint that is whole", code="E-CKPT-001", place=str(folder), found="\n".join(notes),
            remedy="restore one of these from a backup, or start a new run", nothing_done=nothing,
        )
    foreign = sorted(path.name for path in folder.parent.glob("checkpoint-*") if (path / "trainer_state.json").exists())
    if foreign:
        return CheckpointError(
            "a checkpoint of transformers' Trainer cannot be resumed here", code="E-CKPT-005", place=str(folder.parent),
            found=", ".join(foreign), remedy="go on with the program that wrote it, or start a new run", nothing_done=nothing,
        )
    return CheckpointError(
        "there is no checkpoint to go on from", code="E-CKPT-004", place=str(folder), found="no step-... folder",
        remedy="start the run without resume", nothing_done=nothing,
    )


def _promote(staging: Path, target: Path) -> None:
    """Give the staging folder its name.  A checkpoint of the same step is moved aside first and removed after."""
    aside = target.parent / f"{ASIDE}{target.name}-{secrets.token_hex(4)}"
    if target.is_symlink() or target.is_file():
        raise FileExistsError(errno.EEXIST, "a file or link stands where the checkpoint belongs", str(target))
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
        manifest.check(target)
    except CheckpointError as error:
        durable.rename(target, target.parent / f"{DOOMED}{target.name}-{secrets.token_hex(4)}")
        raise OSError(errno.EIO, f"what was written does not read back: {error.found}", str(target)) from error


def _point_to(target: Path) -> None:
    """Let LATEST name the newest checkpoint."""
    new = target.parent / f"{STAGING}LATEST-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        durable.create(new, f"{target.name}\n".encode())
        durable.rename(new, target.parent / "LATEST")
    finally:
        _sweep(new)


def _sweep(leftover: Path) -> None:
    """Remove what a failed save leaves.  Where even that fails the save's own error is the one to show; the next start tries again."""
    try:
        if leftover.exists():
            durable.remove(leftover)
    except OSError as error:
        log.logger().warning("%s was left behind (%s); the next start removes it", leftover.name, error.strerror)


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
        match = STEP_NAME.match(shown) if shown != name else STEP_NAME.fullmatch(name)
        if match:
            rated.append((int(match[1]), shown == name, name))
    return [folder / name for _, _, name in sorted(rated, reverse=True)]
