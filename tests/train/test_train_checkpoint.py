"""A checkpoint holds all of a state, is refused when anything about it is not as written, and rotation keeps what must stay."""

import json
import os
import random
import shutil
import struct
from pathlib import Path

import numpy
import pytest
import torch

from halfbyte.errors import CheckpointError, NumericError, StorageError
from halfbyte.train import checkpoint, manifest, rotation
from halfbyte.train.identity import FREE_TO_CHANGE, differences, flatten, require_same, text_digest
from halfbyte.train.run_lock import RunLock, boot_id
from halfbyte.train.saver import Saver
from halfbyte.train.state import Progress
from tests.train.checkpoint_samples import IDENTITY, in_child, leftovers, newest_valid, require_is, restart, state_at, wait


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_what_is_saved_is_loaded_to_the_bit(folder: Path) -> None:
    path = checkpoint.save(folder, state_at(3))
    assert path == folder / "step-000003"
    assert sorted(entry.name for entry in path.iterdir()) == [
        "MANIFEST.json", "optimizer.safetensors", "rng.safetensors", "state.json", "trainables.safetensors"]
    require_is(checkpoint.load(path), 3)
    assert (folder / "LATEST").read_text() == "step-000003\n"
    assert leftovers(folder) == []


def test_floats_of_the_progress_keep_all_bits(folder: Path) -> None:
    rng = random.Random(7)
    for step in range(1, 40):
        state = state_at(step)
        value = struct.unpack("d", struct.pack("Q", rng.getrandbits(62)))[0]
        state.progress.best_metric = value
        loaded = checkpoint.load(checkpoint.save(folder, state, verify=False)).progress.best_metric
        assert struct.pack("d", loaded) == struct.pack("d", value)
        shutil.rmtree(folder / checkpoint.step_name(step))


def test_every_dtype_a_state_can_hold_comes_back(folder: Path) -> None:
    state = state_at(1)
    state.optimizer = {
        "bf16": torch.randn(5).to(torch.bfloat16), "half": torch.randn(3).half(), "bytes": torch.arange(256, dtype=torch.uint8),
        "count": torch.tensor(7), "double": torch.randn(2, 2, dtype=torch.float64), "empty": torch.empty(0),
        "view": torch.arange(6.0).view(2, 3).T,
    }
    found = checkpoint.load(checkpoint.save(folder, state)).optimizer
    assert {n: (v.dtype, v.shape) for n, v in found.items()} == {n: (v.dtype, v.shape) for n, v in state.optimizer.items()}
    assert all(torch.equal(found[name], state.optimizer[name]) for name in found)


def test_a_large_state_is_written_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PART_BYTES", 300)
    path = checkpoint.save(folder, state_at(2))
    assert (path / "optimizer-2.safetensors").exists()
    require_is(checkpoint.load(path), 2)


def test_the_generators_go_on_as_if_nothing_had_been(folder: Path) -> None:
    from halfbyte.train.state import restore_rng

    random.gauss(0, 1)
    numpy.random.standard_normal()
    path = checkpoint.save(folder, state_at(1))

    def draw() -> tuple[list[float], list[float], torch.Tensor]:
        return [random.gauss(0, 1) for _ in range(3)], numpy.random.standard_normal(3).tolist(), torch.rand(3)

    before = draw()
    random.seed(99), numpy.random.seed(99), torch.manual_seed(99)
    restore_rng(checkpoint.load(path).rng)
    after = draw()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


@pytest.mark.parametrize("group", ["trainables", "optimizer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_saved(folder: Path, group: str, value: float) -> None:
    checkpoint.save(folder, state_at(1))
    state = state_at(2)
    name = sorted(getattr(state, group))[0]
    getattr(state, group)[name].view(-1)[1] = value
    with pytest.raises(NumericError, match=r"1 of .* values") as caught:
        checkpoint.save(folder, state)
    assert name in caught.value.place and caught.value.exit_code == 6
    assert newest_valid(folder.parent) == 1 and leftovers(folder) == []


def damage_missing(path: Path) -> None:
    (path / "optimizer.safetensors").unlink()


def damage_no_manifest(path: Path) -> None:
    (path / "MANIFEST.json").unlink()


def damage_half_manifest(path: Path) -> None:
    text = (path / "MANIFEST.json").read_text()
    (path / "MANIFEST.json").write_text(text[: len(text) // 2])


def damage_future(path: Path) -> None:
    rewrite_manifest(path, version=2)


def damage_step(path: Path) -> None:
    rewrite_manifest(path, step=1)


def damage_flip(path: Path) -> None:
    flip(path / "trainables.safetensors", 8 * (path / "trainables.safetensors").stat().st_size - 1)


def damage_empty(path: Path) -> None:
    (path / "rng.safetensors").write_bytes(b"")


def damage_swapped(path: Path) -> None:
    shutil.copy(path.parent / "step-000001" / "optimizer.safetensors", path / "optimizer.safetensors")


def damage_fifo(path: Path) -> None:
    (path / "rng.safetensors").unlink()
    os.mkfifo(path / "rng.safetensors")


def damage_outside_name(path: Path) -> None:
    values = json.loads((path / "MANIFEST.json").read_text())
    rewrite_manifest(path, files=values["files"] | {"../LATEST": {"bytes": 12, "sha256": "0" * 64}})


def damage_field(path: Path) -> None:
    rewrite_manifest(path, identity="nothing")


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def rewrite_manifest(path: Path, **changes: object) -> None:
    """A manifest that is right in itself and says something else: only its meaning can give it away."""
    values = json.loads((path / "MANIFEST.json").read_text()) | changes
    values.pop("manifest_sha256")
    (path / "MANIFEST.json").write_bytes(manifest.canonical(values | {"manifest_sha256": manifest.sha256(manifest.canonical(values))}))


@pytest.mark.parametrize(("damage", "reason"), [
    (damage_missing, "optimizer.safetensors is missing"),
    (damage_no_manifest, "MANIFEST.json is missing"),
    (damage_half_manifest, "MANIFEST.json is not the JSON"),
    (damage_future, "version 2, this program reads"),
    (damage_step, "its manifest is of step 1"),
    (damage_flip, "trainables.safetensors does not have the sha256"),
    (damage_empty, "rng.safetensors has 0 bytes"),
    (damage_swapped, "optimizer.safetensors does not have the sha256"),
    (damage_fifo, "rng.safetensors is not a regular file"),
    (damage_outside_name, "does not list the files of a checkpoint"),
    (damage_field, "identity"),
])
def test_a_damaged_checkpoint_is_skipped_and_named(folder: Path, damage: object, reason: str) -> None:
    checkpoint.save(folder, state_at(1))
    damage(checkpoint.save(folder, state_at(2)))  # type: ignore[operator]
    found = checkpoint.scan(folder)
    assert [entry.step for entry in found.valid] == [1]
    assert [entry.path.name for entry in found.skipped] == ["step-000002"] and reason in found.skipped[0].reason
    loaded = checkpoint.load_newest(folder)
    require_is(loaded.state, 1)
    assert len(loaded.notes) == 1 and "step-000002 was skipped" in loaded.notes[0] and reason in loaded.notes[0]


def test_the_pointer_is_a_hint_and_the_scan_the_truth(folder: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(folder, state_at(step))
    for text in ("step-000001\n", "step-000009\n", "../../etc\n", ""):
        (folder / "LATEST").write_text(text)
        require_is(checkpoint.load_newest(folder).state, 3)


def test_no_valid_checkpoint_names_every_candidate_with_its_reason(folder: Path) -> None:
    damage_missing(checkpoint.save(folder, state_at(1)))
    damage_flip(checkpoint.save(folder, state_at(2)))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_newest(folder)
    assert caught.value.code == "E-CKPT-001" and caught.value.exit_code == 4
    assert "step-000001 was skipped: optimizer.safetensors is missing" in caught.value.found
    assert "step-000002 was skipped: trainables.safetensors does not have" in caught.value.found


def test_a_folder_without_checkpoints_and_one_of_the_trainer_are_told_apart(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="E-CKPT-004"):
        checkpoint.load_newest(folder)
    (folder.parent / "checkpoint-500").mkdir()
    (folder.parent / "checkpoint-500" / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"transformers' Trainer.*\n.*\n.*checkpoint-500"):
        checkpoint.load_newest(folder)


def test_a_step_number_beyond_six_digits_is_still_the_newest(folder: Path) -> None:
    for step in (999_999, 1_000_000):
        checkpoint.save(folder, state_at(step))
    require_is(checkpoint.load_newest(folder).state, 1_000_000)


def test_the_same_step_saved_again_replaces_the_first(folder: Path) -> None:
    checkpoint.save(folder, state_at(4))
    again = state_at(4, best_step=2)
    checkpoint.save(folder, again)
    assert checkpoint.load_newest(folder).state.progress.best_step == 2
    assert leftovers(folder) == [] and len(checkpoint.scan(folder).valid) == 1


def test_a_clock_set_back_does_not_change_which_is_newest(folder: Path) -> None:
    for step in (1, 2):
        os.utime(checkpoint.save(folder, state_at(step)), (10_000 - step, 10_000 - step))
    assert newest_valid(folder.parent) == 2


# --- rotation ---------------------------------------------------------------------------------------------------------------------


def steps_of(folder: Path) -> list[int]:
    return sorted(found.step for found in checkpoint.scan(folder).valid)


def random_curve(folder: Path, seed: int, length: int) -> None:
    """Save along a random evaluation curve; at every moment the newest and the best exist and are valid."""
    rng = random.Random(seed)
    keep = rng.choice([1, 1, 2, 3])
    best: tuple[float, int] | None = None
    seen: list[int] = []
    for step in range(1, length + 1):
        metric = rng.random()
        if best is None or metric < best[0]:
            best = (metric, step)
        checkpoint.save(folder, state_at(step, best[1]), verify=False)
        seen.append(step)
        rotation.rotate(folder, keep=keep, best_step=best[1])
        wanted = sorted({best[1], *seen[-keep:]})
        assert steps_of(folder) == wanted, f"seed {seed}, step {step}, keep {keep}, best {best[1]}"
    assert leftovers(folder) == []


def test_best_and_newest_always_stay(tmp_path: Path) -> None:  # T72
    """T72: along random evaluation curves the best and the newest `keep` stay, nothing else."""
    for seed in range(40):
        random_curve(tmp_path / str(seed), seed, 6)


@pytest.mark.slow
def test_best_and_newest_always_stay_along_1000_curves(tmp_path: Path) -> None:  # T72
    """T72: the full count."""
    for seed in range(1000):
        random_curve(tmp_path / str(seed), seed, 8)
        shutil.rmtree(tmp_path / str(seed))


def test_a_damaged_newest_does_not_count_among_those_kept(folder: Path) -> None:
    for step in (1, 2, 3):
        path = checkpoint.save(folder, state_at(step))
    damage_flip(path)
    rotation.rotate(folder, keep=2)
    assert steps_of(folder) == [1, 2] and (folder / "step-000003").exists()


def test_one_that_is_being_read_stays(folder: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(folder, state_at(step))
    with manifest.reading(folder / "step-000001"):
        assert rotation.rotate(folder, keep=1) == [2]
    assert rotation.rotate(folder, keep=1) == [1]
    assert steps_of(folder) == [3]


def test_nothing_is_deleted_before_the_new_one_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # T72
    """T72: whichever call of a save and its rotation fails, the newest valid checkpoint is the old one or the new one."""
    refused = 0
    for count in range(1, 60):
        run = tmp_path / str(count)
        run.mkdir()
        with Saver(run, keep=1) as saver:
            saver.save(state_at(1))
            monkeypatch.setenv("HALFBYTE_FAULTS", f"checkpoint.*:EACCES:{count}")
            try:
                saver.save(state_at(2))
            except StorageError:
                refused += 1
            else:
                break
            finally:
                monkeypatch.delenv("HALFBYTE_FAULTS")
            assert newest_valid(run) in (1, 2)
        require_is(checkpoint.load_newest(saver.folder).state, restart(run))
    assert refused > 25 and steps_of(saver.folder) == [2]


# --- identity ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["base", "tokenizer", "template", "data"])
def test_another_input_is_refused_by_name_with_both_values(field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        require_same(IDENTITY, IDENTITY | {field: "e" * 64}, "step-000002")
    assert caught.value.exit_code == 4 and f"{field}: {str(IDENTITY[field])[:16]}.. -> {'e' * 16}.." in caught.value.found


@pytest.mark.parametrize(("field", "value"), [("lora.rank", 8), ("lora.targets", ["q_proj"]), ("model.dtype", "bfloat16")])
def test_another_rank_target_or_precision_is_refused(field: str, value: object) -> None:
    config = dict(IDENTITY["config"]) | {field: value}  # type: ignore[call-overload]
    lines = differences(IDENTITY, IDENTITY | {"config": config})
    assert len(lines) == 1 and lines[0].startswith(f"{field}: ") and lines[0].endswith(f"-> {json.dumps(value)}")


def test_a_setting_that_appeared_or_vanished_is_a_difference() -> None:
    config = dict(IDENTITY["config"])  # type: ignore[call-overload]
    del config["lora.rank"]
    assert differences(IDENTITY, IDENTITY | {"config": config}) == ["lora.rank: 4 -> null"]


def test_length_logging_evaluation_and_saving_may_change() -> None:
    config = dict(IDENTITY["config"]) | {"train.epochs": 3.0}  # type: ignore[call-overload]
    assert differences(IDENTITY, IDENTITY | {"config": config}) == []
    require_same(IDENTITY, IDENTITY | {"config": config}, "")


def test_the_settings_that_may_change_exist_and_all_others_are_compared() -> None:
    from halfbyte.config.run import RunConfig

    known = set(flatten(RunConfig.model_validate({"data": {"path": "rows.jsonl"}}).model_dump(mode="json")))
    assert known >= FREE_TO_CHANGE
    compared = {"lora.rank", "lora.targets", "quant.format", "train.seed", "data.max_tokens", "train.micro_batch_size", "method"}
    assert compared <= known - FREE_TO_CHANGE


def test_digests_of_texts() -> None:
    assert text_digest(None) == "" != text_digest("") != text_digest("a")


# --- one writer -------------------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(CheckpointError) as caught:
        RunLock(tmp_path).__enter__()
    assert caught.value.code == "E-CKPT-003" and f"process {os.getpid()} " in caught.value.found
    with RunLock(tmp_path):
        pass


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    def work() -> None:
        with pytest.raises(CheckpointError, match=f"process {os.getppid()} "):
            Saver(tmp_path).__enter__()

    with Saver(tmp_path):
        assert wait(in_child(work)) == 0


def test_a_lock_left_by_a_dead_process_is_no_obstacle(tmp_path: Path) -> None:
    def work() -> None:
        RunLock(tmp_path).__enter__()
        os._exit(0)

    assert wait(in_child(work)) == 0
    assert json.loads((tmp_path / "run.lock").read_text())["boot_id"] == boot_id()
    with RunLock(tmp_path, wait_seconds=0):
        pass


def test_a_lock_given_back_is_free_though_a_worker_inherited_it(tmp_path: Path) -> None:
    import time

    with RunLock(tmp_path):
        worker = in_child(lambda: time.sleep(1))
    with RunLock(tmp_path, wait_seconds=0):
        assert wait(worker) == 0


def test_a_lock_that_a_dying_worker_still_holds_is_waited_for(tmp_path: Path) -> None:
    import signal
    import time

    reader, writer = os.pipe()

    def work() -> None:
        RunLock(tmp_path).__enter__()
        worker = os.fork()
        if worker == 0:
            os.write(writer, b"x")
            time.sleep(0.5)
            os._exit(0)
        time.sleep(30)

    pid = in_child(work)
    os.read(reader, 1)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began > 0.1
    os.close(reader), os.close(writer)


def test_a_field_of_older_checkpoints_is_passed_over_and_an_unknown_one_is_not() -> None:
    old = {**Progress(step=3).to_json(), "loss_ema": 1.5}
    assert Progress.from_json(old) == Progress(step=3)
    with pytest.raises(CheckpointError, match="E-CKPT-011"):
        Progress.from_json({**old, "other": 1})
