"""Bugs of rank studies and of truncation, each put into this code once; a test must fail on every one."""

from tests.mutants.mutant import Mutant

CUT, RANK, COST = "tests/lora/test_lora_truncate.py", "tests/studies/test_studies_rank.py", "tests/studies/test_studies_rank_adapter.py"
ACTS = f"{CUT}::test_a_truncated_adapter_acts_as_the_nearest_update"
DENSE = f"{RANK}::test_the_gradient_is_that_of_the_dense_weights"

MUTANTS = [
    Mutant("T28", "alpha stays what it was when the rank shrinks", "halfbyte/lora/truncate.py",
           "alphas[name] = factor[name] * (math.sqrt(new[name]) if config.rslora else new[name])", "pass", ACTS),
    Mutant("T28", "rsLoRA's alpha shrinks with the rank, not with its root", "halfbyte/lora/truncate.py",
           "(math.sqrt(new[name]) if config.rslora else new[name])", "new[name]", ACTS),
    Mutant("T29", "ranks that differ are lost in a truncation", "halfbyte/lora/truncate.py",
           '"ranks": {name: own for name, own in ranks.items() if own != rank}', '"ranks": {}', ACTS),
    Mutant("T29", "a truncation raises ranks that are below it", "halfbyte/lora/truncate.py", "if rank < old[name]}",
           "if rank != old[name]}", f"{CUT}::test_uniform_truncation_of_ranks_that_differ"),
    Mutant("T29", "a rank that stays is decomposed all the same", "halfbyte/lora/truncate.py", "if rank < old[name]}",
           "if rank <= old[name]}", f"{CUT}::test_a_rank_that_is_not_reduced_changes_no_bit"),
    Mutant("T28", "the scale is left out of the factors", "halfbyte/lora/truncate.py", "root = (parts.values[:rank] / scaling).sqrt()",
           "root = parts.values[:rank].sqrt()", f"{CUT}::test_a_truncation_is_the_nearest_matrix_of_its_rank"),
    Mutant("T0", "columns of B are cut instead of singular directions", "halfbyte/lora/truncate.py",
           "torch.linalg.svd(scaling * (core_b @ core_a.T), full_matrices=False)",
           "(torch.eye(len(core_b)).double(), scaling * (core_b @ core_a.T).diagonal(), torch.eye(len(core_a)).double())",
           f"{CUT}::test_the_spectrum_is_numpys_of_the_whole_product"),
    Mutant("T0", "joint ranks do not look at the norm of a direction", "halfbyte/lora/truncate.py", "float(value) ** 2 * (weights",
           "1.0 * (weights", f"{CUT}::test_joint_ranks_lose_least_for_their_parameters"),
    Mutant("T28", "a cut keeps the probe's scale at another rank", "halfbyte/studies/rank_problem.py",
           "shortened(parts[name], rank, layer.scaling)", "shortened(parts[name], rank, 1.0)",
           f"{RANK}::test_cuts_are_at_one_scale"),
    Mutant("T0", "a rank is worth its cut alone", "halfbyte/studies/rank_probe.py", "for found in (self.cuts, self.runs) if",
           "for found in (self.cuts,) if", f"{RANK}::test_a_rank_is_worth_the_better_of_its_cut_and_its_run"),
    Mutant("T0", "noise excuses any distance", "halfbyte/studies/rank_probe.py",
           "min(error or 0.0, OF_GAIN * (self.base_loss - self.best.loss))", "error or 0.0",
           f"{RANK}::test_enough_is_judged_against_the_best_rank_and_noise_excuses_little"),
    Mutant("T0", "half 2 is looked at along half 1's basis, not its singular directions", "halfbyte/studies/rank_gradient.py",
           "(basis_IK @ wh.T)[:, :most]", "basis_IK[:, :most]", DENSE),
    Mutant("T0", "noise is not taken off", "halfbyte/studies/rank_gradient.py", "each * counts.square()", "0.0 * counts", DENSE),
    Mutant("T29", "alpha of a module does not follow its rank", "halfbyte/studies/rank.py", "self.alpha * (own / rank) ** power",
           "self.alpha + 0 * own", f"{RANK}::test_the_text_and_the_settings_to_paste"),
    Mutant("T0", "one held-out batch has a standard error of 0", "halfbyte/studies/rank_problem.py", "            return gap, None",
           "            return gap, 0.0", f"{RANK}::test_one_held_out_batch_has_no_standard_error"),
    Mutant("T0", "the first rows of the file are measured, not rows of all of it", "halfbyte/studies/rank.py",
           "data.train[number] for number in spread_evenly(data.train, ask.rows)", "data.train[number] for number in range(ask.rows)",
           f"{RANK}::test_the_rows_measured_are_spread_over_all"),
    Mutant("T0", "an adapter of init loftq cannot be looked at", "halfbyte/cli/rank.py", "rank_adapter.left_out(whole, number)",
           "whole.cut(number).left_out", f"{COST}::test_an_adapter_of_init_loftq_shows_its_spectrum_and_is_not_cut"),
    Mutant("T67", "a measured adapter is left cut", "halfbyte/studies/rank_adapter.py", "    place(opened, own)\n    return Costs(",
           "    return Costs(", f"{COST}::test_the_model_is_left_as_it_was"),
]  # fmt: skip
