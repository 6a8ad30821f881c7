"""matmul_4bit: values, gradient, what stays alive, and the dtypes it takes."""

import pytest
import torch

from halfbyte.kernels.dequantize_blockwise import dequantize_blockwise
from halfbyte.kernels.matmul_4bit import cpu, matmul_4bit
from halfbyte.kernels.quantize_blockwise import quantize_blockwise
from halfbyte.quant.codebooks import CODEBOOKS
from tests.kernels.blockwise_checks import FLOATS, multiplies

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
    x = torch.randn(2, 3, SHAPE[1], dtype=x_dtype, requires_grad=True)  # more rows than the fused product takes
    y = matmul_4bit(x, *arguments)
    assert y.dtype == x_dtype and torch.equal(y, torch.nn.functional.linear(x, dense.to(x_dtype)))
    upstream = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, upstream)
    assert dx.dtype == x_dtype and torch.equal(dx, upstream @ dense.to(x_dtype))


@pytest.mark.parametrize("x_dtype", FLOATS[:2])
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("shape", ((33, 70), (7, 96), (5, 33), (3, 2048), (64, 160), (1, 32)))
def test_few_rows(x_dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Every row count of the fused product, blocks that cross rows, odd widths."""
    for rows in range(6):
        for blocksize in (32, 64, 256):
            multiplies(x_dtype, weight_dtype, rows, shape, blocksize, nested=blocksize != 32, name="fp4" if rows == 2 else "nf4")


def test_few_rows_make_nothing_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product with a few rows never asks for the dense weight."""
    arguments, dense = _weight()
    monkeypatch.setattr(cpu, "dequantize_into", lambda *rest: pytest.fail("the weight was made dense"))
    x = torch.randn(4, SHAPE[1])
    torch.testing.assert_close(matmul_4bit(x, *arguments), x @ dense.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matmul_4bit(x[1], *arguments), dense @ x[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(pytest.fail.Exception):
        matmul_4bit(torch.randn(5, SHAPE[1]), *arguments)


def test_few_rows_carry_what_is_not_finite() -> None:
    (packed, absmax, *rest), _ = _weight()
    absmax = absmax.clone()
    absmax[0] = torch.nan
    for rows in (1, 3):
        y = matmul_4bit(torch.ones(rows, SHAPE[1]), packed, absmax, *rest)
        assert y[:, 0].isnan().all() and not y[:, 1:].isnan().any()
    x = torch.ones(2, SHAPE[1])
    x[1, 5] = torch.inf
    y = matmul_4bit(x, packed, absmax, *rest)
    assert y[0, 1:].isfinite().all() and not y[1].isfinite().any()


def test_strided_rows() -> None:
    arguments, dense = _weight()
    x = torch.randn(SHAPE[1], 3).T
    torch.testing.assert_close(matmul_4bit(x, *arguments), x @ dense.T, rtol=1e-5, atol=1e-5)


def test_gradient_in_float64() -> None:
    arguments, _ = _weight()
    x = torch.randn(3, SHAPE[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: matmul_4bit(value, *arguments), (x,))
    assert torch.autograd.gradgradcheck(lambda value: matmul_4bit(value, *arguments), (x,))


def test_products_between_forward_and_backward_do_not_disturb() -> None:
    """The dense weight lies in a buffer that others use: nothing of it may be kept."""
    arguments, dense = _weight()
    other, _ = _weight()
    x = torch.randn(6, SHAPE[1], requires_grad=True)
    y = matmul_4bit(x, *arguments)
    matmul_4bit(torch.randn(6, SHAPE[1]), *other)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    matmul_4bit(torch.randn(6, SHAPE[1]), *other)
    assert torch.equal(dx, torch.ones(6, SHAPE[0]) @ dense)


def test_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, dense = _weight()
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")
    monkeypatch.setattr(cpu, "matmul_4bit", lambda *rest: pytest.fail("the CPU kernel was called"))
    x = torch.randn(2, SHAPE[1])
    assert torch.equal(matmul_4bit(x, *arguments), torch.nn.functional.linear(x, dense))


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
    torch.library.opcheck(torch.ops.halfbyte.matmul_4bit_input_gradient, (torch.randn(3, SHAPE[0], requires_grad=True), *arguments))


def test_integer_activations_and_wrong_sizes_are_refused() -> None:
    arguments, _ = _weight()
    with pytest.raises(ValueError, match="floating point"):
        matmul_4bit(torch.zeros(3, SHAPE[1], dtype=torch.uint8), *arguments)
    with pytest.raises(ValueError, match="do not fit"):
        matmul_4bit(torch.zeros(3, SHAPE[1] + 1), *arguments)
