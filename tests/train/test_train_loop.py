"""Whole runs of the loop on tiny models: what trains, what is logged, kept and delivered."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte.config import load_config
from halfbyte.errors import ConfigError, Interrupted, NumericError
from halfbyte.formats import peft
from halfbyte.lora.tensors import adapter_tensors
from halfbyte.train import checkpoint, loop, metrics
from halfbyte.train.faults import FaultStop
from halfbyte.train.loop import TrainResult
from tests.train.tiny_runs import Quiet, adapted, assembled, classes, config, data, examples, uneven, window

Tiny = Callable[..., nn.Module]


def small(tiny_llama: Tiny, **overrides: Any) -> nn.Module:
    return tiny_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1, **overrides)


def train(
    model: nn.Module, out: Path, *, rows: int = 16, held_out: int = 6, resume: bool = False, **settings: Any
) -> tuple[TrainResult, Quiet]:
    ear = Quiet()
    held = uneven(held_out, seed=9) if held_out else []
    result = loop.run(config(out, **settings), assembled(model), data(uneven(rows), held), resume=resume, observers=[ear])
    return result, ear


def steps(result: TrainResult) -> list[dict[str, Any]]:
    return [record for record in result.history if "loss" in record]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_one_loop_trains_all_three_methods(tiny_llama: Tiny, tmp_path: Path, method: str) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    if method == "qlora":
        from halfbyte.quant.dense import is_linear_like
        from halfbyte.quant.linear import QuantLinear
        from halfbyte.surgery import modules_of, replace

        for name, layer in modules_of(model, lambda name, module: is_linear_like(module) and "lm_head" not in name):
            replace(model, name, QuantLinear.from_linear(layer, "nf4", 64, True, name))
    if method != "full":
        model = adapted(model, awake=False)
    frozen = {name: value.detach().clone() for name, value in model.named_parameters() if not value.requires_grad}
    result, ear = train(model, tmp_path / "run", method=method, **{"train.epochs": 5.0})
    assert result.steps == result.total_steps == 20
    assert steps(result)[-1]["loss"] < steps(result)[0]["loss"]
    assert result.last_eval_loss is not None
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in frozen.items())
    assert (result.adapter_folder is None, result.model_folder is None) == ((True, False) if method == "full" else (False, True))
    assert ear.summary["status"] == "finished"
    assert ear.header.total_steps == 20


def test_records_hold_what_happened(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Loss, count, rows and rate of every step, on disk as they were announced; NaN-free lines of strict JSON."""
    result, ear = train(adapted(small(tiny_llama)), tmp_path / "run", rows=10, **{"train.epochs": 2.0})
    assert metrics.read(tmp_path / "run" / "metrics.jsonl") == result.history
    assert [record for record in result.history if "loss" in record] == ear.steps
    assert [len(record["rows"]) for record in ear.steps] == [4, 4, 2, 4, 4, 2]
    assert sorted(row for record in ear.steps[:3] for row in record["rows"]) == list(range(10))
    lengths = {item.row: item for item in uneven(10)}
    for record in ear.steps:
        batch = window([lengths[row] for row in record["rows"]], 4)
        assert record["trained_tokens"] == sum(one.trained_tokens for one in batch)
        assert record["tokens"] == sum(len(lengths[row].input_ids) for row in record["rows"])
        assert record["memory_bytes"] > 2**20
    assert result.tokens == sum(record["trained_tokens"] for record in ear.steps)
    assert [record["epoch"] for record in ear.steps] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_runs_with_other_micro_batches_end_with_the_same_weights(tiny_llama: Tiny, tmp_path: Path, micro: int) -> None:
    """T1, T2, T45: 20 rows in windows of 6, the last of 2; losses, rates and weights do not depend on the cut."""
    ends = []
    for size in (6, micro):
        model = adapted(small(tiny_llama)).double()
        result, _ = train(
            model, tmp_path / f"run{size}{len(ends)}", rows=20,
            **{"train.global_batch_size": 6, "train.micro_batch_size": size, "train.epochs": 2.0, "optim.schedule": "cosine"},
        )
        ends.append((adapter_tensors(model), steps(result)))
    for name, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], value, rtol=1e-6, atol=1e-9)
    for one, other in zip(ends[0][1], ends[1][1]):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
        assert (one["lr"], one["rows"], one["trained_tokens"]) == (other["lr"], other["rows"], other["trained_tokens"])


def test_rates_follow_optimizer_steps(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T45: the logged rate is the closed form over all windows, and the one that the optimizer used."""
    result, _ = train(
        adapted(small(tiny_llama)), tmp_path / "run", rows=18,
        **{"optim.warmup_steps": 2, "optim.schedule": "linear", "optim.final_lr_share": 0.0, "train.micro_batch_size": 1},
    )
    assert [record["lr"] for record in steps(result)] == pytest.approx([5e-3, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3, 0.0])


def test_packed_runs_count_steps_after_packing(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T45: the schedule ends with the packed windows, not with the rows."""
    result, _ = train(
        adapted(small(tiny_llama)), tmp_path / "run", rows=40, held_out=0,
        **{"data.packing": True, "optim.schedule": "linear", "optim.final_lr_share": 0.0, "train.save_every_steps": None},
    )
    assert result.total_steps < 10
    assert len(steps(result)) == result.total_steps
    assert steps(result)[-1]["lr"] == 0.0
    assert sorted(row for record in steps(result) for row in record["rows"]) == list(range(40))


@pytest.mark.parametrize(("settings", "expected"), [
    ({"train.epochs": 0.5}, 2), ({"train.epochs": 1.5}, 6), ({"train.max_steps": 3}, 3), ({"train.max_steps": 9}, 9),
])
def test_the_length_is_as_asked(tiny_llama: Tiny, tmp_path: Path, settings: dict[str, Any], expected: int) -> None:
    result, _ = train(adapted(small(tiny_llama)), tmp_path / "run", **settings)
    assert result.steps == expected


def test_the_best_weights_are_delivered(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T72: held-out loss goes down, then up; the adapter on disk and in the model is of the best evaluation, and its checkpoint is kept."""
    model = adapted(small(tiny_llama), awake=False)
    same = uneven(4)
    ear = Quiet()
    rate = {"optim.learning_rate": 0.05, "optim.schedule": "constant", "train.max_steps": 12, "train.keep_checkpoints": 1}
    result = loop.run(config(tmp_path / "run", **rate), assembled(model), data(same, uneven(4, seed=1)), observers=[ear])
    losses = {record["step"]: record["eval_loss"] for record in ear.evaluations}
    best = min((step for step in losses if step > 0), key=lambda step: losses[step])
    assert best < 12, "the rows were learnt by heart without the held-out loss rising; the test needs a higher rate"
    assert (result.best_step, result.delivered_step, result.best_eval_loss) == (best, best, losses[best])
    from halfbyte.evaluate.loss import evaluate_loss

    assert evaluate_loss(model, window(uneven(4, seed=1), 2)).loss == pytest.approx(losses[best], rel=1e-6)
    saved = peft.read(tmp_path / "run" / "adapter").tensors
    assert all(torch.equal(value, saved[name]) for name, value in adapter_tensors(model).items())
    kept = [found.step for found in checkpoint.scan(tmp_path / "run" / "checkpoints").valid]
    assert sorted(kept) == sorted({best, 12})


def test_the_last_weights_are_delivered_when_asked(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T44: keep_best: false."""
    model = adapted(small(tiny_llama), awake=False)
    rate = {"optim.learning_rate": 0.05, "optim.schedule": "constant", "train.max_steps": 12, "train.keep_best": False}
    result = loop.run(config(tmp_path / "run", **rate), assembled(model), data(uneven(4), uneven(4, seed=1)), observers=[])
    assert result.delivered_step == 12
    assert result.best_step != 12


def test_early_stopping_counts_evaluations_without_gain(tiny_llama: Tiny, tmp_path: Path) -> None:
    model = adapted(small(tiny_llama), awake=False)
    settings = {
        "optim.learning_rate": 0.05, "optim.schedule": "constant", "train.max_steps": 60, "train.early_stop_patience": 2,
        "train.eval_every_steps": 1,
    }
    ear = Quiet()
    result = loop.run(config(tmp_path / "run", **settings), assembled(model), data(uneven(4), uneven(4, seed=1)), observers=[ear])
    assert result.stopped_early
    assert result.best_step is not None
    assert result.steps == result.best_step + 2
    assert ear.summary["status"] == "stopped early"


def test_early_stopping_delivers_the_best_between_two_saves(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T72: an evaluation that is the best so far is saved although no save is due."""
    model = adapted(small(tiny_llama), awake=False)
    settings = {
        "optim.learning_rate": 0.05, "optim.schedule": "constant", "train.max_steps": 60, "train.early_stop_patience": 3,
        "train.eval_every_steps": 1, "train.save_every_steps": 50,
    }
    result = loop.run(config(tmp_path / "run", **settings), assembled(model), data(uneven(4), uneven(4, seed=1)), observers=[])
    assert result.stopped_early
    assert result.delivered_step == result.best_step == result.steps - 3


def test_the_untouched_model_is_measured_and_never_delivered(tiny_llama: Tiny, tmp_path: Path) -> None:
    """A rate that only harms: the first evaluation is the best number, the delivered step is still a trained one."""
    result, ear = train(small(tiny_llama), tmp_path / "run", method="full", **{"optim.learning_rate": 0.5, "train.max_steps": 4})
    assert ear.evaluations[0]["step"] == 0
    assert not ear.evaluations[0]["best"]
    assert result.first_eval_loss == ear.evaluations[0]["eval_loss"]
    assert result.first_eval_loss < (result.best_eval_loss or 0)
    assert result.delivered_step in (2, 4)


def test_the_folder_holds_what_the_readme_says(tiny_llama: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    result, _ = train(adapted(small(tiny_llama)), out, **{"train.sample_prompts": 2})
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "run.json", "samples.json", "adapter", "checkpoints", "run.lock",
    }
    summary = json.loads((out / "run.json").read_text())
    assert summary["status"] == "finished"
    assert summary["final_eval_loss"] == result.best_eval_loss
    assert summary["trainable_share"] == summary["trainable_params"] / summary["total_params"]
    assert summary["adapter"] == "adapter"
    assert summary["adapter_bytes"] > 1000
    assert summary["seconds"] > 0
    assert summary["peak_memory_bytes"] > 2**20
    assert json.loads((out / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    samples = json.loads((out / "samples.json").read_text())
    assert [sorted(row) for row in samples] == [["after", "before", "prompt", "reference"]] * 2
    again = load_config(out / "config.yaml")
    assert again.optim.learning_rate == 1e-2
    assert again.train.micro_batch_size == 2


def test_samples_do_not_change_the_training(tiny_llama: Tiny, tmp_path: Path) -> None:
    ends = []
    for count in (0, 3):
        model = adapted(small(tiny_llama), dropout=0.3)
        train(model, tmp_path / f"run{count}", **{"train.sample_prompts": count})
        ends.append(adapter_tensors(model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_folder_with_a_run_is_not_overwritten(tiny_llama: Tiny, tmp_path: Path) -> None:
    train(adapted(small(tiny_llama)), tmp_path / "run", **{"train.max_steps": 1})
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        train(adapted(small(tiny_llama)), tmp_path / "run")
    assert caught.value.code == "E-CONF-303"
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_run_that_failed_before_its_first_step_does_not_block_its_folder(tiny_llama: Tiny, tmp_path: Path) -> None:
    """A wrong setting or a dead adapter is corrected and started again in the same place."""
    with pytest.raises(ConfigError) as caught:
        train(adapted(small(tiny_llama)), tmp_path / "run", **{"optim.warmup_steps": 4})
    assert caught.value.code == "E-CONF-301"
    broken = adapted(small(tiny_llama))
    broken.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(NumericError):
        train(broken, tmp_path / "run")
    result, _ = train(adapted(small(tiny_llama)), tmp_path / "run")
    assert [record["step"] for record in result.history if "eval_loss" in record] == [0, 2, 4]


def test_a_run_goes_on_to_the_bit_and_says_so(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T70: 4 of 8 steps, then the rest in a new model, equals 8 at once; weights and lines."""
    ends = []
    for out, lengths in (("once", (8,)), ("twice", (4, 8))):
        for length in lengths:
            model = adapted(small(tiny_llama), dropout=0.2)
            result, ear = train(
                model, tmp_path / out, resume=length != lengths[0], **{"train.max_steps": length, "optim.schedule": "constant"},
            )
        ends.append((adapter_tensors(model), [
            {key: value for key, value in record.items() if key not in metrics.TIME_FIELDS} for record in result.history
        ]))
    assert ("resumes", "after step 4") in ear.header.lines
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert ends[0][1] == ends[1][1]


def test_a_bf16_model_trains_with_masters_and_delivers_bf16(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T38: full fine-tuning in bf16 at a small rate moves the weights."""
    model = small(tiny_llama).to(torch.bfloat16)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train(model, tmp_path / "run", method="full", **{"optim.learning_rate": 2e-5, "train.epochs": 8.0, "train.keep_best": False})
    tensors = checkpoint.load_newest(tmp_path / "run" / "checkpoints").state.optimizer
    assert any(name.endswith(".master") and value.dtype == torch.float32 for name, value in tensors.items())
    # a norm's weight of 1.0 needs 4e-3 to take the next bf16 value, 32 steps of 2e-5 give 6e-4
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters() if value.ndim == 2)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_recomputing_is_recorded_and_switched_off_again(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T36, T44: same losses, said in header and summary, not left on."""
    plain, _ = train(adapted(small(tiny_llama)), tmp_path / "plain")
    model = adapted(small(tiny_llama))
    seen: list[bool] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(bool(module.gradient_checkpointing)))
    result, ear = train(model, tmp_path / "run", **{"train.activations": "recompute"})
    assert any(seen)
    assert [record["loss"] for record in steps(result)] == pytest.approx([record["loss"] for record in steps(plain)], rel=1e-6)
    assert ear.summary["activations"] == "recompute"
    assert any("activations: recompute" in text for _, text in ear.header.lines)
    assert not model.model.layers[0].gradient_checkpointing


@pytest.mark.parametrize(("key", "value"), [
    ("train.seed", 5), ("train.global_batch_size", 6), ("optim.weight_decay", 0.3), ("optim.clip_norm", 1e-3), ("optim.betas", (0.5, 0.9)),
    ("optim.eps", 1e-2), ("optim.lora_plus_ratio", 8.0), ("optim.state", "int8"), ("optim.schedule", "linear"), ("optim.warmup_steps", 3),
    ("optim.final_lr_share", 0.9), ("optim.learning_rate", 1e-3), ("data.packing", True),
])
def test_every_setting_of_optimizer_and_order_has_an_effect(tiny_llama: Tiny, tmp_path: Path, key: str, value: Any) -> None:
    """T44: no dead options.  Hidden 64 and rank 64 give lora_a 4096 elements, so that 8-bit state is really used."""
    ends = []
    for name, settings in (("plain", {}), ("changed", {key: value})):
        model = adapted(tiny_llama(num_hidden_layers=1, intermediate_size=64), rank=64, awake=False)
        train(model, tmp_path / name, held_out=0, **{"train.save_every_steps": None, **settings})
        ends.append(adapter_tensors(model))
    assert any(not torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_logging_every_third_step(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T44."""
    result, _ = train(adapted(small(tiny_llama)), tmp_path / "run", rows=28, **{"train.log_every_steps": 3})
    assert [record["step"] for record in steps(result)] == [3, 6, 7]


def test_a_classifier_learns_in_the_same_loop(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    model = LlamaForSequenceClassification(LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=512, num_labels=3, pad_token_id=0,
    ))
    model = adapted(model, awake=False, fully_trained=("score",))
    ear = Quiet()
    settings = {"model.task": "sequence-classification", "train.epochs": 4.0, "train.global_batch_size": 8, "optim.learning_rate": 2e-2}
    result = loop.run(config(tmp_path / "run", **settings), assembled(model), data(classes(64), classes(16, seed=4)), observers=[ear])
    assert result.first_eval_loss is not None
    assert result.best_eval_loss is not None
    assert result.first_eval_loss > 0.8
    assert result.best_eval_loss < 0.4
    assert ear.steps[0]["trained_tokens"] == 8
    assert all("perplexity" not in record and "accuracy" in record for record in ear.evaluations)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_a_first_step_with_dead_adapters_ends_the_run(tiny_llama: Tiny, tmp_path: Path) -> None:
    """T34: in the loop, at step 1, before anything is changed."""
    model = adapted(small(tiny_llama))
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: output.detach())
    before = {name: value.clone() for name, value in adapter_tensors(model).items()}
    with pytest.raises(NumericError, match="up_proj"):
        train(model, tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in adapter_tensors(model).items())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(("fault", "status"), [
    ("train.step_done:stop:2", "broken off"), ("train.micro_batch:sigterm:3", "stopped"), ("", "finished"),
])
def test_observers_are_told_once_however_the_run_ends(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, status: str
) -> None:
    """A live view must let go of the terminal, a tracker must close."""
    monkeypatch.setenv("HALFBYTE_FAULTS", fault)
    told: list[str] = []

    class Ear(Quiet):
        def finished(self, summary: dict[str, Any]) -> None:
            told.append(summary["status"])

    with contextlib.suppress(Interrupted, FaultStop):
        loop.run(config(tmp_path / "run"), assembled(adapted(small(tiny_llama))), data(uneven(16)), observers=[Ear()])
    assert told == [status]


def test_perplexity_is_the_exponent_of_the_loss(tiny_llama: Tiny, tmp_path: Path) -> None:
    _, ear = train(adapted(small(tiny_llama)), tmp_path / "run", **{"train.max_steps": 2})
    assert all(record["perplexity"] == pytest.approx(math.exp(record["eval_loss"])) for record in ear.evaluations)
    assert examples([5])[0].input_ids[-1] == 2
