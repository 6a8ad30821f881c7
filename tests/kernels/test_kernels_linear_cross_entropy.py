"""linear_cross_entropy against all logits at once, in values, gradients and memory."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halfbyte.kernels import scratch
from halfbyte.kernels.linear_cross_entropy import chunks, cpu, cross_entropy_, linear_cross_entropy, reference

IGNORED = -100


def _inputs(dtype: torch.dtype = torch.float64, rows: int = 9, width: int = 6, vocabulary: int = 13) -> tuple[torch.Tensor, ...]:
    hidden, weight, bias = torch.randn(rows, width), torch.randn(vocabulary, width), torch.randn(vocabulary)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[::4] = IGNORED
    return *(tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)), labels


@pytest.mark.parametrize("softcap,scale,with_bias", list(itertools.product((None, 3.0), (1.0, 0.25), (False, True))))
def test_gradients_in_float64(softcap: float | None, scale: float, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """# T27: gradcheck over several chunks, with softcap, scale, bias, for hidden, weight and bias."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * 13 * 2)  # two rows a chunk
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
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * 13 * 2)
    seen: list[int] = []
    original = reference.cross_entropy_
    monkeypatch.setattr(reference, "cross_entropy_", lambda z, *rest: (seen.append(z.shape[0]), original(z, *rest))[1])
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


def test_labels_are_looked_at_with_one_read_of_the_device() -> None:
    """Each number that the host reads by itself would wait for the device once more."""
    for labels, rows in (([3, -100, 0, 12], [0, 2, 3]), ([5, 0], None), ([-100, -100], []), ([], None)):
        given = torch.tensor(labels, dtype=torch.int64)
        with Reads() as reads:
            found, kept = chunks._trained(given, 13)
        assert reads.count == 0 and kept.tolist() == [label for label in labels if label != IGNORED]
        assert (None if found is None else found.tolist()) == rows
    for wrong in ([-100, 13], [-1, 4]):
        with pytest.raises(ValueError, match=r"within 0\.\.12, found -?\d+\.\.\d+"):
            chunks._trained(torch.tensor(wrong), 13)


class Reads(TorchDispatchMode):
    """Counts operations that make a GPU's host wait, but for the one reading of a small tensor as a list."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += str(func) in ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.item.default")
        return func(*args, **(kwargs or {}))


LOGITS = ((1, 1), (0, 7), (1, 2), (3, 511), (4, 512), (5, 513), (2, 3001), (40, 1100))
DTYPES = ((torch.float32, 3e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-12))


@pytest.mark.parametrize("softcap,scale", ((None, 1.0), (None, 0.125), (None, -2.0), (30.0, 1.0), (5.0, 3.0), (50.0, -0.5)))
@pytest.mark.parametrize("dtype,tolerance", DTYPES)
@pytest.mark.parametrize("rows,columns", LOGITS)
def test_logits_become_their_gradient(
    rows: int, columns: int, dtype: torch.dtype, tolerance: float, softcap: float | None, scale: float
) -> None:
    """The op between the two matmuls against float64, over widths around a block of columns."""
    z, labels = (torch.randn(rows, columns) * 8).to(dtype), torch.randint(0, columns, (rows,))
    exact = z.double().clone()
    want = reference.cross_entropy_(exact, labels, softcap, scale, True)
    for gradient in (False, True):
        got = z.clone()
        loss = cross_entropy_(got, labels, softcap, scale, gradient)
        assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.dim() == 0
        torch.testing.assert_close(loss.double(), want, rtol=3e-6, atol=2e-6 * max(rows, 1))
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=3e-6 if dtype == torch.float32 else tolerance / 64)
    untouched = z.clone()
    cross_entropy_(untouched, labels, softcap, scale, False)
    assert torch.equal(untouched, z)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_extreme_logits(dtype: torch.dtype) -> None:
    """Rising rows move the maximum in every block; -inf is a class that cannot be; a huge spread neither overflows nor loses the label."""
    columns = 1700
    rising = torch.linspace(-300, 300, columns)
    rows = [rising, -rising, torch.full((columns,), -1e4), torch.full((columns,), 1e4), torch.zeros(columns)]
    rows += [torch.where(torch.arange(columns) < 600, -math.inf, rising)]
    z = torch.stack(rows).to(dtype)
    labels = torch.tensor([columns - 1, columns - 1, 5, 7, 0, 900])
    want_z = z.double()
    want = reference.cross_entropy_(want_z, labels, None, 1.0, True)
    loss = cross_entropy_(z, labels, None, 1.0, True)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(z.double(), want_z, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-7)
    for value in (-3e38, 3e38):
        z = torch.full((1, columns), value).to(dtype)
        torch.testing.assert_close(float(cross_entropy_(z, labels[:1], None, 1.0, True)), math.log(columns), rtol=1e-6, atol=0)
        torch.testing.assert_close(z[0, :-1].float(), torch.full((columns - 1,), 1 / columns), rtol=2**-8, atol=0)


@pytest.mark.parametrize("bad", (math.nan, -math.nan, math.inf))
@pytest.mark.parametrize("softcap", (None, 20.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_is_no_number_shows_in_the_loss(dtype: torch.dtype, softcap: float | None, bad: float) -> None:
    """# T42: NaN anywhere in a row makes the loss and the row's gradient NaN; other rows keep theirs.  A soft cap bounds infinity."""
    z, labels = torch.randn(3, 1300).to(dtype), torch.tensor([1, 2, 3])
    z[1, 800] = bad
    loss = cross_entropy_(z, labels, softcap, 1.0, True)
    bounded = softcap is not None and bad == math.inf
    assert bool(loss.isnan()) == (not bounded) and not z[::2].isnan().any()
    assert bool(z[1].isnan().all()) == (not bounded)


def test_the_loss_of_near_certain_rows_keeps_its_digits() -> None:
    """# T27: log(1 + e^-9) beside a logit of 4096, whose own last place is as large as the loss."""
    z = torch.tensor([[4096.0, 4087.0]])
    got = float(cross_entropy_(z, torch.tensor([0]), None, 1.0, True))
    assert abs(got - math.log1p(math.exp(-9))) < 1e-7


def test_several_threads_give_the_bits_of_one() -> None:
    results = []
    z, labels = torch.randn(37, 900).bfloat16(), torch.randint(0, 900, (37,))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        copy = z.clone()
        results.append((cross_entropy_(copy, labels, None, 1.0, True), copy))
    torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype: torch.dtype) -> None:
    z, labels = torch.randn(3, 20).to(dtype), torch.tensor([0, 19, 4])
    torch.library.opcheck(torch.ops.halfbyte.cross_entropy_.default, (z, labels, 5.0, 0.5, True))


def test_turned_logits_and_sliced_labels() -> None:
    """# T51"""
    z, labels = torch.randn(30, 4).t(), torch.arange(8)[::2]
    copy = z.contiguous().clone()
    want = cross_entropy_(copy, labels.clone(), None, 1.0, True)
    assert torch.allclose(cross_entropy_(z, labels, None, 1.0, True), want) and torch.allclose(z, copy, atol=1e-6)


@pytest.mark.parametrize("dtype,tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)))
def test_reference_forced_and_kernel_agree(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, labels = _inputs(dtype, rows=50, width=24, vocabulary=700)
    results = []
    for choice in ("auto", "reference"):
        monkeypatch.setenv("HALFBYTE_KERNELS", choice)
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=9.0, scale=0.5)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    for got, want in zip(*results):
        assert float((got - want).detach().float().norm() / want.detach().float().norm()) < tolerance


def test_a_call_within_a_call_has_a_buffer_of_its_own() -> None:
    """The buffer is kept between calls, grows, and is never in two hands."""
    cpu_device = torch.device("cpu")
    with scratch.borrowed((5, 3), torch.float32, cpu_device) as one, scratch.borrowed((7,), torch.bfloat16, cpu_device) as other:
        assert one.shape == (5, 3) and other.dtype == torch.bfloat16
        one.fill_(1.0)
        other.fill_(2.0)
        assert bool((one == 1).all()) and bool((other == 2).all())
        address = one.data_ptr()
    with scratch.borrowed((2, 3), torch.float32, cpu_device) as again:
        assert again.data_ptr() == address
    with scratch.borrowed((1 << 22,), torch.float32, cpu_device) as large, pytest.raises(KeyError):
        address = large.data_ptr()
        raise KeyError
    with scratch.borrowed((4,), torch.float64, cpu_device) as again:
        assert again.data_ptr() == address


def test_float16_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_rows", lambda *rest: pytest.fail("the kernel was called"))
    z, labels = torch.randn(3, 8).half(), torch.tensor([1, 2, 3])
    assert torch.equal(cross_entropy_(z.clone(), labels, None, 1.0, False), reference.cross_entropy_(z.clone(), labels, None, 1.0, False))


def test_logits_that_do_not_fit_are_refused() -> None:
    for z, labels in ((torch.randn(3, 4), torch.zeros(2, dtype=torch.int64)), (torch.randn(3), torch.zeros(3, dtype=torch.int64)),
                      (torch.randn(3, 4), torch.zeros(3))):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit"):
            cross_entropy_(z, labels, None, 1.0, True)
