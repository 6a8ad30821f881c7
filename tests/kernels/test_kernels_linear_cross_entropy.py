"""linear_cross_entropy against all logits at once, in values, gradients and memory."""

import itertools

import pytest
import torch

from halfbyte.kernels.linear_cross_entropy import linear_cross_entropy, reference

IGNORED = -100


def _inputs(dtype: torch.dtype = torch.float64, rows: int = 9, width: int = 6, vocabulary: int = 13) -> tuple[torch.Tensor, ...]:
    hidden, weight, bias = torch.randn(rows, width), torch.randn(vocabulary, width), torch.randn(vocabulary)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[::4] = IGNORED
    return *(tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)), labels


@pytest.mark.parametrize("softcap,scale,with_bias", list(itertools.product((None, 3.0), (1.0, 0.25), (False, True))))
def test_gradients_in_float64(softcap: float | None, scale: float, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """# T27: gradcheck over several chunks, with softcap, scale, bias, for hidden, weight and bias."""
    monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * 13 * 2)  # two rows a chunk
    hidden, weight, bias, labels = _inputs()

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias=bias if with_bias else None, softcap=softcap, scale=scale)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))
    want = reference.plain(hidden, weight, labels, bias=bias if with_bias else None, softcap=softcap, scale=scale)
    torch.testing.assert_close(loss(hidden, weight, bias), want, rtol=1e-12, atol=0)


def test_non_uniform_upstream_gradient() -> None:
    """# T27: every row group has its own upstream factor, which a kernel that reads only the first one gets wrong."""
    hidden, weight, _, labels = _inputs()
    factors = [0.3, -1.7, 0.0]
    groups = [slice(0, 3), slice(3, 6), slice(6, 9)]

    def total(run: object) -> torch.Tensor:
        return sum(factor * run(hidden[group], weight, labels[group]) for factor, group in zip(factors, groups, strict=True))  # type: ignore[operator]

    got = torch.autograd.grad(total(linear_cross_entropy), (hidden, weight))
    want = torch.autograd.grad(total(reference.plain), (hidden, weight))
    step = torch.randn_like(hidden) * 1e-6
    with torch.no_grad():
        base, moved = total(linear_cross_entropy), None
        hidden += step
        moved = total(linear_cross_entropy)
        hidden -= step
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(moved - base, (got[0] * step).sum(), rtol=1e-4, atol=1e-11)


def test_true_class_gradient_is_formed_in_float32() -> None:
    """# T27: near-certain rows in bfloat16: p - 1 taken after rounding p would be exactly zero."""
    hidden = torch.tensor([[8.0, 0.0]]).to(torch.bfloat16).requires_grad_()
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).to(torch.bfloat16)
    linear_cross_entropy(hidden, weight, torch.tensor([0])).backward()
    exact = torch.tensor([[8.0, 0.0]], requires_grad=True)
    reference.plain(exact, weight.float(), torch.tensor([0])).backward()
    torch.testing.assert_close(hidden.grad.float(), exact.grad, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype,tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)))
def test_equals_plain_loss_in_training_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, bias, labels = _inputs(dtype, rows=40, width=32, vocabulary=101)
    got = linear_cross_entropy(hidden, weight, labels, bias=bias)
    want = reference.plain(hidden, weight, labels, bias=bias)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
    for one, other in zip(torch.autograd.grad(got, (hidden, weight, bias)), torch.autograd.grad(want, (hidden, weight, bias)), strict=True):
        assert one.dtype == dtype
        assert float((one - other).float().norm() / other.float().norm()) < tolerance


def test_no_label_at_all_gives_zero_with_zero_gradients() -> None:
    hidden, weight, bias, labels = _inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED), bias=bias)
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, (hidden, weight, bias)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_ignored_rows_get_no_gradient_and_a_frozen_head_none_at_all() -> None:
    hidden, weight, _, labels = _inputs()
    frozen = weight.detach()
    linear_cross_entropy(hidden, frozen, labels).backward()
    assert frozen.grad is None and hidden.grad is not None
    assert torch.equal(hidden.grad[labels == IGNORED], torch.zeros_like(hidden.grad[labels == IGNORED]))
    assert (hidden.grad[labels != IGNORED].abs().sum(1) > 0).all()


def test_no_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made inside holds at most the chunk's rows."""
    monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * 13 * 2)
    seen: list[int] = []
    original = reference._loss_and_gradient
    monkeypatch.setattr(reference, "_loss_and_gradient", lambda z, *rest: (seen.append(z.shape[0]), original(z, *rest))[1])
    hidden, weight, _, labels = _inputs()
    linear_cross_entropy(hidden, weight, labels)
    assert seen == [2, 2, 2]


def test_autocast_computes_in_its_dtype() -> None:
    hidden, weight, _, labels = _inputs(torch.float32, rows=40, width=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, labels)
    want = linear_cross_entropy(hidden.to(torch.bfloat16), weight.to(torch.bfloat16), labels)
    assert torch.equal(got, want)
    (gradient,) = torch.autograd.grad(got, hidden)
    assert gradient.dtype == torch.float32


def test_labels_outside_the_vocabulary_are_refused() -> None:
    hidden, weight, _, labels = _inputs()
    for wrong in (13, -1):
        labels[1] = wrong
        with pytest.raises(ValueError, match=r"within 0\.\.12"):
            linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight[:, :3], labels)
