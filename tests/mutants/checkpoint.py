"""Bugs of saving, keeping and resuming.  T70: what comes back is not what was; T72: what must stay does not."""

from tests.mutants.mutant import Mutant

CHECKPOINT, KILL, STORAGE, RESUME = (
    f"tests/train/test_train_{name}.py::" for name in ("checkpoint", "kill", "storage_faults", "resume")
)
MISHAPS = RESUME + "test_a_run_with_mishaps_goes_on_to_the_bit"
ONE_POINT = RESUME + "test_a_run_stopped_anywhere_goes_on_to_the_bit"

DAMAGE = [
    Mutant("T70", "file hashes not compared", "halfbyte/train/manifest.py", "    if sha256(content) != digest:\n", "    if False:\n",
           STORAGE + "test_every_flipped_bit_and_every_cut_is_found"),
    Mutant("T70", "the manifest's own hash not compared", "halfbyte/train/manifest.py",
           '    if not unchanged or values.pop("manifest_sha256", None) != sha256(canonical(values)):\n',
           '    values.pop("manifest_sha256", None)\n    if not unchanged:\n', STORAGE + "test_every_bit_of_the_manifest_counts"),
    Mutant("T70", "a checkpoint under another step's name accepted", "halfbyte/train/manifest.py",
           '    if match is None or int(match[1]) != values["step"]:\n', "    if match is None:\n",
           CHECKPOINT + "test_a_damaged_checkpoint_is_skipped_and_named"),
    Mutant("T70", "a format of the future accepted", "halfbyte/train/manifest.py",
           ' or values.get("version") != VERSION:\n', ":\n", CHECKPOINT + "test_a_damaged_checkpoint_is_skipped_and_named"),
    Mutant("T70", "LATEST trusted over the scan", "halfbyte/train/checkpoint.py",
           "    for path in _candidates(folder):\n        try:\n            return Loaded(",
           '    hint = folder / (folder / "LATEST").read_text().strip()\n'
           "    for path in [hint, *_candidates(folder)]:\n        try:\n            return Loaded(",
           CHECKPOINT + "test_the_pointer_is_a_hint_and_the_scan_the_truth"),
    Mutant("T70", "steps sorted as text", "halfbyte/train/checkpoint.py", "rated.append((int(match[1]), shown == name, name))",
           "rated.append((match[1], shown == name, name))", CHECKPOINT + "test_a_step_number_beyond_six_digits_is_still_the_newest"),
    Mutant("T70", "a skipped checkpoint not told", "halfbyte/train/checkpoint.py",
           '            notes.append(f"{path.name} was skipped: {error.found}")\n', "            del error\n",
           CHECKPOINT + "test_a_damaged_checkpoint_is_skipped_and_named"),
    Mutant("T70", "no permission read as no checkpoint", "halfbyte/train/manifest.py",
           "        raise storage_error(error, path / name) from error\n", '        raise unusable(path, "not readable") from error\n',
           STORAGE + "test_a_folder_that_may_not_be_read_is_an_error_not_an_empty_one"),
    Mutant("T70", "another run's checkpoint accepted", "halfbyte/train/identity.py", "    if lines:\n", "    if False:\n",
           CHECKPOINT + "test_another_input_is_refused_by_name_with_both_values"),
    Mutant("T70", "NaN saved", "halfbyte/train/checkpoint.py", "            if bad:\n", "            if False:\n",
           CHECKPOINT + "test_numbers_that_are_not_finite_are_never_saved"),
    Mutant("T70", "the second gauss value forgotten", "halfbyte/train/state.py", "gauss[0] if gauss else None", "None",
           CHECKPOINT + "test_the_generators_go_on_as_if_nothing_had_been"),
    Mutant("T70", "views saved in memory order", "halfbyte/formats/safetensors_io.py",
           'tensors[name].detach().to("cpu").contiguous().flatten()',
           'tensors[name].detach().to("cpu").as_strided(tensors[name].shape, tensors[name].contiguous().stride()).flatten()',
           CHECKPOINT + "test_every_dtype_a_state_can_hold_comes_back"),
]

LOSS = [
    Mutant("T72", "the best removed", "halfbyte/train/rotation.py", "        if victim.step != best_step and not ", "        if not ",
           CHECKPOINT + "test_best_and_newest_always_stay"),
    Mutant("T72", "the newest removed", "halfbyte/train/rotation.py", "valid[max(keep, 1) :]", "valid[keep - 1 :]",
           CHECKPOINT + "test_best_and_newest_always_stay"),
    Mutant("T72", "one that is read removed", "halfbyte/train/rotation.py", " and not _is_read(victim.path):", ":",
           CHECKPOINT + "test_one_that_is_being_read_stays"),
    Mutant("T72", "the old removed before the new is written", "halfbyte/train/saver.py", "        began = time.monotonic()\n",
           "        began = time.monotonic()\n        for old in checkpoint.scan(self.folder).valid[self.keep - 1 :]:\n"
           "            rotation._remove(old.path)\n", CHECKPOINT + "test_nothing_is_deleted_before_the_new_one_is_in_place"),
    Mutant("T72", "the same step removed before its replacement is in place", "halfbyte/train/checkpoint.py",
           "        durable.rename(target, aside)\n", "        durable.remove(target)\n        durable.make_folder(aside)\n",
           KILL + "test_kill_before_every_system_call"),
    Mutant("T72", "one moved aside never put back", "halfbyte/train/rotation.py",
           "            elif path.name.startswith(ASIDE) and path in valid and original not in valid:\n", "            elif False:\n",
           KILL + "test_kill_before_every_system_call"),
    Mutant("T72", "removed in place, file by file", "halfbyte/train/rotation.py",
           "        durable.rename(path, doomed)\n        durable.remove(doomed)\n", "        durable.remove(path)\n        del doomed\n",
           KILL + "test_kill_before_every_system_call"),
    Mutant("T72", "written in place, without a staging folder", "halfbyte/train/checkpoint.py", "        manifest.write(staging, state)\n",
           "        durable.make_folder(target)\n        manifest.write(target, state)\n",
           KILL + "test_kill_before_every_system_call"),
    Mutant("T72", "leftovers stay", "halfbyte/train/rotation.py", "path.name.startswith((STAGING, DOOMED))", "path.name.startswith(DOOMED)",
           KILL + "test_kill_before_every_system_call"),
    Mutant("T72", "files not synced", "halfbyte/train/durable_files.py",
           '        faults.point("checkpoint.fsync")\n        os.fsync(descriptor)\n', '        faults.point("checkpoint.fsync")\n',
           KILL + "test_power_loss_at_any_call"),
    Mutant("T72", "the parent folder not synced", "halfbyte/train/durable_files.py",
           "    os.rename(old, new)\n    sync_folder(new.parent)\n", "    os.rename(old, new)\n", KILL + "test_power_loss_at_any_call"),
    Mutant("T72", "the staging folder not synced", "halfbyte/train/manifest.py",
           "manifest_sha256\": sha256(canonical(manifest))}))\n    durable.sync_folder(folder)\n",
           "manifest_sha256\": sha256(canonical(manifest))}))\n", KILL + "test_power_loss_at_any_call"),
    Mutant("T72", "a full disk ends the run at once", "halfbyte/train/saver.py", "BORNE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)",
           "BORNE = ()", STORAGE + "test_a_full_disk_is_borne_twice_and_the_third_time_ends_the_run"),
    Mutant("T72", "no access borne like a full disk", "halfbyte/train/saver.py", "BORNE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)",
           "BORNE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG)",
           STORAGE + "test_an_error_that_waiting_does_not_cure_ends_the_run_at_once"),
    Mutant("T72", "space not looked at before", "halfbyte/train/durable_files.py", "    if free < 1.2 * needed:\n", "    if False:\n",
           STORAGE + "test_too_little_space_is_seen_before_a_byte_is_written"),
    Mutant("T72", "short writes taken for whole ones", "halfbyte/train/durable_files.py", "        chunk = chunk[written:]\n",
           "        chunk = chunk[len(chunk):]\n", STORAGE + "test_a_short_write_is_gone_on_with"),
    Mutant("T72", "an error while saving called success", "halfbyte/train/checkpoint.py",
           "        raise storage_error(error, target) from error\n", "        log.logger().warning(\"%s\", error)\n",
           STORAGE + "test_an_error_at_every_call_is_never_called_success"),
    Mutant("T72", "two writers", "halfbyte/train/run_lock.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
           CHECKPOINT + "test_a_second_writer_is_refused_and_told_by_whom"),
]

RESUMING = [
    Mutant("T70", f"{name} generator not restored", "halfbyte/train/state.py", find, "    pass\n", ONE_POINT)
    for name, find in (
        ("python", "    random.setstate((version, tuple(words), gauss[0] if gauss else None))\n"),
        ("torch", '    torch.set_rng_state(saved["torch"])\n'),
    )
] + [
    Mutant("T70", "optimizer not restored", "halfbyte/train/state.py", "    optimizer.load_state_tensors(state.optimizer)\n", "",
           ONE_POINT),
    Mutant("T70", "trainables not restored", "halfbyte/train/state.py", "            tensor.copy_(state.trainables[name])\n",
           "            pass\n", ONE_POINT),
    Mutant("T70", "cursor off by one", "halfbyte/train/training.py", "        self.batches.load_state_dict(self.progress.cursor)\n",
           '        self.batches.load_state_dict(self.progress.cursor | {"step": self.progress.cursor["step"] + 1})\n', ONE_POINT),
    Mutant("T70", "cursor not restored", "halfbyte/train/training.py", "        self.batches.load_state_dict(self.progress.cursor)\n", "",
           ONE_POINT),
    Mutant("T70", "progress starts anew", "halfbyte/train/state.py", "    return Progress.from_json(state.progress.to_json())\n",
           "    return Progress(step=state.progress.step, cursor=state.progress.cursor)\n", ONE_POINT),
    Mutant("T70", "log lines of steps done again doubled", "halfbyte/train/training.py",
           "        self.metrics.cut(self.progress.metrics_offset)\n"
           "        self.history = self.metrics.records()\n        self.seconds_before",
           "        self.history = self.metrics.records()\n        self.seconds_before", ONE_POINT),
    Mutant("T70", "iterating the loader draws from the global generator", "halfbyte/data/batches.py",
           "            generator=torch.Generator().manual_seed(self.seed),", "            ", ONE_POINT),
    Mutant("T70", "half a window saved by a signal with its random numbers gone", "halfbyte/train/training.py",
           "        except StopRequested:\n            restore_rng(random_state)\n", "        except StopRequested:\n", MISHAPS),
    Mutant("T72", "a best measured where it is not saved", "halfbyte/train/training.py",
           "        if every is None or self.progress.evaluated_step == step or self._amid_bad_steps():\n",
           "        if every is None or self.progress.evaluated_step == step:\n",
           RESUME + "test_the_best_can_be_delivered_though_steps_were_left_out"),
    Mutant("T72", "a lock that a data worker inherited not given back", "halfbyte/train/run_lock.py",
           "            fcntl.flock(self._descriptor, fcntl.LOCK_UN)", "            pass",
           CHECKPOINT + "test_a_lock_given_back_is_free_though_a_worker_inherited_it"),
]

MUTANTS = DAMAGE + LOSS + RESUMING
