"""matmul_4bit: values, gradient, what stays alive, and the dtypes it takes."""

import pytest
import torch

from halfbyte.kernels.dequantize_blockwise import dequantize_blockwise
from halfbyte.kernels.matmul_4bit import matmul_4bit
from halfbyte.kernels.quantize_blockwise import quantize_blockwise
from halfbyte.quant.codebooks import CODEBOOKS

SHAPE = (33, 70)


def _weight(dtype: torch.dtype = torch.float32) -> tuple[tuple[object, ...], torch.Tensor]:
    codebook = CODEBOOKS["nf4"]
    packed, absmax = quantize_blockwise(torch.randn(SHAPE), codebook, 64)
    dense = dequantize_blockwise(packed, absmax, codebook, 64, SHAPE[0] * SHAPE[1], dtype).view(SHAPE)
    return (packed, absmax, codebook, 64, SHAPE, dtype), dense


@pytest.mark.parametrize("x_dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("weight_dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_equals_dense_matmul(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    arguments, dense = _weight(weight_dtype)
    x = torch.randn(2, 3, SHAPE[1], dtype=x_dtype, requires_grad=True)
    y = matmul_4bit(x, *arguments)
    assert y.dtype == x_dtype and torch.equal(y, torch.nn.functional.linear(x, dense.to(x_dtype)))
    upstream = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, upstream)
    assert dx.dtype == x_dtype and torch.equal(dx, upstream @ dense.to(x_dtype))


def test_gradient_in_float64() -> None:
    arguments, _ = _weight()
    x = torch.randn(3, SHAPE[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: matmul_4bit(value, *arguments), (x,))


def test_nothing_dense_lives_between_forward_and_backward() -> None:
    arguments, _ = _weight()
    kept: list[torch.Tensor] = []
    x = torch.randn(5, SHAPE[1], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        matmul_4bit(x, *arguments).sum().backward()
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) < SHAPE[0] * SHAPE[1]  # packed, scales, codebook
    assert all(tensor.data_ptr() in {part.data_ptr() for part in arguments[:3]} for tensor in kept)


def test_opcheck() -> None:
    arguments, _ = _weight()
    torch.library.opcheck(torch.ops.halfbyte.matmul_4bit, (torch.randn(3, SHAPE[1], requires_grad=True), *arguments))


def test_integer_activations_and_wrong_sizes_are_refused() -> None:
    arguments, _ = _weight()
    with pytest.raises(ValueError, match="floating point"):
        matmul_4bit(torch.zeros(3, SHAPE[1], dtype=torch.uint8), *arguments)
    with pytest.raises(ValueError, match="do not fit"):
        matmul_4bit(torch.zeros(3, SHAPE[1] + 1), *arguments)
