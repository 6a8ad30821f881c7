"""AdamW in Triton over one flat buffer: every number is read once and written once.

8-bit state: a program takes whole blocks of 256, reads both moments through their codebooks, updates in fp32, applies the update, and
only then rounds the moments back to indices, as quantize_blockwise does.  Nothing of the size of the state is made.
The bits are the reference's but where that fuses a product with a sum: nothing is fused here, and quotients and roots are correctly
rounded, which costs nothing beside the traffic of 28 bytes per number.  Tensors that do not lie in one piece take the reference.

Proven in Triton's interpreter against the reference; compiled for sm_90 and sm_80, not yet timed on a GPU.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.adamw import BLOCKSIZE, reference
from halfbyte.kernels.quantize_blockwise.reference import thresholds_of
from halfbyte.kernels.quantize_blockwise.triton_gpu import rank_of, scaled_blocks
from halfbyte.kernels.triton_launch import launch

TILE = 1024  # numbers of one program


@triton.jit
def _moved(p, g, m, v, keep, rate, rest1, beta2, rest2, root, eps):  # type: ignore[no-untyped-def]
    """(p, m, v) after the step; the formula of the package, with keep = 1 - lr wd, rate = lr / (1 - beta1^t), rest = 1 - beta."""
    m = m + rest1 * (g - m)
    v = v * beta2 + rest2 * g * g
    wide = tl.zeros(p.shape, tl.float32)
    below = tl.div_rn(tl.sqrt_rn(v), wide + root) + eps
    return p * keep - rate * tl.div_rn(m, below), m, v


@triton.jit
def _step(p, grad, m, v, count, keep, rate, rest1, beta2, rest2, root, eps, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = at < count
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(p + at, mask=inside, other=0.0), tl.load(m + at, mask=inside, other=0.0), tl.load(v + at, mask=inside, other=0.0)
    new_p, new_m, new_v = _moved(old[0], g, old[1], old[2], keep, rate, rest1, beta2, rest2, root, eps)
    tl.store(p + at, new_p, mask=inside)
    tl.store(m + at, new_m, mask=inside)
    tl.store(v + at, new_v, mask=inside)


@triton.jit
def _step_int8(  # type: ignore[no-untyped-def]
    p, grad, m, m_absmax, v, v_absmax, m_book, v_book, m_thresholds, m_order, v_thresholds, v_order,
    count, keep, rate, rest1, beta2, rest2, root, eps, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    inside, there, whole = at < count, block * BLOCKSIZE < count, (block + 1) * BLOCKSIZE <= count
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    m_scale, v_scale = tl.load(m_absmax + block, mask=there, other=0.0), tl.load(v_absmax + block, mask=there, other=0.0)
    m_index, v_index = tl.load(m + at, mask=inside, other=0).to(tl.int32), tl.load(v + at, mask=inside, other=0).to(tl.int32)
    old_m, old_v = tl.load(m_book + m_index) * m_scale[:, None], tl.load(v_book + v_index) * v_scale[:, None]
    old_p = tl.load(p + at, mask=inside, other=0.0)
    new_p, new_m, new_v = _moved(old_p, g, old_m, old_v, keep, rate, rest1, beta2, rest2, root, eps)
    tl.store(p + at, new_p, mask=inside)
    # past the end of the buffer lie zeros, which move no maximum
    new_m, new_v = tl.where(inside, new_m, 0.0), tl.where(inside, new_v, 0.0)
    scaled, top = scaled_blocks(new_m, whole)
    tl.store(m + at, tl.load(m_order + rank_of(scaled, m_thresholds, 8)), mask=inside)
    tl.store(m_absmax + block, top, mask=there)
    scaled, top = scaled_blocks(new_v, whole)
    index = tl.load(v_order + rank_of(scaled, v_thresholds, 8)).to(tl.int32)
    index = tl.where((index == 0) & (new_v > 0), 1, index)  # a second moment above zero is never stored as zero
    tl.store(v + at, index.to(tl.uint8), mask=inside)
    tl.store(v_absmax + block, top, mask=there)


@lru_cache(maxsize=16)
def _sorted(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """(thresholds, order uint8) of a codebook, made once for a tensor: the parameters of a device share theirs."""
    thresholds, order = thresholds_of(codebook)
    return thresholds, order.byte()


def _numbers(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> tuple[float, ...]:
    """What the kernels need of the settings, formed in double precision."""
    return 1 - lr * weight_decay, lr / (1 - beta1**step), 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5, eps


def adamw_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> None:
    """p, m, v fp32 in place, grad of any float type; one shape."""
    if not all(tensor.is_contiguous() for tensor in (p, grad, m, v)):
        reference.adamw_(p, grad, m, v, lr, beta1, beta2, eps, weight_decay, step)
        return
    numbers = _numbers(lr, beta1, beta2, eps, weight_decay, step)
    launch(_step, -(-p.numel() // TILE), p, grad, m, v, p.numel(), *numbers, exact=True, WIDTH=TILE)


def adamw_int8_(
    p: Tensor, grad: Tensor, m_indices: Tensor, m_absmax: Tensor, v_indices: Tensor, v_absmax: Tensor, m_codebook: Tensor,
    v_codebook: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    """p fp32, indices (n,) uint8 and absmax (ceil(n / 256),) fp32 of both moments in place; grad of any float type."""
    if not all(tensor.is_contiguous() for tensor in (p, grad, m_indices, m_absmax, v_indices, v_absmax)):
        reference.adamw_int8_(
            p, grad, m_indices, m_absmax, v_indices, v_absmax, m_codebook, v_codebook, lr, beta1, beta2, eps, weight_decay, step
        )
        return
    numbers, blocks = _numbers(lr, beta1, beta2, eps, weight_decay, step), TILE // BLOCKSIZE
    launch(
        _step_int8, -(-p.numel() // TILE), p, grad, m_indices, m_absmax, v_indices, v_absmax, m_codebook, v_codebook,
        *_sorted(m_codebook), *_sorted(v_codebook), p.numel(), *numbers, exact=True, BLOCKSIZE=BLOCKSIZE, BLOCKS=blocks,
    )  # fmt: skip
