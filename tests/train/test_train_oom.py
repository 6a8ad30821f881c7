"""Out of memory: the same step again with half the micro-batch, or a clear end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte import host
from halfbyte.data.packing import pack
from halfbyte.errors import DoesNotFitError
from halfbyte.lora.tensors import adapter_tensors
from halfbyte.train import loop
from halfbyte.train.memory_recovery import MicroBatchSize, split
from tests.train.tiny_runs import Quiet, adapted, assembled, classes, config, data, uneven, window

Tiny = Callable[..., nn.Module]


class Allocator:
    """Raises the allocator's error at the j-th call of a layer, or whenever more than `rows` rows come at once."""

    def __init__(self, layer: nn.Module, at: int = 0, rows: int = 10**9, error: Exception | None = None) -> None:
        self.calls, self.at, self.rows = 0, at, rows
        self.error = error or torch.OutOfMemoryError("no room")
        layer.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        self.calls += 1
        if self.calls == self.at or inputs[0].shape[0] > self.rows:
            raise self.error


def run(tiny_llama: Tiny, out: Path, *, at: int = 0, rows: int = 10**9, error: Exception | None = None, **settings: Any) -> Any:
    model = adapted(tiny_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=2))
    allocator = Allocator(model.model.layers[1].mlp.down_proj, at, rows, error)
    ear = Quiet()
    result = loop.run(
        config(out, **{"train.micro_batch_size": 4, "train.save_every_steps": None, "train.eval_every_steps": None, **settings}),
        assembled(model),
        data(uneven(16)),
        observers=[ear],
    )
    return adapter_tensors(model), result, ear, allocator


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 B."
        ),
    ],
    ids=["accelerator", "python", "cpu"],
)
def test_a_failure_at_any_call_gives_the_same_weights(tiny_llama: Tiny, tmp_path: Path, error: Exception) -> None:
    """The j-th forward fails, for every j of the run: same rows, same losses, same weights; the smaller size is kept and said."""
    wanted, healthy, _, allocator = run(tiny_llama, tmp_path / "healthy")
    assert allocator.calls == 4
    for at in range(1, allocator.calls + 1):
        found, result, ear, _ = run(tiny_llama, tmp_path / f"run{at}", at=at, error=error)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
        assert [record["rows"] for record in ear.steps] == [record["rows"] for record in healthy.history]
        assert [record["loss"] for record in ear.steps] == pytest.approx([record["loss"] for record in healthy.history], rel=1e-5)
        assert ear.notes == [f"out of memory at step {at}: micro-batch 4 -> 2, the same step again"]
        assert result.steps == 4


@pytest.mark.slow
def test_two_hundred_allocation_failures(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Failures inside attention, norms and head too: every module call of five steps fails once."""
    wanted, _, _, _ = run(tiny_llama, tmp_path / "healthy", **{"train.max_steps": 5})
    at = 0
    while True:
        at += 1
        model = adapted(tiny_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=2))
        allocator = Allocator(nn.Identity(), at)
        for module in model.modules():
            module.register_forward_pre_hook(lambda module, inputs: allocator(module, (torch.empty(1),)))  # noqa: B023
        settings = {"train.micro_batch_size": 4, "train.save_every_steps": None, "train.eval_every_steps": None, "train.max_steps": 5}
        loop.run(config(tmp_path / f"run{at}", **settings), assembled(model), data(uneven(16)), observers=[Quiet()])
        if allocator.calls < at:
            break
        for name, value in wanted.items():
            torch.testing.assert_close(adapter_tensors(model)[name], value, rtol=1e-6, atol=1e-6)
    assert at > 200


def test_the_size_goes_down_until_it_fits_and_stays_there(tiny_llama: Tiny, tmp_path: Path) -> None:
    wanted, _, _, _ = run(tiny_llama, tmp_path / "healthy")
    found, _, ear, allocator = run(tiny_llama, tmp_path / "run", rows=1)
    assert ear.notes == [f"out of memory at step 1: micro-batch {sizes}, the same step again" for sizes in ("4 -> 2", "2 -> 1")]
    assert allocator.calls == 2 + 16
    assert ear.summary["micro_batch_size"] == 1
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def test_a_single_row_that_does_not_fit_ends_the_run_with_its_length(tiny_llama: Tiny, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        run(tiny_llama, tmp_path / "run", rows=0)
    assert (caught.value.code, caught.value.exit_code) == ("E-FIT-301", 7)
    ids = {item.row: len(item.input_ids) for item in uneven(16)}
    row = int(caught.value.place.rpartition("row ")[2])
    assert caught.value.found.startswith(f"{ids[row]} tokens in the longest row")
    assert not (tmp_path / "run" / "adapter").exists()


def test_random_numbers_start_again_with_the_step(tiny_llama: Tiny, tmp_path: Path) -> None:
    """With dropout, the second attempt draws from where the first one began: as if the size had been small from the start."""
    ends = []
    for name, settings in (("small", {"train.micro_batch_size": 2}), ("halved", {"rows": 2})):
        model = adapted(tiny_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=2), dropout=0.3)
        Allocator(model.model.layers[1].mlp.down_proj, rows=settings.pop("rows", 10**9))
        loop.run(
            config(tmp_path / name, **{"train.micro_batch_size": 4, "train.eval_every_steps": None, **settings}),
            assembled(model),
            data(uneven(16)),
            observers=[Quiet()],
        )
        ends.append(adapter_tensors(model))
    for tensor, value in ends[0].items():
        torch.testing.assert_close(ends[1][tensor], value, rtol=1e-5, atol=1e-6)


def test_the_first_attempts_tensors_are_gone_at_the_second(tiny_llama: Tiny) -> None:
    """An exception that is still alive would keep the frames of the failed forward, and those their activations."""
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def work(parts: list[Any]) -> int:
        alive.append(any(reference() is not None for reference in held))
        activations = torch.ones(1000)
        held.append(weakref.ref(activations))
        if parts[0].input_ids.shape[0] > 1:
            raise torch.OutOfMemoryError("no room")
        return 5

    assert MicroBatchSize().run(work, window(uneven(8), 8), step=1, on_change=lambda text: None) == 5
    assert alive == [False, False, False, False]


def test_other_errors_are_not_taken_for_memory() -> None:
    def work(parts: list[Any]) -> int:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        MicroBatchSize().run(work, window(uneven(4), 4), step=1, on_change=lambda text: None)
    assert not host.is_out_of_memory(ValueError("can't allocate memory"))


def test_evaluation_halves_too_and_keeps_its_loss(tiny_llama: Tiny, tmp_path: Path) -> None:
    losses = []
    for name, limit in (("healthy", 10**9), ("tight", 1)):
        model = adapted(tiny_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1))

        def refuse(module: nn.Module, inputs: tuple[Any, ...], limit: int = limit) -> None:
            if not module.training and inputs[0].shape[0] > limit and inputs[0].shape[1] != 6:  # 6 tokens: the probe of the head
                raise torch.OutOfMemoryError("no room")

        model.model.layers[0].mlp.register_forward_pre_hook(refuse)
        ear = Quiet()
        loop.run(config(tmp_path / name, **{"train.max_steps": 2}), assembled(model), data(uneven(8), uneven(7, seed=3)), observers=[ear])
        losses.append([record["eval_loss"] for record in ear.evaluations])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("kind", ["single", "packed", "classes"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_cut_window_has_the_same_rows_labels_and_tokens(kind: str, size: int) -> None:
    items = {"single": uneven(11), "packed": pack(uneven(30), 40), "classes": classes(9)}[kind]
    whole = window(items, 5)  # type: ignore[arg-type]
    parts = split(whole, size)
    assert max(part.input_ids.shape[0] for part in parts) == size
    assert [row for part in parts for row in part.rows] == [row for batch in whole for row in batch.rows]
    assert sum(part.trained_tokens for part in parts) == sum(batch.trained_tokens for batch in whole)
    straight = [row for item in items for row in (item.rows if kind == "packed" else [item.row])]
    assert [row for part in parts for row in part.rows] == straight
    done = 0
    for part in parts:
        for index in range(part.input_ids.shape[0]):
            item = items[done]
            width = len(item.input_ids)
            assert part.input_ids[index, :width].tolist() == item.input_ids
            if part.attention_mask is not None:
                assert part.attention_mask[index].sum() == width
            if part.positions is not None:
                assert part.positions[index, :width].tolist() == item.positions
            done += 1
        assert part.input_ids.shape[1] == max(len(items[done - 1 - back].input_ids) for back in range(part.input_ids.shape[0]))
    assert done == len(items)
