"""Bugs put into loading, saving, generation, held-out scores and own layers on purpose."""

from tests.mutants.mutant import Mutant

_EVAL_LOSS, _TEST_EVAL = "halfbyte/evaluate/loss.py", "tests/evaluate/test_evaluate_scores.py::"
_GENERATE, _TEST_GENERATE = "halfbyte/models/generate.py", "tests/models/test_models_generate.py::"
_MODES = "halfbyte/models/modes.py"
_ROPE, _TEST_LOAD = "halfbyte/models/rope.py", "tests/models/test_models_load.py::"
_QUANTIZER = "halfbyte/models/quantizer.py"
_VALUES, _TEST_VALUES = "halfbyte/models/packed_values.py", "tests/models/test_models_packed_values.py::"
_SAVE, _TEST_SAVE = "halfbyte/models/save.py", "tests/models/test_models_save.py::"
_LAYER, _TEST_LAYER = "halfbyte/models/decoder_layer.py", "tests/models/test_models_decoder_layer.py::"
_ANNOUNCE, _TEST_PATH = "halfbyte/models/announce.py", "tests/models/test_models_own_path.py::"
_ROWS, _STRUCTURE, _LAZY = "halfbyte/models/rows.py", "halfbyte/models/structure.py", "halfbyte/models/lazy_logits.py"
_HEADS, _BLOCK = "halfbyte/models/heads.py", "halfbyte/kernels/gated_mlp/block.py"
_DEVICES, _TEST_DEVICES = "halfbyte/devices.py", "tests/test_devices.py::"

MUTANTS = [
    Mutant(
        "T23", "the held-out loss is a mean of batch means", _EVAL_LOSS,
        "total, count = total + float(summed), count + tokens", "total, count = total + float(summed) / tokens, count + 1",
        _TEST_EVAL + "test_the_loss_does_not_depend_on_the_batches",
    ),
    Mutant(
        "T26", "padding is not masked, so positions count it", _GENERATE,
        "[0] * (width - len(ids)) + [1] * len(ids)", "[1] * width", _TEST_GENERATE + "test_a_batch_answers_as_each_prompt_alone",
    ),
    Mutant(
        "T26", "prompts are padded on the right", _GENERATE,
        "[[pad] * (width - len(ids)) + ids for ids in lists]", "[ids + [pad] * (width - len(ids)) for ids in lists]",
        _TEST_GENERATE + "test_a_batch_answers_as_each_prompt_alone",
    ),
    Mutant(
        "T31", "dropout acts while scoring", _MODES, "    model.eval()\n", "    pass\n",
        _TEST_EVAL + "test_evaluation_runs_without_dropout_and_restores_the_mode",
    ),
    Mutant(
        "T31", "the mode is not put back", _MODES, "            module.training = True\n", "            pass\n",
        _TEST_EVAL + "test_evaluation_runs_without_dropout_and_restores_the_mode",
    ),
    Mutant(
        "T31", "every module is put into training afterwards", _MODES,
        "[module for module in model.modules() if module.training]", "list(model.modules())",
        _TEST_GENERATE + "test_modes_and_the_global_random_state_are_left_alone",
    ),
    Mutant(
        "T40", "rotary frequencies are rounded to bfloat16", _ROPE, "value.to(torch.float32)", "value.to(torch.bfloat16).to(torch.float32)",
        _TEST_LOAD + "test_rotary_angles_are_exact_whatever_the_dtype",
    ),
    Mutant(
        "T40", "frequencies that a cast spoilt are left as they are", _ROPE,
        "            module.register_buffer(key, exact.to(held.device)",
        "            module.register_buffer(key, held", _TEST_LOAD + "test_rotary_angles_are_exact_whatever_the_dtype",
    ),
    Mutant(
        "T56", "the output head is packed", _QUANTIZER, "        if not quantize_head:\n", "        if False:\n",
        _TEST_LOAD + "test_what_is_packed_is_the_golden_list",
    ),
    Mutant(
        "T56", "a router is packed", _QUANTIZER, "    if _ROUTER_WORDS & set(name.split(\".\")):\n        return True\n", "",
        _TEST_LOAD + "test_what_is_packed_is_the_golden_list[qwen2_moe]",
    ),
    Mutant(
        "T56", "nobody asks whether packed layers got their values", "halfbyte/models/load.py",
        "        require_values(model, packing.report.written, folder)\n", "        pass\n",
        _TEST_VALUES + "test_values_lost_on_the_way_stop_the_load",
    ),
    Mutant(
        "T56", "scales that are all zero pass", _VALUES,
        "        if not any(torch.any(plain_absmax(state))", "        if False and any(torch.any(plain_absmax(state))",
        _TEST_VALUES + "test_zero_scales_of_experts_are_found",
    ),
    Mutant(
        "T56", "a layer that is zero in its file is refused", _VALUES, " and not _zero_in_file(name, model, folder):", ":",
        _TEST_VALUES + "test_a_layer_of_zeros_in_the_file_loads",
    ),
    Mutant(
        "T56", "a layer that nobody wrote passes", _VALUES, "if name not in written or", "if",
        _TEST_VALUES + "test_a_weight_that_nobody_wrote_is_named",
    ),
    Mutant(
        "T56", "bytes are packed as if they were weights", _QUANTIZER, "    if not tensor.is_floating_point():\n", "    if False:\n",
        _TEST_VALUES + "test_bytes_that_arrive_in_the_place_of_numbers_are_refused",
    ),
    Mutant(
        "T56", "what waits for a dense weight has the dtype of bytes", _QUANTIZER, "module.get_buffer(name).to(module.dtype)",
        "module.get_buffer(name)", _TEST_VALUES + "test_what_waits_for_a_dense_weight_has_its_dtype",
    ),
    Mutant(
        "T56", "a layer whose raw weight is read is packed", _QUANTIZER, '        return "raw weight is read by its owner"\n',
        '        return ""\n',
        _TEST_LOAD + "test_what_is_packed_is_the_golden_list[mamba]",
    ),
    Mutant(
        "T56", "the user's list takes the place of the defaults", _QUANTIZER,
        "left.update(dict.fromkeys(named, \"asked for\"))", "left = dict.fromkeys(named, \"asked for\")",
        _TEST_LOAD + "test_the_users_list_is_added_to_the_defaults",
    ),
    Mutant(
        "T56", "a pattern matches parts of words", "halfbyte/config/patterns.py", 'f".{pattern}." in f".{name}."', "pattern in name",
        _TEST_LOAD + "test_a_name_part_is_matched_whole",
    ),
    Mutant(
        "T56", "fused experts stay in 16 bits", _QUANTIZER, " or is_conv1d(module) or is_experts(module)}", " or is_conv1d(module)}",
        _TEST_LOAD + "test_what_is_packed_is_the_golden_list[mixtral]",
    ),
    Mutant(
        "T62", "a head that left its embedding is dropped", _SAVE, "            if tied and name in targets:\n",
        "            if name in targets:\n",
        _TEST_SAVE + "test_tied_tensors_are_written_once_and_untied_ones_twice",
    ),
    Mutant(
        "T63", "a shared tensor is written under both names", _SAVE, "        if tensor.numel() and place in seen:\n",
        "        if False:\n",
        _TEST_SAVE + "test_tied_tensors_are_written_once_and_untied_ones_twice",
    ),
    Mutant(
        "T64", "rows beyond the tokenizer are cut off", _SAVE, "        kept[name] = tensor\n",
        "        kept[name] = tensor[:262] if name.endswith((\"embed_tokens.weight\", \"lm_head.weight\")) else tensor\n",
        _TEST_SAVE + "test_a_padded_vocabulary_keeps_every_row",
    ),
    Mutant(
        "T69", "end tokens of the tokenizer only are written", _SAVE,
        "settings.eos_token_id = stops[0] if len(stops) == 1 else stops or None", "settings.eos_token_id = tokenizer.eos_token_id",
        _TEST_SAVE + "test_end_tokens_and_template_come_along",
    ),
    Mutant(
        "T69", "generation ends at the tokenizer's end token only", _GENERATE, "    ids = set(named if", "    ids = set() and set(named if",
        _TEST_GENERATE + "test_every_end_token_ends",
    ),
    Mutant(
        "T69", "the user's own template is not carried along", "halfbyte/models/assemble.py",
        "        tokenizer.chat_template = from_tokenizer(tokenizer, config.model.template).source\n", "        pass\n",
        "tests/models/test_models_assemble.py::test_a_template_of_the_users_own_goes_where_the_model_goes",
    ),
    Mutant(
        "T69", "the chat template stays behind", _SAVE, "            tokenizer.save_pretrained(staging)\n",
        "            tokenizer.save_pretrained(staging)\n            (staging / \"chat_template.jinja\").unlink()\n",
        _TEST_SAVE + "test_end_tokens_and_template_come_along",
    ),
    # own layers: boundaries, padding
    Mutant(
        "T19", "rows of a batch are not told apart", _ROWS, "    begins[:, 0] = True\n", "    begins[0, 0] = True\n",
        _TEST_LAYER + "test_fused_and_plain_agree[llama-plain]",
    ),
    Mutant(
        "T19", "a sample of one token does not end", _ROWS, "position_ids[:, :-1] != 1)", "position_ids[:, :-1] < 0)",
        _TEST_LAYER + "test_fused_and_plain_agree[llama-packed]",
    ),
    Mutant(
        "T25", "padding on the left is attended to", _ROWS, "        begins[:, 1:] |= changes\n", "        pass\n",
        _TEST_LAYER + "test_fused_and_plain_agree[llama-padded]",
    ),
    Mutant(
        "T20", "rows without padding are one sample", _HEADS, "position_ids=positions[None], use_cache",
        "position_ids=torch.arange(len(kept))[None], use_cache", _TEST_LAYER + "test_padding_is_not_computed",
    ),
    Mutant(
        "T0", "padding is computed", _HEADS, "    if batch.positions is not None or not reads_boundaries(model):\n", "    if True:\n",
        _TEST_LAYER + "test_padding_is_not_computed",
    ),
    Mutant(
        "T0", "every batch has a shape of its own", _HEADS, "-len(kept) % ROUND_CPU if", "0 if",
        _TEST_LAYER + "test_padding_is_not_computed",
    ),
    # own layers: policies, tiles
    Mutant(
        "T36", "the last product is left out of the forward pass too", _LAYER, "context_fn=lambda: (nullcontext(), without_down())",
        "context_fn=lambda: (without_down(), without_down())", _TEST_LAYER + "test_policies_give_the_same_bits[llama-recompute]",
    ),
    Mutant(
        "T36", "the layer is kept whole although it is to be computed again", _LAYER, 'self.policy in ("recompute", "offload")',
        'self.policy in ("offload",)', "tests/plan/test_plan_activations.py::test_recomputing_keeps_one_input_a_layer",
    ),
    Mutant(
        "T36", "gate and up are kept whatever the policy", _LAYER, 'keep=policy == "keep"', "keep=True",
        "tests/plan/test_plan_activations.py::test_own_layers_keep_what_the_table_says[llama-recompute_mlp]",
    ),
    Mutant(
        "T34", "the factors' gradients are those of the last tile", _BLOCK, "if totals else parts\n", "if False else parts\n",
        _TEST_LAYER + "test_tiles_of_the_mlp_give_the_same_gradients",
    ),
    Mutant(
        "T34", "an update scaled by 0 is none", "halfbyte/kernels/lora_linear/__init__.py", "self.scaling, bool(self.factors))",
        "self.scaling, bool(self.factors) and self.scaling != 0)",
        "tests/kernels/test_kernels_lora_linear.py::test_projections_with_and_without_updates_and_an_update_of_no_weight",
    ),
    Mutant(
        "T32", "dropout of an adapter is passed over", _LAYER, " or (module.training and module.dropout > 0)", "",
        _TEST_PATH + "test_dropout_of_an_adapter_acts",
    ),
    # own layers: what a layer is made of, and when it gives way
    Mutant(
        "T33", "a reading is compared in the rounding of bfloat16", _STRUCTURE,
        "copy.deepcopy(layer).float() if narrow or seen.hidden.dtype.itemsize < 4 else layer", "layer",
        _TEST_LAYER + "test_an_interleaved_rotation_is_told_apart_in_bfloat16",
    ),
    Mutant(
        "T0", "layers that differ in their window share a reading", _STRUCTURE, 'hasattr(layer.self_attn, "config") else []',
        "False else []", _TEST_PATH + "test_layers_that_differ_in_their_window_alone_are_read_apart",
    ),
    Mutant(
        "T34", "a scale of the MLP's own is lost", _STRUCTURE, "    if [*mlp.parameters(recurse=False),", "    if [] and [",
        _TEST_PATH + "test_an_mlp_with_numbers_of_its_own_is_called_as_a_module",
    ),
    Mutant(
        "T0", "a cap of the scores is overlooked", _STRUCTURE, "    if caps:\n", "    if False:\n",
        _TEST_PATH + "test_a_cap_that_no_reading_knows_is_a_reason",
    ),
    Mutant(
        "T0", "hooks that are there are overlooked", _STRUCTURE, "    if strange:\n        raise", "    if False:\n        raise",
        _TEST_PATH + "test_hooks_on_any_part_run_whenever_they_were_set",
    ),
    Mutant(
        "T0", "hooks that come later are overlooked", _ANNOUNCE, "        if watched(part):\n", "        if False:\n",
        _TEST_PATH + "test_hooks_on_any_part_run_whenever_they_were_set",
    ),
    Mutant(
        "T0", "what transformers notes outputs with counts as a hook", _ROWS, 'known = "output_capturing_hook"', 'known = "none"',
        _TEST_PATH + "test_what_transformers_notes_outputs_with_is_no_hook_of_the_users",
    ),
    Mutant(
        "T0", "another part in the place of a norm is passed over", _ANNOUNCE, "if type(part) is not kind:", "if False:",
        _TEST_PATH + "test_a_part_that_was_exchanged_afterwards_is_called",
    ),
    Mutant(
        "T39", "a norm in another type is computed in the type of its input", _ANNOUNCE, "part.weight.dtype != dtype:", "False:",
        _TEST_PATH + "test_norms_cast_to_float32_afterwards_act_as_the_originals",
    ),
    Mutant(
        "T0", "a cache that is asked for is not made", _ROWS, ' and call.get("use_cache") is not True', "",
        _TEST_PATH + "test_a_cache_that_is_asked_for_in_training_is_given",
    ),
    # lazy logits
    Mutant(
        "T27", "the loss makes the logits", _LAZY, "    if function is F.cross_entropy:\n", "    if False:\n",
        _TEST_LAYER + "test_the_loss_of_transformers_makes_no_logits",
    ),
    Mutant(
        "T27", "the factor behind a soft cap is lost", _LAZY, "softcap=float(factor), scale=settings.scale * factor)",
        "softcap=float(factor))", _TEST_LAYER + "test_fused_and_plain_agree[gemma2-plain]",
    ),
    Mutant(
        "T0", "what is written into logits is lost", _LAZY, "                    kept = self.held = self.settings.of(",
        "                    kept = self.settings.of(", _TEST_LAYER + "test_what_is_written_into_logits_stays_there",
    ),
    Mutant(
        "T0", "logits are those of a weight that has moved since", _LAZY, "    if _state(weight) != state:\n", "    if False:\n",
        _TEST_PATH + "test_logits_of_weights_that_have_moved_are_refused",
    ),
    Mutant(
        "T0", "the optimizer writes without a word", "halfbyte/optim/adamw.py", "            torch.autograd.graph.increment_version(",
        "            list(", _TEST_PATH + "test_logits_of_weights_that_have_moved_are_refused",
    ),
    # memory and devices
    Mutant(
        "T0", "freed memory goes back at once", _DEVICES, "                self.library.mallopt(*setting)\n", "                pass\n",
        _TEST_DEVICES + "test_freed_memory_is_kept",
    ),
    Mutant(
        "T0", "kept memory grows without a bound", _DEVICES, "        self.library.malloc_trim(0)\n", "        pass\n",
        _TEST_DEVICES + "test_kept_memory_is_bounded",
    ),
    Mutant(
        "T0", "a GPU that is not there becomes the CPU", _DEVICES,
        '    if choice == "cuda" and not torch.cuda.is_available():\n        raise', "    if False:\n        raise",
        _TEST_DEVICES + "test_a_gpu_that_is_not_there_is_refused",
    ),
    Mutant(
        "T0", "mapped pages that were written to are thrown away", "halfbyte/host.py",
        "and is_unwritten(fields)", "and fields",
        _TEST_DEVICES + "test_mapped_pages_are_given_back_and_read_again_but_not_those_written_to",
    ),
    Mutant(
        "T0", "mapped pages that were written to and swapped out are thrown away", "halfbyte/host.py", 'in ("Anonymous", "Swap")',
        'in ("Anonymous",)', _TEST_DEVICES + "test_a_mapping_is_unwritten_in_memory_and_in_swap",
    ),
    Mutant(
        "T0", "pages of a model's file pile up while it is packed", _QUANTIZER, "host.drop_mapped_pages(self.files)", "pass",
        _TEST_LOAD + "test_pages_of_the_files_go_back_while_a_model_is_packed_and_after",
    ),
    Mutant(
        "T0", "pages of a model's file stay after it is packed", "halfbyte/models/load.py",
        '    host.drop_mapped_pages(folder.glob("*.safetensors"))', "    pass",
        _TEST_LOAD + "test_pages_of_the_files_go_back_while_a_model_is_packed_and_after",
    ),
]
