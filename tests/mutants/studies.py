"""Bugs of comparisons and of the learning-rate finder.  T0: none of the listed traps."""

from tests.mutants.mutant import Mutant

COMPARE, RUNS, ROWS, JUDGE = (f"halfbyte/studies/{name}.py" for name in ("compare", "runs", "rows", "judge"))
RATE, MEASURES, NUMBERS, ARMS = (f"halfbyte/studies/{name}.py" for name in ("learning_rate", "measures", "comparison", "arms"))
IN_COMPARE, IN_TABLE, IN_RATE, IN_MEASURES = (
    f"tests/studies/test_studies_{name}.py::" for name in ("compare", "comparison", "learning_rate", "measures")
)

MUTANTS = [
    Mutant(
        "T71", "a study with runs is replaced by one of other settings", "halfbyte/studies/runs.py",
        " and not _has_stepped(path.parent)", "",
        "tests/studies/test_studies_compare.py::test_other_settings_or_other_rows_do_not_go_on_in_the_same_folder",
    ),
    Mutant(
        "T71", "a base made for other settings stays when a study is replaced", "halfbyte/studies/runs.py",
        "            shutil.rmtree(path.parent / part, ignore_errors=True)\n        before", "            pass\n        before",
        "tests/studies/test_studies_compare.py::test_a_first_command_that_was_refused_can_be_corrected",
    ),
    Mutant("T0", "an interval over three seeds as if there were many", MEASURES,
           "T_975[min(len(values) - 1, len(T_975)) - 1]", "1.96",
           IN_MEASURES + "test_the_interval_is_students_not_the_normal_distributions"),
    Mutant("T0", "the spread divided by n", MEASURES,
           "/ (len(values) - 1))", "/ len(values))", IN_MEASURES + "test_mean_and_spread_are_those_of_the_standard_library"),
    Mutant("T0", "steps to a loss against the mean of the target, not seed against seed", NUMBERS,
           'other["last_eval_loss"]) for run, other in pairs]', 'run["last_eval_loss"]) for run, other in pairs]',
           IN_TABLE + "test_steps_to_the_targets_loss_seed_against_the_same_seed"),
    Mutant("T0", "the last time a curve reaches a loss", MEASURES,
           "for number, (step, loss) in enumerate(curve):", "for number, (step, loss) in reversed(list(enumerate(curve))):",
           IN_MEASURES + "test_a_curve_reaches_a_loss_between_its_points_once"),
    Mutant("T0", "foreign text on a page is markup", "halfbyte/pages/page.py",
           "autoescape=True", "autoescape=False", IN_TABLE + "test_no_text_from_outside_becomes_markup"),
    Mutant("T44", "a setting that a named setting gives itself is dropped", ARMS,
           "    for key, value in own.items():\n        values[key] =",
           "    for key, value in own.items():\n        if key in RESTING.get(str(method), ()): continue\n        values[key] =",
           IN_COMPARE + "test_named_settings_are_read_from_a_file"),
    Mutant("T67", "general text before the training judged with the adapter on", JUDGE,
           '    opened.activate(str(opened.source.folder / START) if config.lora.init == "calibrated" else None)\n', "",
           IN_COMPARE + "test_what_was_forgotten_is_judged_with_and_without_the_adapter"),
    Mutant("T44", "a calibrated base of a comparison loses its low-rank start", "halfbyte/train/calibrated_base.py",
           "    return with_own_start(config)\n", "    return config\n",
           IN_COMPARE + "test_a_calibrated_setting_begins_from_its_start[given0-calibrated]"),
    Mutant("T67", "what the low-rank start repairs counts as un-forgotten", JUDGE,
           'str(opened.source.folder / START) if config.lora.init == "calibrated" else None', "None",
           IN_COMPARE + "test_before_is_where_the_training_began"),
    Mutant("T70", "every seed is the same seed", COMPARE,
           '"seed": config.train.seed + seed', '"seed": config.train.seed',
           IN_COMPARE + "test_all_runs_get_the_same_rows_and_evaluation_and_each_its_seed_and_rate"),
    Mutant("T70", "a run that goes on after the study was killed is trained over", RUNS,
           "            fcntl.flock(lock, fcntl.LOCK_EX)\n        yield", "            pass\n        yield",
           IN_COMPARE + "test_killed_and_started_again_it_ends_with_the_same_table"),
    Mutant("T71", "outcomes kept from other settings", RUNS,
           "    elif before != now:\n        keys", "    elif False:\n        keys",
           IN_COMPARE + "test_other_settings_or_other_rows_do_not_go_on_in_the_same_folder"),
    Mutant("T71", "outcomes kept from other rows", ROWS,
           "        if before != found:\n", "        if False:\n",
           IN_COMPARE + "test_other_settings_or_other_rows_do_not_go_on_in_the_same_folder"),
    Mutant("T72", "each setting's best weights compared, not those of the same step", COMPARE,
           '"keep_best": False', '"keep_best": True',
           IN_COMPARE + "test_all_runs_get_the_same_rows_and_evaluation_and_each_its_seed_and_rate"),
    Mutant("T72", "the learning rate chosen by the held-out rows of the comparison", ROWS,
           "judges = others if apart else held_out", "judges = held_out",
           IN_RATE + "test_the_rates_rows_are_apart_from_what_judges_the_comparison"),
    Mutant("T24", "a rate above one that diverged is taken", RATE,
           "not all(other.stable for other in points[:number])", "False",
           IN_RATE + "test_what_lies_above_an_unstable_rate_is_out_though_its_loss_is_low"),
    Mutant("T24", "a run that ended with NaN counts as stable", RATE,
           "math.isfinite(self.after) and self.after <= self.before", "not self.after > self.before",
           IN_RATE + "test_what_lies_above_an_unstable_rate_is_out_though_its_loss_is_low"),
]  # fmt: skip
