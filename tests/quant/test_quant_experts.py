"""Packed experts against the stock modules of transformers that hold the dequantized weights."""

import copy

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from halfbyte.errors import UnsupportedError, WeightError
from halfbyte.quant.experts import QuantExperts, dense_expert, expert_shapes, experts_forward, is_experts, projection
from tests.quant.quant_oracle import same_bits

STOCK = {
    "mixtral": (MixtralExperts, MixtralConfig(hidden_size=48, intermediate_size=40, num_local_experts=4)),
    "qwen2_moe": (Qwen2MoeExperts, Qwen2MoeConfig(hidden_size=48, moe_intermediate_size=40, num_experts=4)),
    "qwen3_moe": (Qwen3MoeExperts, Qwen3MoeConfig(hidden_size=48, moe_intermediate_size=40, num_experts=4)),
    "gpt_oss": (GptOssExperts, GptOssConfig(hidden_size=48, intermediate_size=40, num_local_experts=4)),
}


def _stock(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    made, config = STOCK[kind]
    config._experts_implementation = "eager"
    experts = made(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    return experts.to(dtype)


def _routed(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.stack([torch.randperm(3)[:2] for _ in range(10)])  # expert 3 is never reached
    return torch.randn(10, 48, dtype=dtype, requires_grad=True), index, torch.rand(10, 2, dtype=dtype)


def _with_dequantized(stock: nn.Module, packed: QuantExperts) -> nn.Module:
    dense = copy.deepcopy(stock)
    for name in packed.shapes:
        weight = torch.stack([packed.dequantize(name, expert) for expert in range(4)])
        dense.get_parameter(name).data.copy_(weight.transpose(1, 2) if stock.is_transposed else weight)
    return dense


@pytest.mark.parametrize("kind", sorted(STOCK))
@pytest.mark.parametrize("format", ("nf4", "fp4", "int8"))
def test_equals_stock_with_dequantized_weights(kind: str, format: str) -> None:
    stock = _stock(kind)
    packed = QuantExperts.from_experts(stock, format)
    dense = _with_dequantized(stock, packed)
    x, index, weights = _routed()
    got, want = packed(x, index, weights), dense(x, index, weights)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(got)
    (mine,), (theirs,) = (torch.autograd.grad(y, x, upstream) for y in (got, want))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(experts_forward(dense, projection(dense), x, index, weights), want, rtol=1e-5, atol=1e-6)
    for implementation in ("grouped_mm", "batched_mm"):
        dense.config._experts_implementation = implementation
        torch.testing.assert_close(got, dense(x, index, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ("mixtral", "gpt_oss"))
def test_moves_keep_every_bit(kind: str) -> None:
    """# T54: deepcopy, casts, state_dict, meta."""
    stock = _stock(kind)
    packed = QuantExperts.from_experts(stock)
    moved = copy.deepcopy(packed).to(torch.bfloat16).float()
    fresh = QuantExperts(stock.to("meta"), device="meta")
    assert fresh.state_dict().keys() == packed.state_dict().keys()
    fresh.load_state_dict(packed.state_dict(), assign=True)
    for other in (moved, fresh):
        for name, buffer in packed.named_buffers():
            assert same_bits(other.get_buffer(name), buffer), name
    x, index, weights = _routed()
    assert torch.equal(fresh(x, index, weights), packed(x, index, weights))
    half = copy.deepcopy(packed).to(torch.bfloat16)
    assert half(x.bfloat16(), index, weights.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(packed(x, index, weights)).all()


def test_shapes_biases_and_settings_are_taken_over() -> None:
    stock = _stock("gpt_oss")
    packed = QuantExperts.from_experts(stock)
    assert expert_shapes(packed) == expert_shapes(stock) == {"gate_up_proj": (4, 80, 48), "down_proj": (4, 48, 40)}
    assert packed.limit == stock.limit and {name for name, _ in packed.named_parameters()} == {"gate_up_proj_bias", "down_proj_bias"}
    assert dense_expert(stock, "down_proj", 2).shape == dense_expert(packed, "down_proj", 2).shape == (48, 40)
    held = sum(buffer.numel() * buffer.element_size() for buffer in packed.buffers())
    fused = sum(parameter.numel() for parameter in stock.parameters() if parameter.dim() == 3)
    assert held < 0.53 * fused + 8 * (64 + 64) + 1024 + 64


def test_nothing_dense_is_kept_for_the_backward() -> None:
    packed = QuantExperts.from_experts(_stock("mixtral"))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        packed(*_routed())
    assert not any(tensor.is_floating_point() and tensor.numel() >= 48 * 40 for tensor in kept)


def test_refusals() -> None:
    """# T50 for experts; and a module of another structure."""
    stock = _stock("mixtral")
    stock.get_parameter("down_proj").data[2, 0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"block\.experts\.down_proj expert 2"):
        QuantExperts.from_experts(stock, name="block.experts")
    assert not is_experts(nn.Linear(2, 2)) and expert_shapes(nn.Linear(2, 2)) == {}
    with pytest.raises(UnsupportedError):
        QuantExperts(nn.Linear(2, 2))
