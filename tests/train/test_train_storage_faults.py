"""Full disks, read-only folders, I/O errors, changed bytes: never a false success, and the last checkpoint is always whole."""

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte.errors import StorageError
from halfbyte.train import checkpoint, durable_files
from halfbyte.train.saver import Saver
from tests.train.checkpoint_samples import leftovers, newest_valid, require_is, restart, state_at

ERRNOS = ("ENOSPC", "EIO", "EDQUOT", "EACCES", "EROFS", "ENAMETOOLONG")


@pytest.mark.parametrize("name", ERRNOS)
@pytest.mark.parametrize("lasting", [False, True])
def test_an_error_at_every_call_is_never_called_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lasting: bool) -> None:
    """For every call of a save: it raises StorageError and the old checkpoint is whole, or it returns and the new one is."""
    refused = 0
    for count in range(1, 100):
        folder = tmp_path / str(count) / "checkpoints"
        folder.parent.mkdir()
        checkpoint.save(folder, state_at(1))
        monkeypatch.setenv("HALFBYTE_FAULTS", f"checkpoint.*:{name}:{count}{'+' if lasting else ''}")
        try:
            checkpoint.save(folder, state_at(2))
        except StorageError as error:
            refused += 1
            assert error.exit_code == 5 and os.strerror(getattr(errno, name)) in error.found
            assert isinstance(error.__cause__, OSError)
            require_is(checkpoint.load(folder / "step-000001"), 1)
            done = False
        else:
            require_is(checkpoint.load_newest(folder).state, 2)
            done = True
        monkeypatch.delenv("HALFBYTE_FAULTS")
        restart(folder.parent)
        if done:
            break
        if not lasting:
            assert (folder / "step-000002").exists() or leftovers(folder) == []
    assert refused >= 20


def test_a_full_disk_is_borne_twice_and_the_third_time_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Saver(tmp_path) as saver:
        assert saver.save(state_at(1)) is not None
        monkeypatch.setenv("HALFBYTE_FAULTS", "checkpoint.write:ENOSPC:*")
        assert saver.save(state_at(2)) is None and saver.save(state_at(3)) is None
        with pytest.raises(StorageError) as caught:
            saver.save(state_at(4))
        assert caught.value.code == "E-STORE-002" and "The last checkpoint is of step 1." in str(caught.value)
        assert newest_valid(tmp_path) == 1 and leftovers(saver.folder) == []


def test_a_save_that_succeeds_starts_the_count_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Saver(tmp_path) as saver:
        for step in range(1, 10):
            monkeypatch.setenv("HALFBYTE_FAULTS", "" if step % 3 == 0 else "checkpoint.write:ENOSPC:*")
            assert (saver.save(state_at(step)) is not None) == (step % 3 == 0)
    assert newest_valid(tmp_path) == 9


def test_too_little_space_is_seen_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable_files, "free_bytes", lambda folder: 5_000)
    with pytest.raises(StorageError) as caught:
        checkpoint.save(tmp_path / "checkpoints", state_at(1))
    assert "5,000 are free" in caught.value.found and os.listdir(tmp_path / "checkpoints") == []


def test_the_space_wanted_is_the_space_used(tmp_path: Path) -> None:
    state = state_at(1, width=200)
    path = checkpoint.save(tmp_path / "checkpoints", state)
    used = sum(entry.stat().st_size for entry in path.iterdir())
    assert used <= checkpoint.state_bytes(state) <= 1.2 * used + (64 << 10)


def test_one_io_error_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_FAULTS", "checkpoint.fsync:EIO:1")
    with Saver(tmp_path) as saver:
        assert saver.save(state_at(1)) is not None and saver.failures == 0
    require_is(checkpoint.load_newest(saver.folder).state, 1)


def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:100]))
    checkpoint.save(tmp_path / "checkpoints", state_at(1), verify=False)
    monkeypatch.undo()
    require_is(checkpoint.load_newest(tmp_path / "checkpoints").state, 1)


def test_a_file_whose_sync_failed_is_never_synced_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the kernel may call lost bytes clean; so each file is synced once, and a new attempt has new files."""
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append(path)
        if len(synced) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with Saver(tmp_path) as saver:
        assert saver.save(state_at(1)) is not None
    files = [path for path in synced if path.endswith((".safetensors", ".json"))]
    assert len(files) == len(set(files)) and len({Path(path).parent for path in files}) == 2


@pytest.mark.parametrize("name", ["EACCES", "EROFS", "ENAMETOOLONG"])
def test_an_error_that_waiting_does_not_cure_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HALFBYTE_FAULTS", f"checkpoint.mkdir:{name}:*")
    with Saver(tmp_path) as saver, pytest.raises(StorageError) as caught:
        saver.save(state_at(1))
    assert os.strerror(getattr(errno, name)) in caught.value.found and caught.value.exit_code == 5


def test_a_file_or_link_where_a_folder_belongs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StorageError):
        checkpoint.save(tmp_path / "checkpoints", state_at(1))
    (tmp_path / "checkpoints").unlink()
    for make in (lambda path: path.write_text("mine"), lambda path: path.symlink_to(tmp_path)):
        target = tmp_path / "checkpoints" / "step-000001"
        target.parent.mkdir(exist_ok=True)
        make(target)
        with pytest.raises(StorageError, match="a file or link stands where the checkpoint belongs"):
            checkpoint.save(target.parent, state_at(1))
        assert leftovers(target.parent) == []
        target.unlink()


def test_a_folder_that_vanished_is_an_error(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with Saver(run) as saver:
        saver.save(state_at(1))
        shutil.rmtree(run)
        with pytest.raises(StorageError, match="No such file or directory"):
            saver.save(state_at(2))


def test_a_folder_that_may_not_be_read_is_an_error_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "checkpoints", state_at(1))

    def refuse(path: Path, *mode: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        checkpoint.load_newest(tmp_path / "checkpoints")


# --- real file systems ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB; skipped where this user may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    with Saver(small_disk, keep=1) as saver:
        assert saver.save(state_at(1, width=200)) is not None
        (small_disk / "filler").write_bytes(bytes(700_000))
        assert saver.save(state_at(2, width=200)) is None
        (small_disk / "filler").unlink()
        assert saver.save(state_at(3, width=200)) is not None
        assert newest_valid(small_disk) == 3 and leftovers(saver.folder) == []


def test_a_disk_that_fills_while_a_save_writes(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable_files, "require_space", lambda folder, needed: None)
    with Saver(small_disk, keep=1) as saver:
        assert saver.save(state_at(1, width=200)) is not None
        (small_disk / "filler").write_bytes(bytes(700_000))
        assert saver.save(state_at(2, width=200)) is None
        assert newest_valid(small_disk) == 1 and leftovers(saver.folder) == []


def test_a_disk_that_is_really_read_only(small_disk: Path) -> None:
    with Saver(small_disk, keep=1) as saver:
        assert saver.save(state_at(1)) is not None
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    require_is(checkpoint.load_newest(small_disk / "checkpoints").state, 1)
    with pytest.raises(StorageError, match="Read-only file system"):
        checkpoint.save(small_disk / "checkpoints", state_at(2))
    with pytest.raises(StorageError, match="Read-only file system"):
        Saver(small_disk).__enter__()


# --- changed bytes ----------------------------------------------------------------------------------------------------------------


def corruptions(tmp_path: Path, flips: int, cuts: int, seed: int = 0) -> dict[str, int]:
    """Flip single bits and cut files of the newest checkpoint, one at a time; counts of those that were found out."""
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, state_at(1))
    newest = checkpoint.save(folder, state_at(2))
    files = {path: path.read_bytes() for path in newest.iterdir()}
    rng = random.Random(seed)
    found = {"flips": 0, "flips_found": 0, "cuts": 0, "cuts_found": 0}
    for number in range(flips + cuts):
        path = rng.choice(sorted(files))
        content = bytearray(files[path])
        kind = "flips" if number < flips else "cuts"
        if kind == "flips":
            bit = rng.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
        else:
            content = content[: rng.randrange(len(content))]
        path.write_bytes(content)
        loaded = checkpoint.load_newest(folder)
        found[kind] += 1
        told = len(loaded.notes) == 1 and loaded.notes[0].startswith("step-000002 was skipped: ")
        found[f"{kind}_found"] += loaded.state.progress.step == 1 and told
        path.write_bytes(files[path])
    require_is(checkpoint.load_newest(folder).state, 2)
    return found


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    assert corruptions(tmp_path, 400, 60) == {"flips": 400, "flips_found": 400, "cuts": 60, "cuts_found": 60}


@pytest.mark.slow
def test_2000_flipped_bits_and_300_cuts_are_found(tmp_path: Path) -> None:
    assert corruptions(tmp_path, 2000, 300) == {"flips": 2000, "flips_found": 2000, "cuts": 300, "cuts_found": 300}


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    path = checkpoint.save(folder, state_at(1)) / "MANIFEST.json"
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 3):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert checkpoint.scan(folder).valid == [], f"bit {bit}"
