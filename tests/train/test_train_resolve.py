"""Every "auto" of training becomes a number."""

import pytest
import torch

from halfbyte.config import RunConfig
from halfbyte.plan.search import BATCH_TOKENS
from halfbyte.train import resolve

CPU = torch.device("cpu")


def resolved(items: int = 100, eval_items: int = 10, longest: int = 100, params: int = 10**8, **settings: object) -> RunConfig:
    config = RunConfig.model_validate({"data": {"path": "rows.jsonl"}, **settings})
    return resolve.resolve(config, total_params=params, items=items, eval_items=eval_items, longest=longest, device=CPU)


@pytest.mark.parametrize(("items", "epochs", "max_steps", "expected"), [
    (100, 1.0, None, 7), (96, 1.0, None, 6), (100, 0.5, None, 4), (100, 2.0, None, 14),
    (5, 1.0, None, 1), (100, 1.0, 3, 3), (100, 0.1, None, 1),
])
def test_steps_count_windows_with_the_last_smaller_one(items: int, epochs: float, max_steps: int | None, expected: int) -> None:
    """T45: optimizer steps, not micro-batches."""
    train = {"max_steps": max_steps} if max_steps else {"epochs": epochs}
    for micro in (1, 4, 16):
        config = RunConfig.model_validate({"data": "rows.jsonl", "train": {**train, "micro_batch_size": micro}})
        assert resolve.total_steps(config, items) == expected


def test_rates_follow_method_and_size() -> None:
    assert resolved().optim.learning_rate == 5e-4
    assert resolved(params=8 * 10**9).optim.learning_rate == 2e-4
    assert resolved(method="full").optim.learning_rate == pytest.approx(5e-5)
    assert resolved(optim={"learning_rate": 1e-3}).optim.learning_rate == 1e-3


def test_micro_batches_divide_the_window_and_keep_to_the_token_budget() -> None:
    for longest in (10, 64, 100, 1024, 5000):
        size = resolved(longest=longest).train.micro_batch_size
        assert isinstance(size, int)
        assert 16 % size == 0
        assert size == 1 or size * longest <= BATCH_TOKENS["cpu"]
    assert resolved(train={"micro_batch_size": 2}).train.micro_batch_size == 2


def test_evaluations_and_saves_are_about_eight() -> None:
    train = resolved(items=1600).train
    assert train.eval_every_steps == train.save_every_steps == 13
    assert resolved(items=1600, eval_items=0).train.eval_every_steps is None
    assert resolved(train={"save_every_steps": None}).train.save_every_steps is None


def test_nothing_is_left_to_chance() -> None:
    config = resolved()
    assert "auto" not in (*config.train.model_dump().values(), *config.optim.model_dump().values())


@pytest.mark.parametrize(("said", "threads"), [
    ("3", 3), ("2,1", 2), (" 5 ", 5), ("9999", 1024), ("", 7), ("0", 7), ("-1", 7), ("many", 7), ("\u0663", 7), ("7", 7),
])  # fmt: skip
def test_the_number_of_threads_somebody_set_is_obeyed(
    said: str, threads: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it is told why; what is no number leaves one for each core, and the setting itself beats the variable."""
    monkeypatch.setattr(resolve.host, "usable_cores", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert resolved().train.threads == threads
    assert (f"train.threads={threads}: OMP_NUM_THREADS is set; there are 7 cores" in capsys.readouterr().err) == (threads != 7)
    assert resolved(train={"threads": 4}).train.threads == 4 and not capsys.readouterr().err
