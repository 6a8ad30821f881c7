"""rms_norm and its gradients against the float64 reference, on awkward shapes, in every form."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from halfbyte.kernels.rms_norm import add_rms_norm, cpu, reference, rms_norm, rms_norm_backward, rms_norm_weight_grad

SHAPES = ((0, 8), (1, 1), (1, 5), (3, 64), (2, 3, 577), (7, 1000), (70, 300))
DTYPES = ((torch.float32, 2e-6), (torch.bfloat16, 1.2e-2), (torch.float64, 1e-12))
FORMS = (0, 1, 2)
EPS = 1e-5


def _close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest number of `want`, or of 1: a row of one number has a gradient of nearly 0."""
    assert got.shape == want.shape
    top = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance * top)


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, residual, dy, extra = (torch.randn(shape).to(dtype) for _ in range(4))
    return x * 3, residual, dy, extra, torch.randn(shape[-1]).to(dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype,tolerance", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_four_equal_the_float64_reference(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, form: int) -> None:
    x, residual, dy, extra, weight = _inputs(shape, dtype)
    y, rstd = rms_norm(x, weight, EPS, form)
    wide = [tensor.double() for tensor in (x, weight, dy, extra)]
    want_y, want_rstd = reference.rms_norm(wide[0], wide[1], EPS, form)
    assert y.dtype == dtype and rstd.dtype == torch.promote_types(dtype, torch.float32)
    _close(y, want_y, tolerance)
    _close(rstd, want_rstd, min(tolerance, 1e-6))
    for added in (None, extra):
        got = rms_norm_backward(dy, x, weight, rstd, form, added)
        assert got.dtype == dtype
        _close(got, reference.rms_norm_backward(wide[2], wide[0], wide[1], want_rstd, form, None if added is None else wide[3]), tolerance)
    _close(rms_norm_weight_grad(dy, x, rstd, form), reference.rms_norm_weight_grad(wide[2], wide[0], want_rstd, form), tolerance)
    summed, y, rstd = add_rms_norm(x, residual, weight, EPS, form)
    assert torch.equal(summed, x + residual)
    _close(y, reference.rms_norm(summed.double(), wide[1], EPS, form)[0], tolerance)


@pytest.mark.parametrize("form,module", ((0, LlamaRMSNorm), (1, Olmo2RMSNorm), (2, Gemma2RMSNorm)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_forms_are_those_of_transformers(form: int, module: type, dtype: torch.dtype) -> None:
    """Where the roundings stand is part of the form: but for a last bit here and there, the same numbers in bfloat16."""
    x, *_, weight = _inputs((40, 96), dtype)
    layer = module(96, eps=EPS).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    got, want = rms_norm(x, weight, EPS, form)[0], layer(x)
    assert float((got != want).double().mean()) < (0.005 if dtype == torch.bfloat16 else 1.0)
    torch.testing.assert_close(got, want, rtol=2**-7 if dtype == torch.bfloat16 else 2e-6, atol=1e-6)


def test_the_norm_is_of_the_rounded_sum() -> None:
    """# T57: what the backward is given is the rounded sum, so its norm must be that of it."""
    x, residual = torch.randn(20, 64).bfloat16() * 3, torch.randn(20, 64).bfloat16()
    summed, _, rstd = add_rms_norm(x, residual, torch.ones(64), EPS, 1)
    torch.testing.assert_close(rstd, reference.rms_norm(summed.double(), torch.ones(64), EPS, 1)[1].float(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_in_float64(form: int) -> None:
    x, residual, _, _, weight = (tensor.requires_grad_() for tensor in _inputs((3, 7), torch.float64))
    assert torch.autograd.gradcheck(lambda *inputs: rms_norm(*inputs, EPS, form)[0], (x, weight))
    assert torch.autograd.gradcheck(lambda *inputs: add_rms_norm(*inputs, EPS, form)[:2], (x, residual, weight))


@pytest.mark.parametrize("dtype,tolerance", DTYPES[:2])
@pytest.mark.parametrize("form", FORMS)
def test_autograd_reaches_every_input(dtype: torch.dtype, tolerance: float, form: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in (*_inputs((6, 33), dtype)[:2], _inputs((6, 33), dtype)[4])]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    factor, other = torch.randn(6, 33), torch.randn(6, 33)
    for group in (inputs, exact):
        summed, y, _ = add_rms_norm(*group, EPS, form)
        (y * factor.to(y.dtype) + summed * other.to(y.dtype)).sum().backward()
    for got, want in zip(inputs, exact):
        assert got.grad.dtype == dtype
        _close(got.grad, want.grad, 3 * tolerance)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, _, _, _, weight = _inputs((4, 8), torch.float32)
    rms_norm(x.requires_grad_(), weight, EPS, 0)[0].sum().backward()
    assert x.grad is not None and weight.grad is None
    assert not rms_norm(x, weight, EPS, 0)[1].requires_grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_slices_and_turned_tensors(dtype: torch.dtype) -> None:
    """# T51: strided, transposed and expanded inputs give what their contiguous copies give."""
    wide = torch.randn(12, 40).to(dtype)
    weight = torch.randn(80).to(dtype)[::2][:20]
    for x in (wide[:, :20], wide[::2, 10:30], wide.t()[:20, :].t(), wide[:1, :20].expand(5, 20)):
        copies = x.clone(), weight.clone()
        for form in FORMS:
            for got, want in zip(rms_norm(x, weight, EPS, form), rms_norm(*copies, EPS, form)):
                assert torch.equal(got, want)
            rstd = rms_norm(x, weight, EPS, form)[1]
            assert torch.equal(rms_norm_backward(x, x, weight, rstd, form, x), rms_norm_backward(x.clone(), *copies, rstd, form, copies[0]))
            assert torch.equal(add_rms_norm(x, x, weight, EPS, form)[1], add_rms_norm(x, *copies, EPS, form)[1])
            assert torch.equal(rms_norm_weight_grad(x, x, rstd, form), rms_norm_weight_grad(*copies[:1] * 2, rstd, form))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_row_with_nan_is_nan_and_no_other(dtype: torch.dtype) -> None:
    """# T42"""
    x, _, dy, _, weight = _inputs((5, 50), dtype)
    x[2, 31] = float("nan")
    for form in FORMS:
        y, rstd = rms_norm(x, weight, EPS, form)
        for result in (y, add_rms_norm(x, dy, weight, EPS, form)[1], rms_norm_backward(dy, x, weight, rstd, form)):
            bad = result.isnan().any(dim=1)
            assert bad.tolist() == [False, False, True, False, False] and bool(result[2].isnan().all())


def test_rows_of_zeros_stay_zero() -> None:
    x = torch.zeros(2, 16)
    y, rstd = rms_norm(x, torch.ones(16), 1e-6, 0)
    assert torch.equal(y, x) and torch.allclose(rstd, torch.full((2,), 1e3))


def test_several_threads_give_the_bits_of_one() -> None:
    x, residual, dy, extra, weight = _inputs((300, 128), torch.bfloat16)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        summed, y, rstd = add_rms_norm(x, residual, weight, EPS, 0)
        results.append((summed, y, rstd, rms_norm_backward(dy, x, weight, rstd, 0, extra), rms_norm_weight_grad(dy, x, rstd, 0)))
    torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_float16_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "norm_rows", lambda *rest: pytest.fail("the kernel was called"))
    x, *_, weight = _inputs((3, 8), torch.float16)
    assert torch.equal(rms_norm(x, weight, EPS, 1)[0], reference.rms_norm(x, weight, EPS, 1)[0])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype: torch.dtype) -> None:
    x, residual, dy, extra, weight = _inputs((3, 20), dtype)
    rstd = rms_norm(x, weight, EPS, 0)[1]
    ops = torch.ops.halfbyte
    torch.library.opcheck(ops.rms_norm_backward.default, (dy, x, weight, rstd, 0, extra))
    torch.library.opcheck(ops.rms_norm_weight_grad.default, (dy, x, rstd, 0))
    x, residual, weight = (tensor.requires_grad_() for tensor in (x, residual, weight))
    torch.library.opcheck(ops.rms_norm.default, (x, weight, EPS, 0), rtol=1e-2, atol=1e-2)
    torch.library.opcheck(ops.add_rms_norm.default, (x, residual, weight, EPS, 0), rtol=1e-2, atol=1e-2)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    with pytest.raises(ValueError, match="form is"):
        rms_norm(x, weight, EPS, 3)
    with pytest.raises(ValueError, match="does not fit rows"):
        rms_norm(x, weight[:7], EPS, 0)
    with pytest.raises(ValueError, match="does not fit"):
        add_rms_norm(x, x.bfloat16(), weight, EPS, 0)
    with pytest.raises(ValueError, match="floating-point"):
        rms_norm(torch.ones(3, 8, dtype=torch.int64), weight, EPS, 0)
