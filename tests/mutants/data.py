"""Deliberate bugs in the data unit."""

from tests.mutants.mutant import Mutant

TEMPLATES, PACKING = "tests/data/test_data_templates.py", "tests/data/test_data_packing.py"
BATCHES, LOAD, BAD = "tests/data/test_data_batches.py", "tests/data/test_data_load.py", "tests/data/test_data_bad_input.py"

MUTANTS = [
    Mutant(
        trap="T7", name="labels of the pad token are ignored, so the end token is never trained", file="halfbyte/data/batches.py",
        find="labels = padded([[IGNORED, *item.labels[1:]] for item in examples], IGNORED)",
        replace="labels = padded([[IGNORED, *item.labels[1:]] for item in examples], IGNORED)\n    labels[labels == pad_id] = IGNORED",
        test=f"{BATCHES}::test_pad_token_equal_to_end_token_keeps_the_end_trained",
    ),
    Mutant(
        trap="T7", name="the mask is made from the pad token's number", file="halfbyte/data/batches.py",
        find="mask = None if min(lengths) == width else padded([[1] * length for length in lengths], 0)",
        replace="mask = None if min(lengths) == width else (ids != pad_id).long()",
        test=f"{BATCHES}::test_pad_token_equal_to_end_token_keeps_the_end_trained",
    ),
    Mutant(
        trap="T8", name="the stop token is left out of the span", file="halfbyte/data/spans.py",
        find="return (match.end(), match[0].strip()) if match else (end, \"\")",
        replace="return (end, match[0].strip()) if match else (end, \"\")",
        test=f"{TEMPLATES}::test_the_stop_token_is_trained_once_though_it_pads",
    ),
    Mutant(
        trap="T8", name="rows without a stop token are accepted", file="halfbyte/data/tokenize.py",
        find="if any(isinstance(sample, Conversation) for sample in samples):",
        replace="if not samples:",
        test=f"{TEMPLATES}::test_a_template_that_closes_answers_with_nothing_is_refused",
    ),
    Mutant(
        trap="T9", name="the begin token is put before a text that has one", file="halfbyte/data/encoding.py",
        find="            (made.ids, made.offsets) if not stretches else",
        replace="            ([made.ids[0], *made.ids], [(0, 0), *made.offsets]) if not stretches else",
        test=f"{TEMPLATES}::test_text_equals_transformers",
    ),
    Mutant(
        trap="T10", name="without generation tags nothing is trained", file="halfbyte/data/spans.py",
        find="        spans.append((begin, close))",
        replace="        spans.append((close, close))",
        test="tests/data/test_data_labels_oracle.py::test_labels_equal_the_character_oracle",
    ),
    Mutant(
        trap="T11", name="an answer at place 0 counts as not found", file="halfbyte/data/spans.py",
        find="    return at if at >= 0 and marked[:at] + marked[at + 1 :] == text else None",
        replace="    return at if at > 0 and marked[:at] + marked[at + 1 :] == text else None",
        test=f"{TEMPLATES}::test_an_answer_may_be_the_first_text_of_all",
    ),
    Mutant(
        trap="T11", name="space around an answer is taken for the answer's end", file="halfbyte/data/spans.py",
        find='    return sorted({len(text), len(text.rstrip("\\n")), len(text.rstrip())}, reverse=True)',
        replace="    return [len(text)]",
        test=f"{TEMPLATES}::test_assistant_first_and_trailing_space",
    ),
    Mutant(
        trap="T12", name="spans are counted as lengths of rendered prefixes", file="halfbyte/data/spans.py",
        find="        begin = _start(text, start, before, turns, inside)\n",
        replace="        prefix = render_all([job(_dicts(conversation)[:number], conversation.tools, prompt=True)])[0]\n"
        "        begin = len(prefix) if isinstance(prefix, str) else None\n",
        test=f"{TEMPLATES}::test_prefix_of_a_rewriting_template_is_no_prefix_of_the_whole",
    ),
    Mutant(
        trap="T13", name="what the generation prompt supplies is trained", file="halfbyte/data/spans.py",
        find="    return end if inside or end > start else start",
        replace="    return end if inside else start",
        test=f"{TEMPLATES}::test_what_the_generation_prompt_supplies_is_not_trained",
    ),
    Mutant(
        trap="T13", name="the empty reasoning that the template adds is trained", file="halfbyte/data/spans.py",
        find="    return end if inside or end > start else start",
        replace="    return end",
        test=f"{TEMPLATES}::test_empty_reasoning_that_the_template_adds_is_not_trained",
    ),
    Mutant(
        trap="T14", name="an answer is searched in the text instead of marked", file="halfbyte/data/spans.py",
        find="    places = _places(text, with_marks, wanted) or _search(render_all, conversation, wanted, text)",
        replace="    places = [(text.find(conversation.messages[one].content), text.find(conversation.messages[one].content)\n"
        "               + len(conversation.messages[one].content), False) for one in wanted]",
        test=f"{TEMPLATES}::test_the_answer_that_stands_in_the_question_is_found_in_its_own_place",
    ),
    Mutant(
        trap="T14", name="a row whose answer is not found is kept without labels", file="halfbyte/data/spans.py",
        find="    if isinstance(places, Problem):\n        return places",
        replace="    if isinstance(places, Problem):\n        return text, [], [], turns.stops[0]",
        test=f"{TEMPLATES}::test_an_answer_that_the_template_rewrites_is_refused",
    ),
    Mutant(
        trap="T15", name="a token over the border belongs to the prompt", file="halfbyte/data/encoding.py",
        find="        if span is not None and max(high, low + 1) > span[0]:",
        replace="        if span is not None and low >= span[0]:",
        test=f"{TEMPLATES}::test_a_token_over_the_border_belongs_to_the_answer",
    ),
    Mutant(
        trap="T16", name="labels that were shifted before are accepted", file="halfbyte/data/samples.py",
        find="    if wrong is not None:",
        replace="    if wrong is not None and len(labels) != len(ids):",
        test=f"{BAD}::test_bad_data_gives_its_block[shifted labels]",
    ),
    Mutant(
        trap="T17", name="a long row loses the end of its answer", file="halfbyte/data/tokenize.py",
        find="        cut = cut_prompt(example, limit, bos_id) if long_rows == \"cut-prompt\" else None",
        replace="        cut = replace(example, input_ids=example.input_ids[:limit], labels=example.labels[:limit])",
        test=f"{PACKING}::test_ten_thousand_truncations_never_eat_an_answer",
    ),
    Mutant(
        trap="T17", name="cutting the prompt goes on into the answer", file="halfbyte/data/tokenize.py",
        find="    if away + (not keeps_bos) > first:",
        replace="    if away > len(example.input_ids):",
        test=f"{PACKING}::test_ten_thousand_truncations_never_eat_an_answer",
    ),
    Mutant(
        trap="T18", name="rows without an answer are kept", file="halfbyte/data/tokenize.py",
        find='    return "an empty assistant message" if empty else ""',
        replace='    return ""',
        test=f"{LOAD}::test_what_is_dropped_is_counted_and_told",
    ),
    Mutant(
        trap="T19", name="the model keeps a cache, so it does not look at the positions", file="halfbyte/data/batches.py",
        find='{"input_ids": batch.input_ids, "use_cache": False}',
        replace='{"input_ids": batch.input_ids, "use_cache": True}',
        test=f"{PACKING}::test_changing_one_packed_sample_leaves_the_others_bitwise_equal",
    ),
    Mutant(
        trap="T19", name="packed rows get a mask of ones", file="halfbyte/data/batches.py",
        find='        inputs["position_ids"] = batch.positions\n',
        replace='        inputs["position_ids"] = batch.positions\n        inputs["attention_mask"] = torch.ones_like(batch.input_ids)\n',
        test=f"{PACKING}::test_changing_one_packed_sample_leaves_the_others_bitwise_equal",
    ),
    Mutant(
        trap="T20", name="positions run on over the samples", file="halfbyte/data/packing.py",
        find="        positions += range(length)",
        replace="        positions += range(len(positions), len(positions) + length)",
        test=f"{PACKING}::test_positions_restart_per_sample_and_run_on_through_padding",
    ),
    Mutant(
        trap="T20", name="padding of packed rows has position 0", file="halfbyte/data/batches.py",
        find="*range(item.positions[-1] + 1, item.positions[-1] + 1 + width - len(item.positions))",
        replace="*([0] * (width - len(item.positions)))",
        test=f"{PACKING}::test_positions_restart_per_sample_and_run_on_through_padding",
    ),
    Mutant(
        trap="T21", name="the first token of the next sample is a target", file="halfbyte/data/packing.py",
        find="        labels += [IGNORED, *one.labels[1:]]",
        replace="        labels += one.labels",
        test=f"{PACKING}::test_first_label_of_every_packed_sample_is_ignored",
    ),
    Mutant(
        trap="T22", name="packing drops a sample that fills a row", file="halfbyte/data/packing.py",
        find="        made[group].append(number)",
        replace="        if room != lengths[number] or not made[group]:\n            made[group].append(number)",
        test=f"{PACKING}::test_three_hundred_packings_conserve_every_token",
    ),
    Mutant(
        trap="T22", name="packed rows may be one token over the limit", file="halfbyte/data/packing.py",
        find="        at = bisect.bisect_left(rooms, (lengths[number], -1))",
        replace="        at = bisect.bisect_left(rooms, (lengths[number] - 1, -1))",
        test=f"{PACKING}::test_three_hundred_packings_conserve_every_token",
    ),
    Mutant(
        trap="T69", name="the reported stop token is not the trained one", file="halfbyte/data/tokenize.py",
        find="    return text, int(token)",
        replace="    return tokenizer.eos_token, tokenizer.eos_token_id",
        test=f"{TEMPLATES}::test_the_stop_token_is_trained_once_though_it_pads",
    ),
    Mutant(
        trap="T70", name="the order of rows is drawn from the global generator", file="halfbyte/data/batches.py",
        find="        return list(torch.randperm(len(self.items), generator=generator).tolist())",
        replace="        return list(torch.randperm(len(self.items)).tolist())",
        test=f"{BATCHES}::test_order_is_a_pure_function_of_seed_and_epoch",
    ),
    Mutant(
        trap="T70", name="iterating draws from the global generator", file="halfbyte/data/batches.py",
        find="            generator=torch.Generator().manual_seed(self.seed),  # otherwise iterating draws from the global generator\n",
        replace="",
        test=f"{BATCHES}::test_iterating_leaves_the_global_generator_alone",
    ),
    Mutant(
        trap="T70", name="the cursor forgets the step", file="halfbyte/data/batches.py",
        find='int(state["epoch"]), int(state["step"])',
        replace='int(state["epoch"]), 0',
        test=f"{BATCHES}::test_cursor_resumes_at_every_window",
    ),
    Mutant(
        trap="T71", name="the tokenizer is not in the digest", file="halfbyte/data/load.py",
        find="        Encoder(tokenizer).identity,\n",
        replace='        "",\n',
        test=f"{LOAD}::test_the_digest_changes_with_everything_that_decides_the_tokens[the tokenizer]",
    ),
    Mutant(
        trap="T71", name="the template is not in the digest", file="halfbyte/data/load.py",
        find='        template.identity() if template else "",\n',
        replace='        "",\n',
        test=f"{LOAD}::test_the_digest_changes_with_everything_that_decides_the_tokens[a remark in the template]",
    ),
    Mutant(
        trap="T71", name="the file's bytes are not in the digest", file="halfbyte/data/load.py",
        find="        rows.digest,\n",
        replace='        "",\n',
        test=f"{LOAD}::test_the_digest_changes_with_everything_that_decides_the_tokens[a byte of the file]",
    ),
]
