"""packed_attention and its gradients against the float64 reference and eager attention, over segments, windows, soft caps and layouts."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from halfbyte.kernels.packed_attention import cpu, gpu, packed_attention, packed_attention_backward, reference
from halfbyte.log import logger

DTYPES = ((torch.float32, 5e-6), (torch.bfloat16, 1e-2), (torch.float16, 1.5e-3), (torch.float64, 1e-12))
# edges, H, G, D, window, softcap
CASES = {
    "one token": ([0, 1], 2, 1, 8, 0, 0.0),
    "no token": ([0], 4, 2, 16, 0, 0.0),
    "only empty segments": ([0, 0, 0], 4, 2, 16, 0, 0.0),
    "short and empty segments": ([0, 3, 3, 4, 37, 100], 9, 3, 64, 0, 0.0),
    "several blocks of queries and keys": ([0, 5, 430], 2, 1, 64, 0, 0.0),
    "odd head width": ([0, 29, 250], 4, 2, 20, 0, 0.0),
    "wide heads, none shared": ([0, 60, 130], 2, 2, 128, 0, 0.0),
    "heads wider than a block": ([0, 50, 150], 2, 1, 200, 0, 0.0),
    "many heads share keys": ([0, 70, 120], 12, 2, 32, 0, 0.0),
    "window of one": ([0, 40], 2, 1, 16, 1, 0.0),
    "window over blocks": ([0, 13, 420], 2, 1, 48, 150, 0.0),
    "short window": ([0, 300], 2, 2, 16, 7, 0.0),
    "window longer than all": ([0, 33, 90], 2, 1, 16, 1000, 0.0),
    "soft cap": ([0, 35, 120], 4, 2, 24, 0, 1.5),
    "soft cap and window": ([0, 35, 260], 4, 2, 16, 40, 3.0),
}


def _inputs(edges: list[int], heads: int, groups: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, do = (torch.randn(edges[-1], heads, dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(edges[-1], groups, dim).to(dtype) for _ in range(2))
    return q * 2, k, v, do, torch.tensor(edges, dtype=torch.int32)


def _eager(q: Tensor, k: Tensor, v: Tensor, edges: list[int], scale: float, window: int, softcap: float) -> Tensor:
    """Written apart from the reference: one dense mask over all tokens."""
    tokens, group = q.shape[0], q.shape[1] // k.shape[1]
    segment = torch.cat([torch.full((end - begin,), number) for number, (begin, end) in enumerate(pairwise(edges))])
    place = torch.arange(tokens)
    seen = (segment[:, None] == segment) & (place[:, None] >= place)
    if window:
        seen &= place[:, None] - place < window
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        heads.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[:, head // group])
    return torch.stack(heads, dim=1)


def _close(got: Tensor, want: Tensor, tolerance: float) -> None:
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape
    top = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance * top)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype,tolerance", DTYPES, ids=str)
def test_forward_and_gradients_equal_the_float64_reference(case: str, dtype: torch.dtype, tolerance: float) -> None:
    edges, heads, groups, dim, window, softcap = CASES[case]
    q, k, v, do, starts = _inputs(edges, heads, groups, dim, dtype)
    o, lse = torch.ops.halfbyte.packed_attention(q, k, v, starts, dim**-0.5, window, softcap)
    wide = [x.double() for x in (q, k, v)]
    want, want_lse = reference.packed_attention(*wide, starts, dim**-0.5, window, softcap)
    assert o.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    _close(o, want, tolerance)
    _close(lse, want_lse, min(tolerance, 2e-6))
    # the backward is given what the forward rounded, as in training
    got = packed_attention_backward(do, q, k, v, o, lse, starts, dim**-0.5, window, softcap)
    grads = reference.packed_attention_backward(do.double(), *wide, o.double(), want_lse, starts, dim**-0.5, window, softcap)
    for one, other, like in zip(got, grads, (q, k, v), strict=True):
        assert one.dtype == dtype and one.shape == like.shape
        _close(one, other, tolerance)


@pytest.mark.parametrize("case", ("short and empty segments", "window over blocks", "short window", "soft cap and window"))
def test_the_reference_is_eager_attention_with_a_dense_mask(case: str) -> None:
    edges, heads, groups, dim, window, softcap = CASES[case]
    q, k, v, do, starts = (x.double() if x.is_floating_point() else x for x in _inputs(edges, heads, groups, dim, torch.float32))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = packed_attention(*leaves, starts, 0.3, window, softcap)
    want = _eager(*leaves, edges, 0.3, window, softcap)
    _close(o, want, 1e-12)
    for got, other in zip(torch.autograd.grad(o, leaves, do), torch.autograd.grad(want, leaves, do), strict=True):
        _close(got, other, 1e-11)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("window,softcap", ((0, 0.0), (50, 4.0)))
def test_a_segment_depends_on_itself_alone(dtype: torch.dtype, window: int, softcap: float) -> None:
    """T19: with another document changed, even to NaN, the others' outputs and gradients are the same bits; alone they are too."""
    edges = [0, 61, 200, 230, 300]
    q, k, v, do, starts = _inputs(edges, 6, 2, 32, dtype)
    o, lse = torch.ops.halfbyte.packed_attention(q, k, v, starts, 0.2, window, softcap)
    grads = packed_attention_backward(do, q, k, v, o, lse, starts, 0.2, window, softcap)
    changed = [x.clone() for x in (q, k, v, do)]
    for x in changed:
        x[61:200] = float("nan")
    other, other_lse = torch.ops.halfbyte.packed_attention(*changed[:3], starts, 0.2, window, softcap)
    other_grads = packed_attention_backward(changed[3], *changed[:3], other, other_lse, starts, 0.2, window, softcap)
    kept = torch.ones(300, dtype=torch.bool)
    kept[61:200] = False
    assert torch.equal(o[kept], other[kept]) and torch.equal(lse[:, kept], other_lse[:, kept])
    assert all(torch.equal(one[kept], two[kept]) for one, two in zip(grads, other_grads, strict=True))
    assert all(bool(x[61:200].isnan().all()) for x in (other, *other_grads))
    alone = packed_attention(q[200:230], k[200:230], v[200:230], torch.tensor([0, 30], dtype=torch.int32), 0.2, window, softcap)
    assert torch.equal(alone, o[200:230])


@pytest.mark.parametrize("which", range(4))
def test_nan_comes_through(which: int) -> None:
    """T42: one NaN in q, k, v or do is seen in the output or in the gradients, in each row that looks at it."""
    inputs = _inputs([0, 50], 2, 1, 16, torch.float32)
    inputs[which][20] = float("nan")
    q, k, v, do, starts = inputs
    o, lse = torch.ops.halfbyte.packed_attention(q, k, v, starts, 0.25, 0, 0.0)
    dq, dk, dv = packed_attention_backward(do, q, k, v, o, lse, starts, 0.25)
    if which < 3:
        assert bool(o[20].isnan().all()) and bool(o[20:].isnan().all(-1).all()) == (which > 0)
        assert bool(o[:12].isfinite().all())
    assert all(bool(x.isnan().any()) for x in ((dq, dk) if which == 2 else (dq, dk, dv)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_slices_of_a_fused_projection_are_read_in_place(dtype: torch.dtype) -> None:
    heads, groups, dim, starts = 4, 2, 16, torch.tensor([0, 30, 100], dtype=torch.int32)
    fused = torch.randn(100, (heads + 2 * groups) * dim).to(dtype)
    q, k, v = (part.view(100, -1, dim) for part in fused.split([heads * dim, groups * dim, groups * dim], dim=1))
    assert not q.is_contiguous() and cpu._rows(q)[0].data_ptr() == q.data_ptr()
    o = packed_attention(q, k, v, starts, 0.25)
    assert torch.equal(o, packed_attention(q.contiguous(), k.contiguous(), v.contiguous(), starts, 0.25))
    turned = q.transpose(0, 1).contiguous().transpose(0, 1)  # heads first in memory: copied
    assert torch.equal(o, packed_attention(turned, k, v, starts, 0.25))
    spread = torch.randn(100, heads, dim).to(dtype).expand(100, heads, dim)
    first = spread[:1].expand(100, heads, dim)  # one gradient row for all tokens, as from a sum
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(packed_attention(*leaves, starts, 0.25), leaves, first)
    want = torch.autograd.grad(packed_attention(*leaves, starts, 0.25), leaves, first.contiguous())
    assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))


def test_threads_change_nothing_but_the_order_of_one_sum() -> None:
    """Many segments: the same bits with one thread and with two.  One long segment: heads that share keys are added in another order."""
    before = torch.get_num_threads()
    try:
        for edges, exact in (([60 * number for number in range(9)], True), ([0, 400], False)):
            q, k, v, do, starts = _inputs(edges, 6, 2, 32, torch.float32)
            made = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                o, lse = cpu.packed_attention(q, k, v, starts, 0.2, 0, 0.0)
                made.append((o, lse, *cpu.packed_attention_backward(do, q, k, v, o, lse, starts, 0.2, 0, 0.0)))
            for one, two in zip(*made, strict=True):
                assert torch.equal(one, two) if exact else torch.allclose(one, two, rtol=1e-5, atol=1e-5)
            assert cpu.backward_items(tuple(edges), 6, 3, 2)[1] is not exact
    finally:
        torch.set_num_threads(before)


def test_large_scores_do_not_overflow() -> None:
    q, k, v, do, starts = _inputs([0, 250], 2, 1, 16, torch.float32)
    q, k = q * 40, k * 40
    o, lse = torch.ops.halfbyte.packed_attention(q, k, v, starts, 1.0, 0, 0.0)
    want, want_lse = reference.packed_attention(q.double(), k.double(), v.double(), starts, 1.0, 0, 0.0)
    assert float(want_lse.abs().max()) > 1000
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-3)
    assert bool(o.isfinite().all()) and float((o - want).abs().max()) < 0.05
    assert all(bool(x.isfinite().all()) for x in packed_attention_backward(do, q, k, v, o, lse, starts, 1.0))


def test_no_scores_of_all_tokens_are_held() -> None:
    """The working room grows with the tokens, not with their square."""
    short, long = (4 * cpu.backward_room(tokens, 64) for tokens in (1024, 8192))
    assert long < 8.2 * short and long < 8192 * 8192 // 2
    kept: list[Tensor] = []
    q, k, v, _, starts = _inputs([0, 300], 2, 1, 16, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        packed_attention(q.requires_grad_(), k, v, starts, 0.25)
    assert sum(x.numel() for x in kept) < 300 * 300


def test_gradients_in_float64_and_opcheck() -> None:
    q, k, v, do, starts = _inputs([0, 3, 3, 11], 4, 2, 4, torch.float32)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda a, b, c: packed_attention(a, b, c, starts, 0.5, 5, 2.0), wide)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.halfbyte.packed_attention, (*leaves, starts, 0.5, 5, 2.0))
    o, lse = torch.ops.halfbyte.packed_attention(q.detach(), k.detach(), v.detach(), starts, 0.5, 0, 0.0)
    arguments = (do, *(x.detach() for x in (q, k, v)), o, lse, starts, 0.5, 0, 0.0)
    torch.library.opcheck(torch.ops.halfbyte.packed_attention_backward, arguments)


def test_only_asked_gradients_come_back() -> None:
    q, k, v, _, starts = _inputs([0, 9], 2, 1, 8, torch.float32)
    packed_attention(q, k.requires_grad_(), v, starts, 0.5).sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None


def test_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _, starts = _inputs([0, 9], 2, 1, 8, torch.float32)
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")
    monkeypatch.setattr(cpu, "packed_attention", lambda *rest: pytest.fail("the CPU kernel was called"))
    packed_attention(q, k, v, starts, 0.5)


@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize("window", (0, 20))
@pytest.mark.parametrize("width", (16, 20))
def test_by_segment_is_the_same_attention(width: int, window: int, shared: bool) -> None:
    """What a GPU without flash attention runs; PyTorch's own attention runs anywhere.  A width of 20 is padded to 24 and cut again."""
    q, k, v, do, starts = _inputs([0, 31, 31, 100], 4, 2, width, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = gpu.by_segment(*leaves, tuple(starts.tolist()), 0.25, window, shared)
    want = packed_attention(*leaves, starts, 0.25, window)
    _close(got, want, 5e-6)
    for one, two in zip(torch.autograd.grad(got, leaves, do), torch.autograd.grad(want, leaves, do), strict=True):
        _close(one, two, 5e-6)
    assert gpu.missing(q, 0.0) == "" and "soft cap" in gpu.missing(q, 1.0)


@pytest.mark.parametrize("capability,width,dtype,words", (
    ((9, 0), 128, torch.bfloat16, ""), ((8, 0), 256, torch.float16, ""), ((12, 0), 256, torch.bfloat16, ""),
    ((10, 0), 200, torch.float16, ""),
    ((8, 9), 192, torch.bfloat16, ""), ((8, 0), 100, torch.float16, ""),  # OpenLLaMA-3B's heads, padded
    ((7, 5), 64, torch.float16, "8.0, found 7.5"), ((7, 0), 100, torch.float16, "8.0, found 7.0"),
    ((9, 0), 64, torch.float32, "float32"), ((9, 0), 257, torch.bfloat16, "up to 256"),
    ((8, 6), 200, torch.bfloat16, "no gradient"), ((8, 9), 217, torch.float16, "no gradient"), ((12, 0), 224, torch.float16, "no gradient"),
))  # fmt: skip
def test_which_cards_take_a_batch_in_one_call(capability: tuple[int, int], width: int, dtype: torch.dtype, words: str) -> None:
    reason = gpu.not_in_one_call(capability, width, dtype)
    assert words in reason and bool(reason) == bool(words)
    assert "enable_gqa" in gpu.not_in_one_call(capability, width, dtype, ("enable_gqa",))


def test_a_card_without_flash_attention_runs_by_segment(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The choice of the GPU path, made here as on a T4 and as on an H100, and said once."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(gpu, "_varlen", lambda: pytest.fail("flash attention was called"))
    monkeypatch.setattr(gpu, "lacking", tuple)
    monkeypatch.setattr(logger(), "propagate", True)
    gpu._why.cache_clear()
    q, k, v, _, starts = _inputs([0, 31, 50], 4, 2, 20, torch.bfloat16)
    for _ in range(2):
        _close(gpu.packed_attention(q, k, v, starts, 0.25, 0), packed_attention(q, k, v, starts, 0.25), 1e-2)
    assert {record.message.rpartition(": ")[2] for record in caplog.records} == {"flash attention needs compute capability 8.0, found 7.5"}
    assert gpu._why.cache_info().misses == 1  # said once
    taken = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(gpu, "_varlen", lambda: lambda q, k, v, *rest, **more: taken.append((q.shape, k.shape, rest[2:], more)) or q)
    gpu._why.cache_clear()
    assert gpu.packed_attention(q, k, v, starts, 0.25, 7).shape == q.shape
    gpu._why.cache_clear()
    assert taken == [((50, 4, 24), (50, 2, 24), (31, 31), {"scale": 0.25, "window_size": (6, 0), "enable_gqa": True})]


def test_this_pytorchs_varlen_has_what_is_asked_of_it() -> None:
    assert gpu.lacking() == (() if torch.__version__ >= "2.12" else ("enable_gqa",))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window,softcap", ((0, 0.0), (20, 0.0), (0, 2.0)))
def test_on_a_gpu(window: int, softcap: float) -> None:
    q, k, v, do, starts = _inputs([0, 31, 100], 4, 2, 64, torch.bfloat16)
    leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
    o = packed_attention(*leaves, starts, 0.125, window, softcap)
    plain = [x.requires_grad_() for x in (q, k, v)]
    want = packed_attention(*plain, starts, 0.125, window, softcap)
    _close(o.cpu(), want, 2e-2)
    for one, two in zip(torch.autograd.grad(o, leaves, do.cuda()), torch.autograd.grad(want, plain, do), strict=True):
        _close(one.cpu(), two, 2e-2)


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, k, v, _, starts = _inputs([0, 9], 4, 2, 8, torch.float32)
    for wrong, words in (
        ((q, k[:8], v[:8], starts), "do not fit"), ((q[:, :3], k, v, starts), "evenly"), ((q, k.double(), v, starts), "one floating"),
        ((q, k, v, starts.long()), "int32"), ((q, k, v, starts[:1]), "rise from 0"),
        ((q, k, v, torch.tensor([0, 7, 3, 9], dtype=torch.int32)), "rise from 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            packed_attention(*wrong, 0.5)
    with pytest.raises(ValueError, match="window and softcap"):
        packed_attention(q, k, v, starts, 0.5, -1)


@pytest.mark.parametrize("processor", ("haswell", "x86-64"))
def test_other_processors_agree(processor: str) -> None:
    """The kernels made for AVX2 and for plain x86-64, whose register blocks are smaller, pass the same comparison."""
    chosen = "test_forward_and_gradients_equal and (float32 or bfloat16) and (several or odd or over or cap)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env={**os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "." * 10 in done.stdout, done.stdout[-3000:]
