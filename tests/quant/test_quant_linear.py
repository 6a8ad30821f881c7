"""QuantLinear through every move a model makes, and the generic functions over linear layers."""

import copy

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import UnsupportedError
from halfbyte.quant import blockwise, dense
from halfbyte.quant.linear import STATE_BUFFERS, QuantLinear
from tests.quant.quant_oracle import look_up, same_bits

FORMATS = ("nf4", "fp4", "int8")


def _layer(format: str = "nf4", double_quant: bool = True, dtype: torch.dtype = torch.float32) -> QuantLinear:
    return QuantLinear.from_linear(nn.Linear(70, 33, dtype=dtype), format, 64, double_quant)


def _same_state(one: QuantLinear, other: QuantLinear) -> bool:
    mine, theirs = dict(one.named_buffers()), dict(other.named_buffers())
    return mine.keys() == theirs.keys() and all(same_bits(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", (False, True))
def test_every_move_keeps_every_bit(format: str, double_quant: bool, tmp_path: object) -> None:
    """# T54: deepcopy, casts, float(), half(), to(device), state_dict strict and assigned, meta and back, inside a parent."""
    layer = _layer(format, double_quant)
    x = torch.randn(4, 70)
    y = layer(x)
    assert _same_state(copy.deepcopy(layer), layer)
    parent = nn.Sequential(copy.deepcopy(layer), nn.Linear(33, 5))
    for move in (
        lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.float(), lambda m: m.to("cpu"),
        lambda m: m.type(torch.float32),
    ):  # fmt: skip
        moved = move(parent)[0]
        assert _same_state(moved, layer)
        assert torch.equal(moved.dequantize(), layer.dequantize())
    parent[0].bias.data.copy_(layer.bias.data)  # the bias was cast with the model
    assert torch.equal(parent[0](x), y)
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for assign, device in ((False, "cpu"), (True, "meta")):
        fresh = QuantLinear.empty(70, 33, True, format, 64, double_quant, device=device)
        assert fresh.state_dict().keys() == saved.keys()
        fresh.load_state_dict(saved, strict=True, assign=assign)
        assert _same_state(fresh, layer) and torch.equal(fresh(x), y)
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    assert all(tensor.dtype == saved[name].dtype for name, tensor in empty.state_dict().items())
    empty.load_state_dict(saved)
    assert torch.equal(empty(x), y)


def test_casting_the_model_casts_the_bias_only() -> None:
    """# T54: scales rounded to bfloat16 would move every weight."""
    layer = _layer(double_quant=False)
    weight = layer.dequantize()
    layer.to(torch.bfloat16)
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    assert layer.absmax.dtype == layer.codebook.dtype == torch.float32 and layer.weight.dtype == torch.uint8
    assert torch.equal(layer.dequantize(), weight)


def test_random_bytes_survive_casts_and_saving(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """# T55: all 256 byte values, the patterns of NaN among them, through casts, gather and a file."""
    from halfbyte.formats import safetensors_io

    layer = QuantLinear.empty(128, 64, format="nf4", double_quant=False, device="cpu")
    noise = torch.randint(0, 256, layer.weight.shape, dtype=torch.uint8)
    layer.weight.copy_(noise)
    layer.absmax.fill_(1.0)
    layer.to(torch.bfloat16).to(torch.float32).half()
    shards = torch.cat([shard.clone() for shard in layer.weight.chunk(4)])
    assert layer.weight.dtype == torch.uint8 and torch.equal(layer.weight, noise) and torch.equal(shards, noise)
    safetensors_io.save(tmp_path / "a.safetensors", layer.state_dict())
    assert torch.equal(safetensors_io.load_tensors(tmp_path / "a.safetensors")["weight"], noise)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("weight_dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("x_dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("autocast", (None, torch.bfloat16))
def test_forward_dtypes(format: str, weight_dtype: torch.dtype, x_dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """# T39: the result follows x or autocast, never the bytes; values are those of the dense layer."""
    layer = _layer(format, dtype=weight_dtype)
    x = torch.randn(2, 3, 70, dtype=x_dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = layer(x)
    compute = autocast or x_dtype
    assert y.dtype == compute
    assert layer.bias is not None
    want = torch.nn.functional.linear(x.to(compute), layer.dequantize().to(compute)) + layer.bias.to(compute)
    assert torch.equal(y, want)
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert dx.dtype == x_dtype and torch.isfinite(dx).all() and float(dx.abs().sum()) > 0


def test_compute_dtype_is_a_field() -> None:
    """# T39: bfloat16 matmul inside, the dtype of x outside."""
    layer = _layer()
    layer.compute_dtype = torch.bfloat16
    x = torch.randn(3, 70)
    y = layer(x)
    layer.compute_dtype = None
    assert y.dtype == torch.float32 and torch.equal(y, layer(x.to(torch.bfloat16)).float())
    with pytest.raises(ValueError, match="floating point"):
        layer(torch.zeros(3, 70, dtype=torch.uint8))


@pytest.mark.parametrize("format", FORMATS)
def test_only_x_gets_a_gradient_and_nothing_dense_is_kept(format: str) -> None:
    layer = _layer(format)
    kept: list[torch.Tensor] = []
    x = torch.randn(5, 70, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(5, 70), rtol=1e-5, atol=1e-5)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not any(tensor.is_floating_point() and tensor.numel() >= 33 * 70 for tensor in kept)
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_equals_the_bitsandbytes_layer_where_its_dequantize_is_right() -> None:
    linear = nn.Linear(128, 48, dtype=torch.bfloat16)
    layer = QuantLinear.from_linear(linear)
    state = layer.state
    assert state.nested is not None
    theirs = bnb.QuantState(
        absmax=state.absmax, shape=torch.Size((48, 128)), code=state.codebook, blocksize=64, quant_type="nf4", dtype=torch.bfloat16,
        offset=state.nested.offset, state2=bnb.QuantState(absmax=state.nested.absmax2, code=state.nested.codebook, blocksize=256,
                                                         dtype=torch.float32),
    )  # fmt: skip
    assert same_bits(layer.dequantize(), bnb.dequantize_4bit(layer.packed, theirs))
    crossing = _layer(dtype=torch.bfloat16)
    absmax = blockwise.plain_absmax(crossing.state)
    want = look_up(crossing.packed.reshape(-1), absmax, crossing.codebook, 64, 33 * 70, torch.bfloat16)
    assert same_bits(crossing.dequantize().reshape(-1), want)


def test_names_of_the_buffers() -> None:
    assert set(dict(_layer().named_buffers())) == set(STATE_BUFFERS)
    assert set(dict(_layer("int8").named_buffers())) == {"weight", "absmax"}
    assert "nf4" in repr(_layer())


class _OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_which_layers_are_linear() -> None:
    """# T56: an embedding, a layer with its own forward, and one whose owner reads the raw weight are not taken for linear."""
    attention = nn.MultiheadAttention(8, 2)
    for layer, want in (
        (nn.Linear(3, 4), True), (Conv1D(4, 3), True), (_layer(), True), (nn.Embedding(3, 4), False), (_OwnForward(3, 4), False),
        (attention.out_proj, False), (nn.Conv1d(3, 4, 1), False), (nn.LayerNorm(4), False),
    ):  # fmt: skip
        assert dense.is_linear_like(layer) is want, layer
    with pytest.raises(UnsupportedError):
        dense.dense_weight(nn.Embedding(3, 4))


@pytest.mark.parametrize("make", (lambda: nn.Linear(6, 4), lambda: Conv1D(4, 6), lambda: QuantLinear.from_linear(nn.Linear(6, 4))))
def test_dense_weight_and_with_weight(make) -> None:  # type: ignore[no-untyped-def]
    layer, x = make().eval(), torch.randn(2, 6)
    weight = dense.dense_weight(layer)
    assert dense.shape_of(layer) == (4, 6) == tuple(weight.shape) and not weight.requires_grad
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias)
    new = dense.with_weight(layer, weight + 1, layer.bias)
    assert type(new) is (Conv1D if isinstance(layer, Conv1D) else nn.Linear) and not new.training
    torch.testing.assert_close(new(x), x @ (weight + 1).T + layer.bias)
    assert new.bias.data_ptr() != layer.bias.data_ptr()
    assert dense.dense_weight(layer, torch.bfloat16).dtype == torch.bfloat16
