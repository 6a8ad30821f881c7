"""Batches: order, windows, cursor, workers, padding."""

import random

import pytest
import torch

from halfbyte.data.batches import Batch, Batches, collate, model_inputs
from halfbyte.data.tokenize import IGNORED, Example


def examples(count: int = 37) -> list[Example]:
    chance = random.Random(0)
    made = []
    for row in range(count):
        ids = [chance.randrange(3, 90) for _ in range(chance.randint(2, 30))]
        made.append(Example(ids, [IGNORED, *ids[1:]], row))
    return made


def batches(workers: int = 0, seed: int = 5) -> Batches:
    return Batches(examples(), micro_batch_size=3, global_batch_size=8, seed=seed, pad_id=2, workers=workers)


def rows_of(windows: list[list[Batch]]) -> list[list[list[int]]]:
    return [[batch.rows for batch in window] for window in windows]


def test_every_row_once_per_epoch_and_the_last_window_is_kept() -> None:
    """37 rows in windows of 8: five windows, the last of five rows, each cut into micro-batches of at most three."""
    made = rows_of(list(batches().epoch(0)))
    assert len(made) == batches().steps_per_epoch == 5
    assert sorted(row for window in made for batch in window for row in batch) == list(range(37))
    assert [sum(map(len, window)) for window in made] == [8, 8, 8, 8, 5]
    assert all(len(batch) <= 3 for window in made for batch in window)


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    """Equal again, different in the next epoch and with another seed, whatever the global generator did."""
    first = rows_of(list(batches().epoch(0)))
    torch.manual_seed(99)
    assert rows_of(list(batches().epoch(0))) == first
    assert rows_of(list(batches().epoch(1))) != first
    assert rows_of(list(batches(seed=6).epoch(0))) != first


def test_iterating_leaves_the_global_generator_alone() -> None:
    """A run that stops and resumes draws the same dropout masks.  # T70"""
    before = torch.get_rng_state()
    list(batches().epoch(0))
    list(batches(workers=2).epoch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_workers_change_nothing() -> None:
    """0 and 2 workers give the same tensors in the same order."""
    for one, two in zip(batches().epoch(0), batches(workers=2).epoch(0), strict=True):
        for left, right in zip(one, two, strict=True):
            assert left.rows == right.rows and torch.equal(left.input_ids, right.input_ids) and torch.equal(left.labels, right.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_cursor_resumes_at_every_window(workers: int) -> None:
    """After k windows the rest is what an uninterrupted run sees, over the end of an epoch too; resuming twice is the same.  # T70"""
    whole = rows_of([*batches().epoch(0), *batches().epoch(1)])
    for taken in range(0, 10, 1 if workers == 0 else 4):
        source = batches(workers)
        epoch, seen = 0, 0
        while seen < taken:
            for _ in source.epoch(epoch):
                seen += 1
                if seen == taken:
                    break
            epoch += 1
        resumed = batches(workers)
        for _ in range(2):
            resumed.load_state_dict(source.state_dict())
            rest = []
            for number in range(resumed.state_dict()["epoch"], 2):
                rest += rows_of(list(resumed.epoch(number)))
            assert rest == whole[taken:], taken


def test_pad_token_equal_to_end_token_keeps_the_end_trained() -> None:
    """Padding is found by length, never by the token's number, and padding carries no label.  # T7"""
    batch = collate([Example([5, 6, 2], [IGNORED, 6, 2], 0), Example([5, 2], [IGNORED, 2], 1)], pad_id=2)
    assert batch.labels.tolist() == [[IGNORED, 6, 2], [IGNORED, 2, IGNORED]]
    assert batch.attention_mask is not None and batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.trained_tokens == 3


def test_pad_token_zero_is_a_pad_token() -> None:
    """Number 0 is a token like any other: it pads, and inside a row it is trained."""
    batch = collate([Example([5, 0, 7], [IGNORED, 0, 7], 0), Example([5, 0], [IGNORED, 0], 1)], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 0, 7], [5, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 0, 7], [IGNORED, 0, IGNORED]]
    assert batch.attention_mask is not None and batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_rows_of_one_length_need_no_mask() -> None:
    """No mask without padding; and never a cache, which would hide the positions of packed rows."""
    batch = collate([Example([5, 6], [IGNORED, 6], 0), Example([7, 8], [IGNORED, 8], 1)], pad_id=0)
    assert batch.attention_mask is None
    assert model_inputs(batch).keys() == {"input_ids", "use_cache"} and model_inputs(batch)["use_cache"] is False


def test_classes_are_labels_of_rows() -> None:
    """For classification a label is one class per row."""
    batch = collate([Example([5, 6], [IGNORED] * 2, 0, label=1), Example([7], [IGNORED], 1, label=0)], pad_id=0)
    assert batch.labels.tolist() == [1, 0] and batch.trained_tokens == 2


def test_windows_pad_little() -> None:
    """Micro-batches of a window hold rows of similar length."""
    for window in batches().epoch(0):
        widths = [batch.input_ids.shape[1] for batch in window]
        assert widths == sorted(widths)
