"""Checkpoints as the loop uses them: one object per run that locks, cleans, saves, rotates, and bears with a disk that is full.

    full disk or quota      the run goes on, the next save tries again; the third failure in a row ends the run
    I/O error               once more at once, into new files; then as above
    anything else           ends the run at once: no access, read-only, folder gone, name too long
"""

import errno
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from halfbyte import log
from halfbyte.errors import StorageError
from halfbyte.train import checkpoint, rotation
from halfbyte.train.checkpoint import Loaded
from halfbyte.train.identity import require_same
from halfbyte.train.run_lock import RunLock
from halfbyte.train.state import TrainState

BORNE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
FAILURES_ALLOWED = 3


class Saver:
    """The checkpoints of one run folder, which must exist; a context manager that holds the run's lock.

        with Saver(out, keep=2, verify=True) as saver:
            loaded = saver.load_newest(identity)      # only on resume
            ...
            saver.save(capture(model, optimizer, progress, identity))

    folder         <run>/checkpoints
    save_seconds   smoothed duration of a save: the grace a signal needs
    last_saved     step of the newest checkpoint this object wrote or loaded, None before
    """

    def __init__(self, run_folder: Path, *, keep: int = 2, verify: bool = True) -> None:
        self.folder = run_folder / "checkpoints"
        self.keep, self.verify = keep, verify
        self.failures = 0
        self.save_seconds: float | None = None
        self.last_saved: int | None = None
        self._lock = RunLock(run_folder)

    def __enter__(self) -> "Saver":
        self._lock.__enter__()
        try:
            for note in rotation.clean(self.folder):
                log.logger().info(note)
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.__exit__(kind, error, trace)

    def save(self, state: TrainState) -> Path | None:
        """Save, then rotate (the best step of `state.progress` stays); the checkpoint, or None when the disk refused and the run may go on.

        Raises StorageError at the third refusal in a row or when trying again is pointless, NumericError for non-finite tensors.
        """
        began = time.monotonic()
        try:
            path = self._save_once_more_on_io_error(state)
        except StorageError as error:
            self._bear(error)
            return None
        took = time.monotonic() - began
        self.save_seconds = took if self.save_seconds is None else 0.5 * (self.save_seconds + took)
        self.last_saved = state.progress.step
        try:
            rotation.rotate(self.folder, keep=self.keep, best_step=state.progress.best_step)
        except StorageError as error:
            self._bear(error)
        else:
            self.failures = 0
        return path

    def load_newest(self, identity: Mapping[str, object]) -> Loaded:
        """The newest valid checkpoint of this run; says which newer ones were skipped.

        Raises CheckpointError when none is valid, or when it belongs to another run.
        """
        loaded = checkpoint.load_newest(self.folder)
        for note in loaded.notes:
            log.logger().warning(note)
        require_same(loaded.state.identity, identity, str(loaded.path))
        self.last_saved = loaded.state.progress.step
        return loaded

    def _save_once_more_on_io_error(self, state: TrainState) -> Path:
        try:
            return checkpoint.save(self.folder, state, verify=self.verify)
        except StorageError as error:
            if _number(error) != errno.EIO:
                raise
            log.logger().warning("saving met an I/O error, trying once more with new files: %s", error.found)
        return checkpoint.save(self.folder, state, verify=self.verify)

    def _bear(self, error: StorageError) -> None:
        """Count a failed save; raise when there is no use in going on."""
        if _number(error) not in BORNE:
            raise error
        self.failures += 1
        if self.failures >= FAILURES_ALLOWED:
            last = "No checkpoint was saved." if self.last_saved is None else f"The last checkpoint is of step {self.last_saved}."
            raise StorageError(
                "a run whose checkpoints cannot be saved does not go on", code="E-STORE-002", place=error.place, found=error.found,
                expected=f"at most {FAILURES_ALLOWED - 1} failed saves in a row", remedy=error.remedy,
                nothing_done=last,
            ) from error
        log.logger().warning(
            "the checkpoint could not be saved (%s); training goes on and the next save tries again (%d of %d failures)",
            error.found, self.failures, FAILURES_ALLOWED,
        )


def _number(error: StorageError) -> int | None:
    cause = error.__cause__
    return cause.errno if isinstance(cause, OSError) else None
