"""Truncation and packing conserve tokens; packed samples do not see each other."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from halfbyte.data.batches import Batches, collate, model_inputs
from halfbyte.data.faults import Problem
from halfbyte.data.packing import groups, pack
from halfbyte.data.tokenize import IGNORED, Example, _Tally, cut_prompt, fit
from halfbyte.errors import DataError


def example(row: int, prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """A row whose answer is trained."""
    labels = [IGNORED] * len(prompt) + list(answer)
    return Example([*prompt, *answer], [IGNORED, *labels[1:]], row, f"row {row}")


def random_example(chance: random.Random, row: int, longest: int, first: int = 3) -> Example:
    prompt = [chance.randrange(first, 500) for _ in range(chance.randint(0, longest))]
    answer = [chance.randrange(first, 500) for _ in range(chance.randint(1, longest))]
    return example(row, prompt, answer)


def test_ten_thousand_truncations_never_eat_an_answer() -> None:
    """Kept, cut or dropped: the answer is whole, the cut is the left of the prompt, and every token is accounted for.  # T17"""
    chance = random.Random(0)
    outcomes: Counter[str] = Counter()
    for case in range(10_000):
        one = random_example(chance, case, 40)
        if chance.random() < 0.5:
            one = Example([1, *one.input_ids], [IGNORED, IGNORED if len(one.labels) == 1 else one.input_ids[0] if one.labels[0] != IGNORED
                                                else IGNORED, *one.labels[1:]], case, "bos")
        limit = chance.randint(1, 80)
        way = chance.choice(["drop", "cut-prompt", "refuse"])
        answer = [label for label in one.labels if label != IGNORED]
        tally, problems = _Tally(), list[Problem]()
        made = fit(one, limit, way, 1, tally, problems)
        length = len(one.input_ids)
        assert tally.tokens_in == length
        assert tally.tokens_out == (0 if made is None else len(made.input_ids))
        if made is None:
            outcomes["refused" if problems else "dropped"] += 1
            assert problems or sum(tally.dropped.values()) == 1
            assert not answer or length > limit
            continue
        assert len(made.input_ids) <= limit and len(made.labels) == len(made.input_ids) and made.labels[0] == IGNORED
        assert [label for label in made.labels if label != IGNORED] == answer
        assert all(label in (IGNORED, token) for label, token in zip(made.labels, made.input_ids))
        if length <= limit:
            outcomes["kept"] += 1
            assert made == one
        else:
            outcomes["cut"] += 1
            assert way == "cut-prompt" and len(made.input_ids) == limit and tally.cut == 1
            begin = one.input_ids[0] == 1
            assert made.input_ids[begin:] == one.input_ids[length - limit + begin:] and (not begin or made.input_ids[0] == 1)
    assert min(outcomes[name] for name in ("kept", "cut", "dropped", "refused")) > 500, outcomes


def test_cutting_stops_before_the_token_that_predicts_the_answer() -> None:
    """One token stays before the answer; a row whose answer alone is too long is dropped.  # T17"""
    one = example(0, [5, 6, 7], [8, 9])
    cut = cut_prompt(one, 3, None)
    assert cut is not None and (cut.input_ids, cut.labels) == ([7, 8, 9], [IGNORED, 8, 9])
    assert cut_prompt(one, 2, None) is None
    assert cut_prompt(example(0, [1, 6, 7], [8, 9]), 3, 1) is not None
    assert cut_prompt(example(0, [1, 6, 7], [8, 9]), 2, 1) is None


def test_three_hundred_packings_conserve_every_token() -> None:
    """Each sample is in exactly one row, whole and in order; labels are the sample's but the first; no row is over the limit.  # T22"""
    chance = random.Random(1)
    for _ in range(300):
        limit = chance.randint(8, 200)
        made = [random_example(chance, row, limit // 2) for row in range(chance.randint(1, 60))]
        packed = pack(made, limit)
        seen: list[int] = []
        for row in packed:
            assert len(row.input_ids) == len(row.labels) == len(row.segment_ids) == len(row.positions) <= limit
            at = 0
            for segment, number in enumerate(row.rows):
                one = made[number]
                stretch = slice(at, at + len(one.input_ids))
                assert row.input_ids[stretch] == one.input_ids
                assert row.labels[stretch] == [IGNORED, *one.labels[1:]]
                assert row.positions[stretch] == list(range(len(one.input_ids)))
                assert row.segment_ids[stretch] == [segment] * len(one.input_ids)
                at += len(one.input_ids)
                seen.append(number)
            assert at == len(row.input_ids)
        assert sorted(seen) == list(range(len(made)))


def test_first_label_of_every_packed_sample_is_ignored() -> None:
    """Where positions restart, the token is no target, also when the sample came with a label there.  # T21"""
    packed = pack([Example([4, 5], [4, 5], 0), Example([6, 7, 8], [6, 7, 8], 1)], 8)
    assert len(packed) == 1
    assert [label for label, position in zip(packed[0].labels, packed[0].positions) if position == 0] == [IGNORED, IGNORED]
    assert collate(packed, 0).trained_tokens == 3


def test_best_fit_fills_rows() -> None:
    """The longest first, into the row with the least room that takes it."""
    assert groups([4, 2, 3, 6, 2], 6) == [[3], [0, 1], [2, 4]]
    assert groups([], 6) == []


def test_a_sample_over_the_limit_is_refused_by_packing() -> None:
    """Packing never cuts."""
    with pytest.raises(DataError, match="E-DATA-070"):
        pack([example(0, [1] * 8, [2])], 8)


def packed_batch() -> list[Any]:
    """Two packed rows of different length and different cuts."""
    chance = random.Random(2)
    return [pack([random_example(chance, row, size) for row in range(3)], 200)[0] for size in (12, 9)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_changing_one_packed_sample_leaves_the_others_bitwise_equal(attention: str, tiny_llama: Callable[..., Any]) -> None:
    """Also in a batch of two rows with padding; and packed logits are those of the sample by itself.  # T19 T20"""
    model = tiny_llama(attn_implementation=attention, tie_word_embeddings=False)
    rows = packed_batch()
    batch = collate(rows, pad_id=0)
    with torch.no_grad():
        before = model(**model_inputs(batch)).logits
    for number, row in enumerate(rows):
        for segment in set(row.segment_ids):
            here = torch.zeros_like(batch.input_ids, dtype=torch.bool)
            here[number, : len(row.segment_ids)] = torch.tensor(row.segment_ids) == segment
            changed = batch.input_ids.clone()
            changed[here] = (changed[here] + 17) % 500
            with torch.no_grad():
                after = model(**(model_inputs(batch) | {"input_ids": changed})).logits
            others = ~here & (batch.segment_ids >= 0)
            assert torch.equal(before[others], after[others]), (attention, number, segment)
            assert not torch.equal(before[here], after[here])
            with torch.no_grad():
                alone = model(input_ids=batch.input_ids[here][None], use_cache=False).logits[0]
            torch.testing.assert_close(before[here], alone, rtol=1e-5, atol=1e-5)


def test_positions_restart_per_sample_and_run_on_through_padding() -> None:
    """The exact list.  # T20"""
    batch = collate([pack([Example([5, 6, 7], [5, 6, 7], 0), Example([8, 9], [8, 9], 1)], 8)[0], pack([Example([5], [5], 2)], 8)[0]], 0)
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert batch.segment_ids is not None and batch.segment_ids.tolist() == [[0, 0, 0, 1, 1], [0, -1, -1, -1, -1]]
    assert batch.attention_mask is None and batch.rows == [0, 1, 2]


def test_packing_and_padding_train_the_same_tokens() -> None:
    """The count of labels is that of the samples, however they are put together.  # T3"""
    chance = random.Random(3)
    made = [random_example(chance, row, 20) for row in range(50)]
    wanted = sum(label != IGNORED for one in made for label in one.labels[1:])
    for items in (made, pack(made, 64)):
        batches = Batches(items, micro_batch_size=3, global_batch_size=8, seed=0, pad_id=2)
        assert sum(batch.trained_tokens for window in batches.epoch(0) for batch in window) == wanted
