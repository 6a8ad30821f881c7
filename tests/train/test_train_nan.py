"""Steps that are not finite: where they are seen, what each policy does, what is never saved."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte.errors import NumericError
from halfbyte.lora.tensors import adapter_tensors
from halfbyte.train import checkpoint, loop, metrics, numeric_check
from halfbyte.train.loop import TrainResult
from tests.train.tiny_runs import Quiet, adapted, assembled, config, data, uneven

Tiny = Callable[..., nn.Module]
ROWS = 40


class Poison(nn.Module):
    """Multiplies a layer's output by NaN in the forward passes of chosen rows, told by a token that only they hold."""

    def __init__(self, base: nn.Module, tokens: set[int]) -> None:
        super().__init__()
        self.base, self.tokens, self.armed = base, tokens, True

    def forward(self, ids: Tensor) -> Tensor:
        found = self.base(ids)
        if self.armed and self.training and bool(torch.isin(ids, torch.tensor(sorted(self.tokens))).any()):
            return found * math.nan
        return found


def poisoned(tiny_llama: Tiny, tokens: set[int]) -> tuple[nn.Module, Poison]:
    """An adapted model that gives NaN on the tokens."""
    model = adapted(tiny_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    poison = Poison(model.model.embed_tokens, tokens)
    model.model.embed_tokens = poison
    return model, poison


def rows_with(tokens: dict[int, int]) -> list[Any]:
    """Rows of which row r holds tokens[r], a number no other row holds."""
    items = uneven(ROWS, seed=2)
    for item in items:
        item.input_ids[:] = [3 + number % 400 for number in item.input_ids]
        if item.row in tokens:
            item.input_ids[0] = tokens[item.row]
    return items


def rows_of_step(tmp_path: Path, tiny_llama: Tiny, **settings: Any) -> dict[int, list[int]]:
    """step -> rows, from a healthy run of the same settings."""
    model, _ = poisoned(tiny_llama, {511})
    result = run(model, tmp_path / "healthy", rows_with({}), **settings)[0]
    return {record["step"]: record["rows"] for record in result.history if "loss" in record}


def run(model: nn.Module, out: Path, rows: list[Any], **settings: Any) -> tuple[TrainResult, Quiet]:
    ear = Quiet()
    result = loop.run(config(out, **settings), assembled(model), data(rows, uneven(4, seed=9)), observers=[ear])
    return result, ear


def test_the_default_stops_at_the_step_and_everything_names_it(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T24: poison step 7: log, summary, exit code and message all show step 7."""
    row = rows_of_step(tmp_path, tiny_llama)[7][0]
    model, _ = poisoned(tiny_llama, {511})
    ear = Quiet()
    with pytest.raises(NumericError) as caught:
        loop.run(config(tmp_path / "run"), assembled(model), data(rows_with({row: 511}), uneven(4, seed=9)), observers=[ear])
    error = caught.value
    assert (error.exit_code, error.code) == (6, "E-NUM-304")
    assert error.place.startswith("step 7, output of model.embed_tokens (Poison), rows [")
    assert str(row) in error.remedy
    last = metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["step"] == 7
    assert math.isnan(last["loss"])
    assert math.isnan(ear.steps[-1]["loss"])
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("failed", 7, 1)
    assert "step 7" in summary["error"]
    bad = json.loads((tmp_path / "run" / "bad_batches.jsonl").read_text())
    assert (bad["step"], row in bad["rows"]) == (7, True)
    assert max(found.step for found in checkpoint.scan(tmp_path / "run" / "checkpoints").valid) == 6
    assert all(bool(torch.isfinite(value).all()) for value in adapter_tensors(model).values())


def test_skip_leaves_the_step_out_and_the_schedule_does_not_move(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T24: the weights after the run are those of a run in which the window was never there."""
    row = rows_of_step(tmp_path, tiny_llama)[4][0]
    settings = {"train.on_nan": "skip", "optim.schedule": "linear", "optim.final_lr_share": 0.0}
    model, _ = poisoned(tiny_llama, {511})
    result, ear = run(model, tmp_path / "run", rows_with({row: 511}), **settings)
    assert result.steps == 10
    records = [record for record in result.history if "loss" in record]
    assert [record["step"] for record in records if math.isnan(record["loss"])] == [4]
    shares = (0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    assert [record["lr"] for record in records] == pytest.approx([1e-2 * share for share in shares])
    assert ear.summary["skipped_steps"] == 1
    assert any("step 4 is left out" in note for note in ear.notes)
    assert not any("bad" in name for name, value in adapter_tensors(model).items() if not torch.isfinite(value).all())


def test_skip_gives_up_at_the_third_in_a_row(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T24."""
    steps = rows_of_step(tmp_path, tiny_llama)
    model, _ = poisoned(tiny_llama, {509, 510, 511})
    with pytest.raises(NumericError) as caught:
        run(model, tmp_path / "run", rows_with({steps[3][0]: 509, steps[4][0]: 510, steps[5][0]: 511}), **{"train.on_nan": "skip"})
    assert caught.value.place.startswith("step 5")
    assert "3 such steps in a row" in caught.value.found


def test_rollback_returns_and_leaves_the_windows_out(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Three bad steps in a row: back to the checkpoint of step 6, steps 7 to 9 left out; the same weights as if they had been skipped."""
    steps = rows_of_step(tmp_path, tiny_llama)
    rows = rows_with({steps[7][0]: 509, steps[8][0]: 510, steps[9][0]: 511})
    model, _ = poisoned(tiny_llama, {509, 510, 511})
    result, ear = run(model, tmp_path / "run", rows, **{"train.on_nan": "rollback"})
    assert result.steps == 10
    assert [record["step"] for record in result.history if "loss" in record] == [1, 2, 3, 4, 5, 6, 10]
    assert ear.summary["skipped_steps"] == 3
    assert any("back at step 6" in note for note in ear.notes)
    lines = (tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [7, 8, 9]
    kept = checkpoint.load_newest(tmp_path / "run" / "checkpoints").state.progress
    assert (kept.rollbacks, kept.bad_steps, kept.bad_in_a_row, kept.skipped_steps) == (1, [7, 8, 9], 0, 3)


def test_rollback_gives_up_after_three_returns(tiny_llama: Tiny, tmp_path: Path) -> None:
    """A model that is never healthy again must not go round for ever."""
    model, poison = poisoned(tiny_llama, set(range(512)))
    poison.armed = False
    ear = Quiet()

    def arm(record: dict[str, Any]) -> None:
        poison.armed = record["step"] >= 2

    ear.on_step = arm
    with pytest.raises(NumericError):
        loop.run(
            config(tmp_path / "run", **{"train.on_nan": "rollback", "train.max_steps": 40}), assembled(model),
            data(rows_with({}), uneven(4, seed=9)), observers=[ear],
        )
    assert sum("back at step" in note for note in ear.notes) == 3


def test_rollback_has_a_checkpoint_from_the_first_step_on(tiny_llama: Tiny, tmp_path: Path) -> None:
    steps = rows_of_step(tmp_path, tiny_llama)
    rows = rows_with({steps[1][0]: 509, steps[2][0]: 510, steps[3][0]: 511})
    model, _ = poisoned(tiny_llama, {509, 510, 511})
    result, ear = run(model, tmp_path / "run", rows, **{"train.on_nan": "rollback", "train.save_every_steps": 5})
    assert any("back at step 0" in note for note in ear.notes)
    assert [record["step"] for record in result.history if "loss" in record] == [4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_weight_that_is_nan_ends_the_run_and_is_named(tiny_llama: Tiny, tmp_path: Path, policy: str) -> None:
    """T42: leaving steps out cannot help when the weight itself is bad."""
    model, _ = poisoned(tiny_llama, {511})
    ear = Quiet()

    def break_weight(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.base.weight[0, 0] = math.nan

    ear.on_step = break_weight
    with pytest.raises(NumericError) as caught:
        loop.run(
            config(tmp_path / "run", **{"train.on_nan": policy, "train.eval_every_steps": None}), assembled(model), data(rows_with({})),
            observers=[ear],
        )
    assert "step 4, weight model.layers.0.self_attn.q_proj.base.weight" in caught.value.place


def test_a_model_with_nan_is_refused_before_the_first_step(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T42."""
    model, _ = poisoned(tiny_llama, {511})
    with torch.no_grad():
        model.lm_head.weight[5, 5] = math.inf
    with pytest.raises(NumericError) as caught:
        run(model, tmp_path / "run", rows_with({}))
    assert (caught.value.code, caught.value.place) == ("E-NUM-301", "step 0")
    assert "weight lm_head.weight (1 of" in caught.value.found


def test_the_full_scan_comes_every_fifty_steps(tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T42: also where the gradient stays finite: an optimizer tensor, or a weight of a layer that gets no gradient through it."""
    monkeypatch.setattr(numeric_check, "SCAN_EVERY_STEPS", 4)
    model, _ = poisoned(tiny_llama, {511})
    ear = Quiet()
    unused = nn.Parameter(torch.ones(3), requires_grad=False)
    model.register_parameter("unused", unused)

    def break_weight(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            unused.data[0] = math.nan

    ear.on_step = break_weight
    with pytest.raises(NumericError) as caught:
        loop.run(config(tmp_path / "run"), assembled(model), data(rows_with({})), observers=[ear])
    assert (caught.value.place, "weight unused" in caught.value.found) == ("step 4", True)


def test_an_update_that_makes_infinity_is_never_saved(tiny_llama: Tiny, tmp_path: Path) -> None:
    """A checkpoint holds finite numbers only; the ones before stay."""
    model, _ = poisoned(tiny_llama, {511})
    ear = Quiet()

    def overflow(record: dict[str, Any]) -> None:
        if record["step"] == 4:
            with torch.no_grad():
                next(value for name, value in model.named_parameters() if name.endswith("v_proj.lora_a"))[0, 0] = math.inf

    ear.on_step = overflow
    with pytest.raises(NumericError):
        loop.run(config(tmp_path / "run"), assembled(model), data(rows_with({})), observers=[ear])
    assert [found.step for found in checkpoint.scan(tmp_path / "run" / "checkpoints").valid] == [2]


def test_a_held_out_loss_that_is_nan_ends_the_run(tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T24: an evaluation cannot be left out of the choice of the best."""
    from halfbyte.evaluate.loss import EvalLoss

    monkeypatch.setattr("halfbyte.train.training.evaluate_loss", lambda *args, **kwargs: EvalLoss(math.nan, math.nan, 3))
    model, _ = poisoned(tiny_llama, {511})
    with pytest.raises(NumericError) as caught:
        run(model, tmp_path / "run", rows_with({}))
    assert caught.value.code == "E-NUM-303"
