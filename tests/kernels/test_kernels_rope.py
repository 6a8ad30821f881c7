"""rope against the float64 reference and transformers' own rotation, whole and partial, in place and as slices."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from halfbyte.kernels.rope import cpu, reference, rope, rope_

SHAPES = ((0, 2, 8, 8), (1, 1, 2, 2), (3, 2, 64, 64), (5, 3, 10, 6), (7, 1, 96, 24), (2, 2, 4, 0), (4, 5, 34, 34))
DTYPES = ((torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-13))


def _tables(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / max(width // 2, 1))
    angles = (torch.arange(tokens)[:, None] * 3 + 1) * half
    both = torch.cat([angles, angles], dim=1)
    return both.cos().float(), both.sin().float()


@pytest.mark.parametrize("inverse", (False, True))
@pytest.mark.parametrize("dtype,tolerance", DTYPES)
@pytest.mark.parametrize("tokens,heads,width,angles", SHAPES)
def test_equals_the_float64_reference(
    tokens: int, heads: int, width: int, angles: int, dtype: torch.dtype, tolerance: float, inverse: bool
) -> None:
    x, (cos, sin) = torch.randn(tokens, heads, width).to(dtype), _tables(tokens, angles)
    want = reference.rope(x.double(), cos.double(), sin.double(), inverse)
    got = rope(x, cos, sin, inverse)
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(got[..., angles:], x[..., angles:])
    copy = x.clone()
    assert rope_(copy, cos, sin, inverse) is copy
    torch.testing.assert_close(copy, got, rtol=0 if dtype != torch.float32 else 1e-6, atol=0 if dtype != torch.float32 else 1e-6)


def test_is_the_rotation_of_transformers() -> None:
    """# T40: same pairing of columns, same sign."""
    q, (cos, sin) = torch.randn(6, 3, 16), _tables(6, 16)
    want, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos[None], sin[None])
    torch.testing.assert_close(rope(q, cos, sin), want[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_both_halves_of_the_tables_are_read() -> None:
    x, cos, sin = torch.randn(3, 2, 8), torch.randn(3, 8), torch.randn(3, 8)
    for inverse in (False, True):
        torch.testing.assert_close(rope(x, cos, sin, inverse), reference.rope(x, cos, sin, inverse))
        torch.testing.assert_close(rope_(x.clone(), cos, sin, inverse), reference.rope(x, cos, sin, inverse))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_slices_of_a_fused_projection(dtype: torch.dtype) -> None:
    """# T51: q and k are read, and turned in place, where they lie; their neighbours stay as they are."""
    cos, sin = _tables(5, 8)
    fused = torch.randn(5, 4 * 8).to(dtype)
    heads_first = fused.view(5, 4, 8).transpose(0, 1).contiguous().transpose(0, 1)
    width_apart = fused.t().contiguous().view(4, 8, 5).permute(2, 0, 1)
    for part in (fused[:, 8:24].view(5, 2, 8), heads_first, width_apart):
        want = rope(part.clone(), cos, sin)
        assert torch.equal(rope(part, cos, sin), want)
        before = fused.clone()
        rope_(part, cos, sin)
        torch.testing.assert_close(part, want, rtol=0 if dtype != torch.float32 else 1e-6, atol=0 if dtype != torch.float32 else 1e-6)
        if part.shape[1] == 2:
            assert torch.equal(fused[:, :8], before[:, :8]) and torch.equal(fused[:, 24:], before[:, 24:])
    row = torch.randn(1, 2, 8).to(dtype).expand(5, 2, 8)
    assert torch.equal(rope(row, cos, sin), rope(row.contiguous(), cos, sin))


def test_inverse_takes_it_back() -> None:
    x, (cos, sin) = torch.randn(9, 2, 32), _tables(9, 32)
    torch.testing.assert_close(rope(rope(x, cos, sin), cos, sin, inverse=True), x, rtol=1e-5, atol=1e-6)


def test_gradients_in_float64() -> None:
    x, (cos, sin) = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True), _tables(3, 6)
    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda x, inverse=inverse: rope(x, cos.double(), sin.double(), inverse), (x,))


@pytest.mark.parametrize("dtype,tolerance", DTYPES[:2])
def test_gradients_equal_the_float64_reference(dtype: torch.dtype, tolerance: float) -> None:
    x, (cos, sin), dy = torch.randn(6, 2, 20).to(dtype).requires_grad_(), _tables(6, 12), torch.randn(6, 2, 20).to(dtype)
    rope(x, cos, sin).backward(dy)
    want = reference.rope(dy.double(), cos.double(), sin.double(), inverse=True)
    torch.testing.assert_close(x.grad.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_nan_stays_in_its_pair(dtype: torch.dtype) -> None:
    """# T42"""
    x, (cos, sin) = torch.randn(3, 2, 12).to(dtype), _tables(3, 8)
    x[1, 0, 2] = float("nan")
    for got in (rope(x, cos, sin), rope_(x.clone(), cos, sin)):
        assert got.isnan().nonzero().tolist() == [[1, 0, 2], [1, 0, 6]]


def test_several_threads_give_the_bits_of_one() -> None:
    x, (cos, sin) = torch.randn(600, 2, 32), _tables(600, 32)
    want = rope(x, cos, sin)
    torch.set_num_threads(3)
    got = rope(x, cos, sin)
    torch.set_num_threads(1)
    assert torch.equal(got, want)


def test_float16_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_flat", lambda *rest: pytest.fail("the kernel was called"))
    x, (cos, sin) = torch.randn(3, 2, 8).half(), _tables(3, 8)
    assert torch.equal(rope(x, cos, sin), reference.rope(x, cos, sin)) and torch.equal(rope_(x.clone(), cos, sin), rope(x, cos, sin))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype: torch.dtype) -> None:
    x, (cos, sin) = torch.randn(3, 2, 10).to(dtype), _tables(3, 6)
    torch.library.opcheck(torch.ops.halfbyte.rope_.default, (x.clone(), cos, sin))
    torch.library.opcheck(torch.ops.halfbyte.rope.default, (x.requires_grad_(), cos, sin, True))


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, (cos, sin) = torch.randn(3, 2, 8), _tables(3, 8)
    for wrong in ((x[0], cos, sin), (x, cos[:2], sin[:2]), (x, cos[:, :3], sin[:, :3]), (x[..., :6], cos, sin), (x, cos, sin[:, :4])):
        with pytest.raises(ValueError):
            rope(*wrong)
