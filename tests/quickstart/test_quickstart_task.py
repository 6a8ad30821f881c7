"""The tour's rows: enough of them, none shared, none that a trick answers."""

import json

import pytest

from halfbyte.quickstart import task


def test_rows_are_enough_and_held_out_shares_no_row_and_no_filling() -> None:
    train, held_out = task.make()
    assert len(train) >= 500 and len(held_out) >= 100
    assert not {row.request for row in train} & {row.request for row in held_out}
    assert not {row.filling for row in train} & {row.filling for row in held_out}
    assert not {row.answer for row in train} & {row.answer for row in held_out}
    assert len({row.answer for row in held_out}) >= 50
    assert len({row.request for row in train}) == len(train)


def test_no_trick_answers_more_than_one_in_twenty() -> None:
    train, held_out = task.make()
    assert task.commonest_share(held_out) <= 0.05
    assert task.copy_share(held_out) <= 0.05
    commonest_of_training = max((row.answer for row in train), key=[row.answer for row in train].count)
    assert sum(row.answer == commonest_of_training for row in held_out) / len(held_out) <= 0.05


def test_every_answer_is_compact_json_that_says_what_was_asked() -> None:
    skills = {skill.name: skill for skill in task.SKILLS}
    for row in (rows for part in task.make() for rows in part):
        answer = json.loads(row.answer)
        assert json.dumps(answer, separators=(",", ":")) == row.answer
        skill = skills[answer.pop("do")]
        assert list(answer) == list(skill.slots)
        for (slot, table), word in zip(skill.slots.items(), row.filling[1:]):
            assert word.lower() in row.request.lower()
            assert answer[slot] == table[word]


def test_the_seed_decides_everything() -> None:
    assert task.make(seed=3) == task.make(seed=3)
    assert task.make(seed=3) != task.make(seed=4)


def test_every_value_of_a_held_out_row_is_met_in_training() -> None:
    train, held_out = task.make()
    known = {(row.filling[0], position, word) for row in train for position, word in enumerate(row.filling[1:])}
    assert all((row.filling[0], position, word) in known for row in held_out for position, word in enumerate(row.filling[1:]))


def test_more_rows_than_the_tables_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="too few to hold"):
        task.make(held_out_rows=5000)
    with pytest.raises(ValueError, match="training rows"):
        task.make(train_rows=50_000)
