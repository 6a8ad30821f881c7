"""Bugs put into loading, saving, generation and held-out scores on purpose."""

from tests.mutants.mutant import Mutant

_EVAL_LOSS, _TEST_EVAL = "halfbyte/evaluate/loss.py", "tests/evaluate/test_evaluate_scores.py::"
_GENERATE, _TEST_GENERATE = "halfbyte/models/generate.py", "tests/models/test_models_generate.py::"
_MODES = "halfbyte/models/modes.py"
_ROPE, _TEST_LOAD = "halfbyte/models/rope.py", "tests/models/test_models_load.py::"
_QUANTIZER = "halfbyte/models/quantizer.py"
_SAVE, _TEST_SAVE = "halfbyte/models/save.py", "tests/models/test_models_save.py::"

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
        "T56", "a pattern matches parts of words", _QUANTIZER, 'f".{pattern}." in f".{name}."', "pattern in name",
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
]
