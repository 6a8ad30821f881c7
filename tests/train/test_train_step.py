"""One optimizer step: clipped once, updated once, cleared once, and untouched where something is not finite."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from halfbyte.errors import DoesNotFitError, NumericError
from halfbyte.models.heads import head_of
from halfbyte.models.recompute import use_policy
from halfbyte.optim.adamw import AdamW
from halfbyte.train import numeric_check
from halfbyte.train.step import real_tokens, train_step
from tests.train.tiny_runs import adapted, examples, uneven, window

Tiny = Callable[..., nn.Module]


class Spy(torch.optim.SGD):
    """Notes the gradients that each update sees."""

    def __init__(self, model: nn.Module, lr: float = 0.0) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=lr)
        self.seen: list[torch.Tensor] = []

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.seen.append(torch.cat([p.grad.reshape(-1).clone() for group in self.param_groups for p in group["params"]]))
        super().step()


def test_the_norm_at_the_update_is_the_clip_norm(tiny_llama: Tiny) -> None:
    """T6: once, after the last backward: 4 micro-batches with a limit of 1e-3 give a gradient of norm 1e-3."""
    model = adapted(tiny_llama())
    items = uneven(8)
    free, clipped = Spy(model), Spy(model)
    full = train_step(model, head_of(model), window(items, 2), free)
    limited = train_step(model, head_of(model), window(items, 2), clipped, clip_norm=1e-3)
    assert full.grad_norm == limited.grad_norm == pytest.approx(float(free.seen[0].norm()), rel=1e-5)
    assert full.grad_norm > 1e-2
    assert float(clipped.seen[0].norm()) == pytest.approx(1e-3, rel=1e-3)
    assert limited.clipped_norm == pytest.approx(float(clipped.seen[0].norm()), rel=1e-5)
    direction = torch.nn.functional.cosine_similarity(free.seen[0], clipped.seen[0], dim=0)
    assert float(direction) == pytest.approx(1.0, abs=1e-6)


def test_a_gradient_below_the_limit_is_left_alone(tiny_llama: Tiny) -> None:
    """T6."""
    model = adapted(tiny_llama())
    spies = [Spy(model), Spy(model)]
    results = [train_step(model, head_of(model), window(uneven(4), 2), spy, clip_norm=norm) for spy, norm in zip(spies, (None, 1e6))]
    assert torch.equal(spies[0].seen[0], spies[1].seen[0])
    assert results[1].clipped_norm == results[1].grad_norm


def test_one_update_a_window_and_gradients_do_not_leak_into_the_next(tiny_llama: Tiny) -> None:
    """T5: gradients are cleared after the update and at no other time."""
    model = adapted(tiny_llama())
    spy = Spy(model)
    items = uneven(8)
    for _ in range(2):
        train_step(model, head_of(model), window(items, 2), spy)
    assert len(spy.seen) == 2
    assert torch.equal(spy.seen[0], spy.seen[1])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_touches_nothing(tiny_llama: Tiny, where: str) -> None:
    """T24: NaN is reported as NaN; weights, optimizer state and gradients stay."""
    model = adapted(tiny_llama())
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batches = window(uneven(4), 2)
    train_step(model, head_of(model), batches, optimizer)
    before = {name: value.detach().clone() for name, value in [*model.named_parameters(), *optimizer.state_tensors().items()]}
    layer = model.model.layers[0].self_attn.q_proj
    if where == "loss":
        handle = model.model.norm.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    else:
        def spoil(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda slope: slope * float("inf"))

        handle = layer.register_forward_hook(spoil)
    result = train_step(model, head_of(model), batches, optimizer)
    handle.remove()
    assert not result.updated
    assert not result.finite
    assert (result.loss != result.loss) == (where == "loss")
    now = dict([*model.named_parameters(), *optimizer.state_tensors().items()])
    assert all(torch.equal(value, now[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_window_without_labels_is_no_update(tiny_llama: Tiny) -> None:
    """T18."""
    from halfbyte.data.tokenize import Example

    model = adapted(tiny_llama())
    spy = Spy(model, lr=1.0)
    result = train_step(model, head_of(model), window([Example([5, 6, 7], [-100] * 3, 4)], 1), spy)
    assert (result.updated, result.trained_tokens, result.tokens, result.rows, spy.seen) == (False, 0, 3, [4], [])


def test_running_out_of_memory_in_the_update_is_not_tried_again(tiny_llama: Tiny) -> None:
    """Half of the weights may be new by then."""
    model = adapted(tiny_llama())

    class Full(Spy):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(DoesNotFitError) as caught:
        train_step(model, head_of(model), window(uneven(4), 2), Full(model))
    assert caught.value.code == "E-FIT-302"
    assert caught.value.__context__ is None


def test_tokens_are_counted_without_padding() -> None:
    from halfbyte.data.packing import pack

    items = examples([3, 9, 5])
    assert [real_tokens(batch) for batch in window(items, 3)] == [17]
    assert sum(real_tokens(batch) for batch in window(pack(items, 12), 2)) == 17  # type: ignore[arg-type]


def test_every_adapter_gets_a_gradient(tiny_llama: Tiny) -> None:
    """T34: also in the first step, where lora_b is zero."""
    for awake in (True, False):
        model = adapted(tiny_llama(), awake=awake)
        train_step(model, head_of(model), window(uneven(4), 2), Spy(model), before_update=lambda: numeric_check.require_gradients(model))  # noqa: B023


@pytest.mark.parametrize("how", ["detached", "zeroed"])
def test_adapters_that_the_backward_pass_misses_are_named(tiny_llama: Tiny, how: str) -> None:
    """T34: with no gradient at all, and with one of zeros."""
    model = adapted(tiny_llama())
    layer = model.model.layers[0].mlp.up_proj

    def cut(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.detach() if how == "detached" else output.detach() + 0.0 * output

    layer.register_forward_hook(cut)
    with pytest.raises(NumericError) as caught:
        train_step(
            model, head_of(model), window(uneven(4), 2), Spy(model), before_update=lambda: numeric_check.require_gradients(model),
        )
    assert caught.value.code == "E-NUM-302"
    assert "model.layers.0.mlp.up_proj" in caught.value.found
    assert "down_proj" not in caught.value.found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recomputing_activations_changes_memory_and_nothing_else(tiny_llama: Tiny, method: str) -> None:
    """T35, T36: equal gradients with frozen inputs and dropout on, equal random state afterwards, fewer saved tensors, and off again."""
    found = []
    for checkpointed in (False, True):
        model = tiny_llama()
        model = adapted(model, dropout=0.2) if method == "lora" else model.requires_grad_(True)
        model.train()
        if checkpointed:
            use_policy(model, "recompute")
        saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        torch.manual_seed(7)
        spy = Spy(model)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            result = train_step(model, head_of(model), window(uneven(4), 2), spy)
        found.append((spy.seen[0], result.loss, saved, torch.get_rng_state()))
        if checkpointed:
            use_policy(model, "keep")
            assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    (plain, loss, kept, state), (again, loss_again, kept_again, state_again) = found
    assert float(plain.abs().max()) > 0
    assert torch.allclose(plain, again, rtol=1e-5, atol=1e-7)
    assert loss == pytest.approx(loss_again, rel=1e-6)
    assert kept_again < 0.7 * kept
    assert torch.equal(state, state_again)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "input_layernorm"])
def test_nan_in_any_weight_is_found(tiny_llama: Tiny, name: str, attention: str) -> None:
    """T42: CPU attention turns a NaN query into zeros and the loss stays finite; the scan and the gradient's norm do not fall for it."""
    model = adapted(tiny_llama(attn_implementation=attention))
    numeric_check.scan(model, {}, step=1)
    layer = model.model.layers[0].get_submodule(name)
    weight = layer.base.weight if hasattr(layer, "base") else layer.weight
    with torch.no_grad():
        weight.view(-1)[3] = float("nan")
    with pytest.raises(NumericError) as caught:
        numeric_check.scan(model, {}, step=50)
    assert caught.value.code == "E-NUM-301"
    assert caught.value.exit_code == 6
    assert f"model.layers.0.{name}" in caught.value.found
    assert "(1 of " in caught.value.found


def test_nan_in_the_optimizer_state_and_in_packed_scales_is_found(tiny_llama: Tiny) -> None:
    """T42: everything a step depends on is looked at."""
    from halfbyte.quant.linear import QuantLinear

    model = adapted(tiny_llama())
    with pytest.raises(NumericError, match=r"optimizer state x\.v"):
        numeric_check.scan(model, {"x.m": torch.ones(3), "x.v": torch.tensor([1.0, float("inf")])}, step=1)
    packed = nn.Sequential(QuantLinear.from_linear(nn.Linear(64, 64), "nf4", 64, False, "0"))
    numeric_check.scan(packed, {}, step=1)
    next(value for name, value in packed.named_buffers() if "absmax" in name)[0] = float("nan")
    with pytest.raises(NumericError, match="absmax"):
        numeric_check.scan(packed, {}, step=1)


def test_large_finite_weights_are_not_mistaken_for_infinite() -> None:
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight, 3e38)
    numeric_check.scan(layer, {}, step=1)
