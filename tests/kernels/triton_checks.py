"""The Triton kernels against their references; run by test_kernels_triton.py, in the interpreter, and where there is a GPU on it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import adamw as step_op
from halfbyte.kernels import listing
from halfbyte.kernels.adamw import reference as step_reference
from halfbyte.kernels.adamw import triton_gpu as adam
from halfbyte.kernels.dequantize_blockwise import reference as read_reference
from halfbyte.kernels.dequantize_blockwise import triton_gpu as read
from halfbyte.kernels.gated_mlp import ACTS
from halfbyte.kernels.gated_mlp import reference as gated_reference
from halfbyte.kernels.gated_mlp import triton_gpu as gated
from halfbyte.kernels.linear_cross_entropy import triton_gpu as loss
from halfbyte.kernels.matmul_4bit import triton_gpu as product
from halfbyte.kernels.quantize_blockwise import reference as write_reference
from halfbyte.kernels.quantize_blockwise import triton_gpu as write
from halfbyte.kernels.rms_norm import reference as norm_reference
from halfbyte.kernels.rms_norm import triton_gpu as norm
from halfbyte.kernels.rope import reference as rope_reference
from halfbyte.kernels.rope import triton_gpu as rope
from halfbyte.quant.codebooks import CODEBOOKS
from tests.kernels.triton_interpreted import DEVICE, INTERPRETED, _rounding, leave_pages_alone, only_the_last  # noqa: F401
from tests.quant.quant_oracle import same_bits

ULP = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # largest step between neighbours; fp32 sums are allowed more
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 64), (63, 64), (65, 32), (300, 64), (333, 96), (4097, 64), (5001, 4096))
BOOKS = {name: book.to(DEVICE) for name, book in CODEBOOKS.items()}
# the interpreter computes with NumPy, which warns of the infinities and NaN that these checks put in
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, where memory that is not touched costs nothing")


def _close(got: Tensor, want: Tensor, ulps: float = 1.0, floor: float = 2e-6) -> None:
    """Equal within `ulps` steps of got's dtype, or within `floor` of the largest number; NaN like NaN."""
    relative = ULP[got.dtype] * ulps
    largest = float(want.float().nan_to_num().abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.float().cpu(), want.float().cpu(), rtol=relative, atol=floor * max(largest, 1e-3), equal_nan=True)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def _slice(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns) out of the middle of a wider tensor."""
    return _random(rows, 2 * columns + 3, dtype=dtype)[:, 3 : 3 + columns]


def _nested(count: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    """(uint8 indices, nested, the absmax they stand for: a product and a sum, each rounded)."""
    indices = torch.randint(0, 256, (count,), dtype=torch.uint8).to(DEVICE)
    absmax2, offset = torch.rand(-(-count // 256)).to(DEVICE) * 0.07, torch.tensor(0.0431).to(DEVICE)
    book = BOOKS["dynamic-signed"]
    scales = book[indices.long()] * absmax2.repeat_interleave(256)[:count]
    return indices, (absmax2, book, offset), scales + offset


# ---- blockwise


@pytest.mark.parametrize("name", sorted(CODEBOOKS))
def test_quantize_gives_the_bits_of_the_reference(name: str) -> None:
    """# T47 # T48: whole blocks, short last blocks, odd sizes, block sizes that are no power of two."""
    for size, blocksize in SIZES:
        for dtype in FLOATS:
            rising = torch.linspace(1, 30, size, device=DEVICE)  # so that a look into the next block shows
            x = (_random(size) * rising * 10.0 ** float(torch.randint(-6, 3, ()))).clamp(-6e4, 6e4).to(dtype)
            got, want = (run.quantize_blockwise(x, BOOKS[name], blocksize) for run in (write, write_reference))
            assert same_bits(got[0].cpu(), want[0].cpu()) and same_bits(got[1].cpu(), want[1].cpu()), (size, blocksize, dtype)


def test_quantize_zero_denormal_and_nan_blocks() -> None:
    """# T49 # T50: zeros stay zeros, denormals finite; a NaN cannot hide from the maximum."""
    for tiny in (0.0, 1e-42, -1e-40, 1e-38):
        x = _random(192)
        x[64:128] = tiny
        got, want = (run.quantize_blockwise(x, BOOKS["nf4"], 64) for run in (write, write_reference))
        assert same_bits(got[0].cpu(), want[0].cpu()) and same_bits(got[1].cpu(), want[1].cpu()), tiny
    x = _random(192).to(torch.bfloat16)
    x[70], x[130] = float("nan"), float("inf")
    absmax = write.quantize_blockwise(x, BOOKS["nf4"], 64)[1]
    assert torch.isfinite(absmax).tolist() == [True, False, False] and absmax[1].isnan()


@pytest.mark.parametrize("name", sorted(CODEBOOKS))
@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_gives_the_bits_of_the_reference(name: str, dtype: torch.dtype) -> None:
    """# T57"""
    for size, blocksize in SIZES:
        stored = torch.randint(0, 256, ((size + 1) // 2 if BOOKS[name].numel() == 16 else size,), dtype=torch.uint8).to(DEVICE)
        absmax = torch.rand(-(-size // blocksize)).to(DEVICE)
        got, want = (run.dequantize_blockwise(stored, absmax, BOOKS[name], blocksize, size, dtype) for run in (read, read_reference))
        assert same_bits(got.cpu(), want.cpu()), (size, blocksize)


@pytest.mark.parametrize("dtype", FLOATS)
def test_double_quantization_is_undone_with_two_roundings(dtype: torch.dtype) -> None:
    """# T53: more than 256 blocks, and scales for which a fused multiply-add gives other bits."""
    size = 64 * 600 + 5
    packed = torch.randint(0, 256, ((size + 1) // 2,), dtype=torch.uint8).to(DEVICE)
    indices, nested, scales = _nested(601)
    level, absmax2 = nested[1][indices.long()].double(), nested[0].repeat_interleave(256)[:601].double()
    assert not torch.equal((level * absmax2 + nested[2].double()).float(), scales), "these scales could not tell one rounding from two"
    got = read.dequantize_blockwise(packed, indices, BOOKS["nf4"], 64, size, dtype, nested)
    assert same_bits(got.cpu(), read_reference.dequantize_blockwise(packed, scales, BOOKS["nf4"], 64, size, dtype).cpu())


def test_dequantize_writes_nothing_outside() -> None:
    """# T47: tails of every size: what lies behind the result is untouched."""
    for size in (*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 129, 4095, 4097):
        wide = torch.full((size + read.TILE,), 7.0, device=DEVICE)
        stored, absmax = write_reference.quantize_blockwise(_random(size), BOOKS["nf4"], 64)
        read.dequantize_into(wide[:size], stored, absmax, BOOKS["nf4"], 64)
        assert (wide[size:] == 7.0).all() and (wide[:size].abs() < 6).all(), size


@pytest.mark.parametrize("rows", (1, 3, 4, 5))
def test_few_rows_times_a_packed_weight(rows: int) -> None:
    for outputs, columns, blocksize in ((1, 64, 64), (7, 192, 64), (9, 2048 + 64, 64), (5, 96, 32), (6, 100, 64), (4, 33, 32)):
        for dtype in FLOATS if columns == 192 else FLOATS[:2]:
            x, count = _random(rows, columns, dtype=dtype), -(-outputs * columns // blocksize)
            packed = torch.randint(0, 256, ((outputs * columns + 1) // 2,), dtype=torch.uint8).to(DEVICE)
            indices, nested, scales = _nested(count)
            for absmax, more in ((scales, None), (indices, nested)):
                got = product.matmul_4bit(x, packed, absmax, BOOKS["nf4"], blocksize, (outputs, columns), dtype, more)
                dense = read_reference.dequantize_blockwise(packed, scales, BOOKS["nf4"], blocksize, outputs * columns, torch.float32)
                want = x.double() @ dense.view(outputs, columns).double().T
                assert got.dtype == dtype and got.shape == (rows, outputs)
                _close(got, want, ulps=2, floor=2e-6 if dtype == torch.float32 else 6e-3)


# ---- rms_norm


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", (0, 1, 2))
def test_rms_norm_and_its_gradients(form: int, dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (3, 64), (5, 123), (70, 16), (2, 2500)):
        x, residual, extra = (_slice(rows, columns, dtype) for _ in range(3))
        weight = _random(columns, dtype=torch.float32 if rows == 3 else dtype)
        got, want = norm.rms_norm(x, weight, 1e-5, form), norm_reference.rms_norm(x, weight, 1e-5, form)
        _close(got[0], want[0])
        _close(got[1], want[1])
        got_added = norm.add_rms_norm(x, residual, weight, 1e-5, form)
        want_added = norm_reference.add_rms_norm(x, residual, weight, 1e-5, form)
        assert same_bits(got_added[0].cpu(), want_added[0].cpu())
        _close(got_added[1], want_added[1])
        _close(got_added[2], want_added[2])
        for more in (None, extra):
            dy, rstd = _slice(rows, columns, dtype), want[1]
            _close(
                norm.rms_norm_backward(dy, x, weight, rstd, form, more),
                norm_reference.rms_norm_backward(dy, x, weight, rstd, form, more), floor=1e-5,
            )  # fmt: skip
            _close(
                norm.rms_norm_weight_grad(dy, x, rstd, form), norm_reference.rms_norm_weight_grad(dy, x, rstd, form), floor=1e-5
            )


def test_rms_norm_of_nothing_of_heads_and_of_nan() -> None:
    weight = _random(8)
    empty = _random(0, 8)
    assert norm.rms_norm(empty, weight, 1e-5, 0)[0].shape == (0, 8)
    assert norm.rms_norm_backward(empty, empty, weight, _random(0), 0).numel() == 0
    assert (norm.rms_norm_weight_grad(empty, empty, _random(0), 0) == 0).all()
    x = _random(2, 3, 5, 8)
    _close(norm.rms_norm(x.transpose(1, 2), weight, 1e-5, 1)[0], norm_reference.rms_norm(x.transpose(1, 2), weight, 1e-5, 1)[0])
    x[0, 0, 0, 3] = float("nan")
    y = norm.rms_norm(x, weight, 1e-5, 1)[0]
    assert y[0, 0, 0].isnan().all() and torch.isfinite(y[0, 0, 1:]).all()


def test_weight_gradient_over_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than one round of all programs takes, and a number of them that does not divide."""
    monkeypatch.setattr(norm, "PARTS", 3)
    for rows, columns in ((1000, 16), (7, 4000), (131, 16)):
        x, dy, weight = _random(rows, columns), _random(rows, columns), _random(columns)
        rstd = norm_reference.rms_norm(x, weight, 1e-5, 1)[1]
        _close(norm.rms_norm_weight_grad(dy, x, rstd, 1), norm_reference.rms_norm_weight_grad(dy, x, rstd, 1), floor=1e-5)


# ---- rope


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inverse", (False, True))
def test_rope_turns_as_the_reference(inverse: bool, dtype: torch.dtype) -> None:
    for tokens, heads, width, angles in ((1, 1, 2, 2), (5, 3, 16, 16), (4, 5, 20, 12), (3, 70, 64, 64), (2, 2, 8, 0), (0, 2, 8, 8)):
        fused = _random(tokens, heads + 2, width, dtype=dtype)
        x, cos, sin = fused[:, 1 : 1 + heads], _random(tokens, angles), _random(tokens, angles)
        want = rope_reference.rope(x, cos, sin, inverse)
        got = rope.rope(x, cos, sin, inverse)
        _close(got, want)
        assert got.is_contiguous()
        before = fused.clone()
        rope.rope_(x, cos, sin, inverse)
        _close(x, want)
        assert same_bits(fused[:, 0].cpu(), before[:, 0].cpu()) and same_bits(fused[:, -1].cpu(), before[:, -1].cpu())
        strange = before.transpose(0, 2).contiguous().transpose(0, 2)[:, 1 : 1 + heads]  # the width does not lie side by side
        rope.rope_(strange, cos, sin, inverse)
        _close(strange, want)


# ---- gated_mlp


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("act", ACTS)
def test_gated_act_and_its_gradients(act: str, dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (3, 65), (40, 16), (2, 2500), (0, 4)):
        both, dh = _random(rows, 2 * columns, dtype=dtype) * 4, _slice(rows, columns, dtype)
        gate, up = both.chunk(2, dim=-1)
        _close(gated.gated_act(gate, up, act), gated_reference.gated_act(gate, up, act))
        for got, want in zip(gated.gated_act_backward(dh, gate, up, act), gated_reference.gated_act_backward(dh, gate, up, act)):
            _close(got, want)
    far = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4, float("nan")], device=DEVICE)
    for got, want in zip(
        gated.gated_act_backward(torch.ones_like(far), far, torch.ones_like(far), act),
        gated_reference.gated_act_backward(torch.ones_like(far), far, torch.ones_like(far), act),
    ):
        _close(got, want)


# ---- linear_cross_entropy


def _plain(z: Tensor, labels: Tensor, softcap: float | None, scale: float) -> tuple[Tensor, Tensor]:
    """(sum of the losses, gradient) of the logits in float64."""
    given = z.detach().double().requires_grad_()
    logits = given * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    total.backward()
    assert given.grad is not None
    return total.detach(), given.grad


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("softcap", (None, 5.0))
@pytest.mark.parametrize("scale", (1.0, 0.25))
def test_cross_entropy_in_place(softcap: float | None, scale: float, dtype: torch.dtype) -> None:
    """# T27: several steps over a row, rows inside a wider buffer, the true class at both ends; nothing outside is written."""
    for rows, vocabulary in ((1, 2), (5, 13), (3, 4096 + 700)):
        buffer = _random(rows, vocabulary + 5, dtype=dtype) * 3
        outside = buffer[:, vocabulary:].clone()
        z = buffer[:, :vocabulary]
        labels = torch.randint(0, vocabulary, (rows,)).to(DEVICE)
        labels[0], labels[-1] = vocabulary - 1, 0
        total, gradient = _plain(z, labels, softcap, scale)
        before = z.clone()
        torch.testing.assert_close(loss.cross_entropy_(z, labels, softcap, scale, False).double(), total, rtol=2e-6, atol=1e-5)
        assert same_bits(z.cpu(), before.cpu())
        torch.testing.assert_close(loss.cross_entropy_(z, labels, softcap, scale, True).double(), total, rtol=2e-6, atol=1e-5)
        torch.testing.assert_close(z.double(), gradient, rtol=ULP[dtype], atol=3e-7)
        assert same_bits(buffer[:, vocabulary:].cpu(), outside.cpu())


def test_cross_entropy_of_sure_rows_and_extreme_logits() -> None:
    """# T27: p - 1 of a sure row is not zero; large logits and minus infinity do not overflow; a NaN shows."""
    z = torch.tensor([[8.0, 0.0], [300.0, -300.0], [float("-inf"), 1.0], [float("nan"), 1.0]], device=DEVICE)
    labels = torch.tensor([0, 1, 1, 1], device=DEVICE)
    total, gradient = _plain(z[:3], labels[:3], None, 1.0)
    narrow = z[:1].to(torch.bfloat16)
    loss.cross_entropy_(narrow, labels[:1], None, 1.0, True)
    _close(narrow, gradient[:1])
    assert loss.cross_entropy_(z[3:], labels[3:], None, 1.0, False).isnan()
    torch.testing.assert_close(loss.cross_entropy_(z[:3], labels[:3], None, 1.0, True).double(), total, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(z[:3].double(), gradient, rtol=1e-5, atol=3e-7)


# ---- adamw


@pytest.mark.parametrize("dtype", FLOATS)
def test_adamw_steps_as_the_reference(dtype: torch.dtype) -> None:
    """Several steps, gradients over six decades, sizes that are no whole tiles; what lies behind the buffer is untouched."""
    for size in (1, 255, 1024, 2500):
        wide = {name: _random(size + adam.TILE) for name in ("p", "m", "v")}
        wide["v"].abs_()
        want = {name: tensor[:size].clone() for name, tensor in wide.items()}
        behind = {name: tensor[size:].clone() for name, tensor in wide.items()}
        for step in (1, 2, 3):
            grad = (_random(size) * torch.logspace(-6, 0, size, device=DEVICE)).to(dtype)
            adam.adamw_(wide["p"][:size], grad, wide["m"][:size], wide["v"][:size], 1e-2, 0.9, 0.999, 1e-8, 0.1, step)
            step_reference.adamw_(want["p"], grad, want["m"], want["v"], 1e-2, 0.9, 0.999, 1e-8, 0.1, step)
        for name, tensor in wide.items():
            torch.testing.assert_close(tensor[:size], want[name], rtol=2e-6, atol=1e-6)
            assert same_bits(tensor[size:].cpu(), behind[name].cpu())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_adamw_with_moments_in_8_bits(dtype: torch.dtype) -> None:
    """The same indices but for a rounding at a threshold; a second moment above zero is not stored as zero."""
    books = BOOKS["dynamic-signed"], BOOKS["dynamic-unsigned"]
    for size in (1, 300, 1024, 2500):
        wide = adam.TILE + size
        blocks = -(-size // 256)
        runs = []
        for run in (adam, step_reference):
            torch.manual_seed(1)
            p, (m, v) = _random(wide), torch.zeros(2, wide, dtype=torch.uint8, device=DEVICE)
            m_absmax, v_absmax = torch.zeros(wide, device=DEVICE), torch.zeros(wide, device=DEVICE)
            behind = p[size:].clone()
            for step in (1, 2, 3):
                grad = (_random(size) * torch.logspace(-6, 0, size, device=DEVICE)).to(dtype)
                state = m[:size], m_absmax[:blocks], v[:size], v_absmax[:blocks]
                run.adamw_int8_(p[:size], grad, *state, *books, 1e-2, 0.9, 0.999, 1e-8, 0.1, step)
            assert same_bits(p[size:].cpu(), behind.cpu()) and not m[size:].any() and not m_absmax[blocks:].any() and not v[size:].any()
            assert (v[:size] > 0).all()
            runs.append((p[:size], m[:size].int(), v[:size].int(), m_absmax[:blocks], v_absmax[:blocks]))
        (p, m, v, *scales), (want_p, want_m, want_v, *want_scales) = runs
        assert (m - want_m).abs().max() <= 1 and (v - want_v).abs().max() <= 1
        assert (m != want_m).sum() + (v != want_v).sum() <= size // 200
        same = (m == want_m) & (v == want_v)
        torch.testing.assert_close(p[same], want_p[same], rtol=1e-5, atol=1e-6)
        for got, want in zip(scales, want_scales):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_adamw_sorts_a_codebook_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op hands the kernel the very tensors it was given, so that what is made of a codebook is kept for all parameters and steps."""
    monkeypatch.setattr(listing, "implementation", lambda *rest: adam)
    adam._sorted.cache_clear()
    books, p = (BOOKS["dynamic-signed"], BOOKS["dynamic-unsigned"]), _random(256)
    for step in (1, 2, 3):
        m, v = torch.zeros(2, 256, dtype=torch.uint8, device=DEVICE)
        tops = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
        step_op.adamw_int8_(p, p.clone(), m, tops[0], v, tops[1], *books, 1e-2, 0.9, 0.999, 1e-8, 0.1, step)
    assert adam._sorted.cache_info().misses == 2


# ---- more than 2^31 elements


@pytest.fixture
def huge(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    leave_pages_alone(monkeypatch)
    yield monkeypatch


def _far_rows(columns: int) -> tuple[Tensor, Tensor]:
    """Three rows 2^30 numbers apart (memory that is never touched between them), and the same close together."""
    close = _random(3, columns, dtype=torch.bfloat16)
    far = torch.empty(2 * 2**30 + columns, dtype=torch.bfloat16).as_strided((3, columns), (2**30, 1))
    far.copy_(close)
    return far, close


@interpreted_only
def test_rows_beyond_two_to_the_31(huge: pytest.MonkeyPatch) -> None:
    """# T52: row 2 begins at element 2^31."""
    far, close = _far_rows(8)
    weight, labels = _random(8), torch.tensor([0, 7, 3])
    assert same_bits(norm.rms_norm(far, weight, 1e-5, 0)[0], norm.rms_norm(close, weight, 1e-5, 0)[0])
    rstd = norm.rms_norm(close, weight, 1e-5, 0)[1]
    assert same_bits(norm.add_rms_norm(far, far, weight, 1e-5, 0)[1], norm.add_rms_norm(close, close, weight, 1e-5, 0)[1])
    assert same_bits(norm.rms_norm_backward(far, far, weight, rstd, 0, far), norm.rms_norm_backward(close, close, weight, rstd, 0, close))
    assert same_bits(norm.rms_norm_weight_grad(far, far, rstd, 0), norm.rms_norm_weight_grad(close, close, rstd, 0))
    for got, want in zip(gated.gated_act_backward(far, far, far, "silu"), gated.gated_act_backward(close, close, close, "silu")):
        assert same_bits(got, want)
    cos, sin = _random(3, 8), _random(3, 8)
    rope.rope_(far[:, None], cos, sin)
    rope.rope_(close[:, None], cos, sin)
    assert same_bits(far, close)
    assert loss.cross_entropy_(far, labels, None, 1.0, True) == loss.cross_entropy_(close, labels, None, 1.0, True)
    assert same_bits(far, close)


@interpreted_only
def test_blocks_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """# T52: the last blocks of tensors of more than 2^31 elements."""
    count = 2**31 + 4096 + 9
    only_the_last(monkeypatch, write)
    only_the_last(monkeypatch, read)
    x = torch.empty(count, dtype=torch.bfloat16)
    x[-4096:] = _random(4096).to(torch.bfloat16)
    stored, absmax = write.quantize_blockwise(x, BOOKS["nf4"], 64)
    tail = x[-(64 + 9) :]
    want = write_reference.quantize_blockwise(tail, BOOKS["nf4"], 64)
    assert same_bits(stored[-(32 + 5) :], want[0]) and same_bits(absmax[-2:], want[1])
    out = read.dequantize_blockwise(stored, absmax, BOOKS["nf4"], 64, count, torch.bfloat16)
    assert same_bits(out[-73:], read_reference.dequantize_blockwise(*want, BOOKS["nf4"], 64, 73, torch.bfloat16))


@interpreted_only
def test_optimizer_states_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """# T52: the last numbers of a flat buffer of more than 2^31 (gradient and moments are one piece of memory, to ask for less of it)."""
    only_the_last(monkeypatch, adam)
    count = 2**31 + 4096 + 9
    p, same = torch.empty(count), torch.empty(count)
    tail, numbers = slice(count - 500, count), (1e-2, 0.9, 0.999, 1e-8, 0.1, 1)
    p[tail], same[tail] = _random(500), _random(500).abs()
    want = [p[tail].clone(), *(same[tail].clone() for _ in range(3))]
    adam.adamw_(p, same, same, same, *numbers)
    step_reference.adamw_(*want, *numbers)
    torch.testing.assert_close(p[tail], want[0], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(same[tail], want[3], rtol=2e-6, atol=1e-6)
