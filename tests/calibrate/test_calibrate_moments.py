"""The sums are those of the inputs themselves, whatever the grouping; the model is as it was afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte.calibrate.moments import CHECK_EVERY, Moments, collect
from halfbyte.models.quantizer import layers_to_quantize

ROWS = [torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in range(5, 28)]


def inputs_of(model: Any, name: str, rows: list[list[int]]) -> Tensor:
    """(T, I) float64: what the layer reads, row after row."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0][0].detach().double()))
    with torch.inference_mode():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    hook.remove()
    return torch.cat(seen)


def of_parts() -> tuple[list[list[int]], list[list[int]]]:
    check = ROWS[CHECK_EVERY - 1 :: CHECK_EVERY]
    return [row for row in ROWS if row not in check], check


@pytest.mark.parametrize("bytes_at_once", [1 << 30, 8 * 128 * 128, 8 * 64 * 64])
def test_sums_are_those_of_the_inputs(tiny_llama: Callable[..., nn.Module], bytes_at_once: int) -> None:
    """# T31  Against float64, in one pass and in many; a layer too wide for its square keeps the diagonal; rows to judge stay apart."""
    model = tiny_llama(attention_dropout=0.5)
    model.train()
    names = layers_to_quantize(model)
    seen = {name: one for group in collect(model, names, ROWS, bytes_at_once=bytes_at_once) for name, one in group.items()}
    assert model.training and set(seen) == set(names)
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"):
        for rows, moments in zip(of_parts(), (seen[name].fit, seen[name].check), strict=True):
            x_TI = inputs_of(model, name, rows)
            assert moments.tokens == x_TI.shape[0] == sum(map(len, rows))
            assert torch.allclose(moments.diagonal.double(), x_TI.square().sum(0), rtol=1e-4)
            too_wide = 8 * x_TI.shape[1] ** 2 > bytes_at_once
            assert (moments.square is None) == too_wide
            if moments.square is not None:
                assert torch.allclose(moments.square.double(), x_TI.T @ x_TI, rtol=1e-4, atol=1e-4)


def test_layers_with_one_input_share_one_sum(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    (seen,) = collect(model, layers_to_quantize(model), ROWS)
    prefix = "model.layers.1."
    queries, keys = seen[prefix + "self_attn.q_proj"].fit, seen[prefix + "self_attn.k_proj"].fit
    assert torch.equal(queries.diagonal, keys.diagonal)
    assert not torch.equal(queries.diagonal, seen[prefix + "self_attn.o_proj"].fit.diagonal)
    assert torch.equal(seen[prefix + "mlp.gate_proj"].fit.diagonal, seen[prefix + "mlp.up_proj"].fit.diagonal)


def test_the_error_is_that_of_the_outputs() -> None:
    """tr(E M E^T) against the outputs themselves in float64; by the diagonal alone it is that of unrelated inputs."""
    torch.manual_seed(3)
    x_TI, gap_OI = torch.randn(50, 12) @ torch.randn(12, 12), torch.randn(7, 12)
    moments = Moments(x_TI.square().sum(0), x_TI.T @ x_TI, 50)
    wanted = float((x_TI.double() @ gap_OI.double().T).square().sum())
    assert moments.error(gap_OI) == pytest.approx(wanted, rel=1e-5)
    alone = Moments(moments.diagonal, None, 50)
    assert alone.error(gap_OI) == pytest.approx(float((gap_OI.double().square() * x_TI.double().square().sum(0)).sum()), rel=1e-5)


def test_a_layer_that_no_row_reaches_is_left_out(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    (seen,) = collect(model, ["lm_head", "model.layers.0.mlp.up_proj"], ROWS[:6])
    assert set(seen) == {"model.layers.0.mlp.up_proj"}
