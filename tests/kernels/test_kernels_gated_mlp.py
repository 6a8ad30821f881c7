"""gated_act and its gradients against float64 formulas, on awkward shapes, for every activation."""

import math

import pytest
import torch

from halfbyte.kernels.gated_mlp import ACTS, cpu, gated_act, gated_act_backward, reference

SHAPES = ((0, 8), (3, 0), (1, 1), (5,), (3, 67), (2, 3, 129), (9, 1000))
DTYPES = ((torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-14))
PYTORCH = {
    "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}  # fmt: skip


def _close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple((torch.randn(shape) * size).to(dtype) for size in (1, 3, 1))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype,tolerance", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_pytorch_in_float64(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, act: str) -> None:
    dh, gate, up = _inputs(shape, dtype)
    wide_gate, wide_up = gate.double().requires_grad_(), up.double().requires_grad_()
    want = PYTORCH[act](wide_gate) * wide_up
    grads = torch.autograd.grad(want, (wide_gate, wide_up), dh.double())
    got = gated_act(gate, up, act)
    assert got.dtype == dtype
    _close(got, want, tolerance)
    h, dgate, dup = gated_act_backward(dh, gate, up, act)
    for one, other in ((h, want), (dgate, grads[0]), (dup, grads[1])):
        assert one.dtype == dtype
        _close(one, other, tolerance)


@pytest.mark.parametrize("act", ACTS)
def test_the_whole_range_of_float32(act: str) -> None:
    """From where the activation is the identity to where it is zero: no overflow on the way."""
    gate = torch.cat([torch.linspace(-120, 120, 20001), torch.tensor([1e-30, -1e-30, 0.0, -0.0, 3e38, -3e38, 1e19, -1e19])])
    up = torch.ones_like(gate)
    want = reference.gated_act(gate.double(), up.double(), act)
    _, slope, _ = reference.gated_act_backward(up.double(), gate.double(), up.double(), act)
    _, dgate, _ = gated_act_backward(up, gate, up, act)
    torch.testing.assert_close(gated_act(gate, up, act).double(), want, rtol=4e-7, atol=4e-7)
    kept = gate.abs() < 1e6  # the derivative's own terms overflow beyond in the reference too
    torch.testing.assert_close(dgate.double()[kept], slope[kept], rtol=1e-6, atol=1e-6)


def test_the_polynomial_of_the_normal_distribution_is_close_in_relative_terms() -> None:
    """Down to where float32 has no small numbers left, as exactly as e^(-g^2/2) is known."""
    gate = torch.linspace(-12, -0.01, 5001)
    got = cpu.gated_act(gate, torch.ones_like(gate), "gelu").double() / gate.double()
    want = torch.tensor([math.erfc(-value / math.sqrt(2)) / 2 for value in gate.tolist()], dtype=torch.float64)
    assert float((got / want - 1).abs().max()) < 1e-5
    assert float((got / want - 1).abs()[gate > -3].max()) < 1e-6


@pytest.mark.parametrize("act", ACTS)
def test_gradients_in_float64(act: str) -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda gate, up: gated_act(gate, up, act), (gate, up))


@pytest.mark.parametrize("dtype,tolerance", DTYPES[:2])
@pytest.mark.parametrize("act", ACTS)
def test_autograd_gives_the_backward_of_the_op(act: str, dtype: torch.dtype, tolerance: float) -> None:
    dh, gate, up = _inputs((4, 33), dtype)
    gated_act(gate.requires_grad_(), up.requires_grad_(), act).backward(dh)
    _, dgate, dup = gated_act_backward(dh, gate.detach(), up.detach(), act)
    assert torch.equal(gate.grad, dgate) and torch.equal(up.grad, dup)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("act", ACTS)
def test_halves_of_one_projection_and_turned_tensors(act: str, dtype: torch.dtype) -> None:
    """# T51: slices, every second row, transposed and expanded inputs give what their contiguous copies give."""
    fused, dh = torch.randn(6, 4, 40).to(dtype), torch.randn(6, 4, 20).to(dtype)
    flat = fused.view(24, 40)
    wholes = fused, fused.transpose(0, 1), flat[::2], flat.t()[:24].t()[:, :16], fused[:, 1:3]
    for gate, up in (whole.chunk(2, dim=-1) for whole in wholes):
        grad = dh.reshape(-1)[: gate.numel()].view(gate.shape)
        copies = gate.clone(memory_format=torch.contiguous_format), up.clone(memory_format=torch.contiguous_format)
        assert torch.equal(cpu.gated_act(gate, up, act), cpu.gated_act(*copies, act))
        for got, want in zip(cpu.gated_act_backward(grad, gate, up, act), cpu.gated_act_backward(grad.clone(), *copies, act)):
            assert torch.equal(got, want)
    row = torch.randn(1, 20).to(dtype).expand(5, 20)
    assert torch.equal(cpu.gated_act_backward(row, row, row, act)[1], cpu.gated_act_backward(*[row.contiguous()] * 3, act)[1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("act", ACTS)
def test_nan_stays_where_it_is(act: str, dtype: torch.dtype) -> None:
    """# T42"""
    dh, gate, up = _inputs((3, 40), dtype)
    gate[1, 7] = float("nan")
    for result in (gated_act(gate, up, act), *gated_act_backward(dh, gate, up, act)):
        assert result.isnan().nonzero().tolist() == [[1, 7]]


def test_several_threads_give_the_bits_of_one() -> None:
    dh, gate, up = _inputs((300, 128), torch.bfloat16)
    want = gated_act_backward(dh, gate, up, "gelu")
    torch.set_num_threads(3)
    got = gated_act_backward(dh, gate, up, "gelu")
    torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(got, want))


def test_float16_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "act_rows", lambda *rest, **named: pytest.fail("the kernel was called"))
    _, gate, up = _inputs((3, 8), torch.float16)
    assert torch.equal(gated_act(gate, up, "silu"), reference.gated_act(gate, up, "silu"))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype: torch.dtype) -> None:
    dh, gate, up = _inputs((3, 20), dtype)
    torch.library.opcheck(torch.ops.halfbyte.gated_act_backward.default, (dh, gate, up, "gelu"))
    torch.library.opcheck(torch.ops.halfbyte.gated_act.default, (gate.requires_grad_(), up.requires_grad_(), "silu"))


def test_arguments_that_do_not_fit_are_refused() -> None:
    gate = torch.randn(3, 8)
    for wrong in ((gate, gate, "relu"), (gate, gate[:, :7], "silu"), (gate, gate.bfloat16(), "silu"), (gate.long(), gate.long(), "silu")):
        with pytest.raises(ValueError):
            gated_act(*wrong)
