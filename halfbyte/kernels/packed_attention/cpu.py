"""packed_attention on the CPU: divides the work into items and runs the native kernels; any head width; float16 by way of float32.

An item is done by one thread from beginning to end, so a result does not depend on the number of threads or on who took which item,
with one exception: where one segment is so long that its heads must be divided between threads, dk and dv of a group of heads are added
up in another order.  Items are handed out by a counter, the longest first: a thread that is held up by others on its core takes fewer.
"""

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from halfbyte.kernels.native import SMALL
from halfbyte.kernels.packed_attention.backward import backward
from halfbyte.kernels.packed_attention.backward import room as backward_room
from halfbyte.kernels.packed_attention.forward import forward
from halfbyte.kernels.packed_attention.forward import room as forward_room
from halfbyte.kernels.packed_attention.layout import QUERIES
from halfbyte.kernels.scratch import borrowed

DTYPES = (torch.float32, torch.bfloat16)
HEADS = 4  # of one item of the forward: their queries and sums (96 x D each) should stay in a second-level cache
_ALONE = 1 << 17  # multiplications of the forward below which a second thread is not woken


def _work(edges: tuple[int, ...], heads: int, dim: int) -> int:
    """More than `native` wants for a second thread where there is enough to multiply, otherwise nothing."""
    products = sum((end - begin) ** 2 for begin, end in pairwise(edges)) * heads * dim
    return 2 * SMALL if products > _ALONE else 0


@lru_cache(maxsize=64)
def forward_items(edges: tuple[int, ...], heads: int, group: int) -> Tensor:
    """(n, 5) int32: segment begin, first and last query + 1, first head, number of heads; most keys first."""
    items = [
        (begin, first, min(end, first + QUERIES), shared + head, min(HEADS, group - head))
        for begin, end in pairwise(edges)
        for first in range(begin, end, QUERIES)
        for shared in range(0, heads, group)
        for head in range(0, group, HEADS)
    ]
    items.sort(key=lambda item: (item[2] - item[1]) * (item[2] - item[0]), reverse=True)
    return torch.tensor(items, dtype=torch.int32).view(-1, 5)


@lru_cache(maxsize=64)
def backward_items(edges: tuple[int, ...], heads: int, group: int, threads: int) -> tuple[Tensor, bool]:
    """((n, 5) int32 as above, whether heads that share keys are divided): they are where one item would be most of a thread's work."""
    sizes = [(end - begin) ** 2 for begin, end in pairwise(edges)]
    split = group > 1 and threads > 1 and max(sizes, default=0) * group * threads * 2 > sum(sizes) * heads
    step = 1 if split else group
    items = [
        (begin, begin, end, head, step) for begin, end in pairwise(edges) if end > begin for head in range(0, heads, step)
    ]
    items.sort(key=lambda item: item[2] - item[0], reverse=True)
    return torch.tensor(items, dtype=torch.int32).view(-1, 5), split


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """(T, H, D) as one contiguous stretch and the elements from one token to the next; copied only where heads are not side by side."""
    tokens, heads, dim = x.shape
    if tokens == 0 or x.stride(2) != 1 or (heads > 1 and x.stride(1) != dim) or (tokens > 1 and x.stride(0) < heads * dim):
        x = x.contiguous()
    apart = x.stride(0) if tokens > 1 else heads * dim
    return x.as_strided(((tokens - 1) * apart + heads * dim if tokens else 0,), (1,)), apart


def packed_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, starts: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(o (T, H, D) of q's dtype, lse (H, T) float32)."""
    if q_THD.dtype not in DTYPES:
        o, lse_HT = packed_attention(q_THD.float(), k_TGD.float(), v_TGD.float(), starts, scale, window, softcap)
        return o.to(q_THD.dtype), lse_HT
    tokens, heads, dim = q_THD.shape
    group = heads // k_TGD.shape[1]
    o, lse_HT = torch.empty_like(q_THD, memory_format=torch.contiguous_format), torch.empty(heads, tokens)
    edges = tuple(starts.tolist())
    items = forward_items(edges, heads, group)
    (q, q_apart), (k, k_apart), (v, v_apart) = (_rows(x) for x in (q_THD, k_TGD, v_TGD))
    threads, room = min(torch.get_num_threads(), max(1, len(items))), forward_room(min(HEADS, group), dim)
    with borrowed((threads * room,), torch.float32, q.device) as scratch:
        forward(
            threads, q, k, v, o, lse_HT, items, torch.zeros(1, dtype=torch.int64), scratch, room, len(items), tokens,
            q_apart, k_apart, v_apart, heads, group, dim, window, scale, softcap, work=_work(edges, heads, dim),
        )  # fmt: skip
    return o, lse_HT


def packed_attention_backward(
    do: Tensor, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, o: Tensor, lse_HT: Tensor, starts: Tensor, scale: float, window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), shapes and dtypes of q, k, v."""
    if q_THD.dtype not in DTYPES:
        upstream, q, k, v, wide_o = (x.float() for x in (do, q_THD, k_TGD, v_TGD, o))
        dq, dk, dv = packed_attention_backward(upstream, q, k, v, wide_o, lse_HT, starts, scale, window, softcap)
        return dq.to(q_THD.dtype), dk.to(q_THD.dtype), dv.to(q_THD.dtype)
    tokens, heads, dim = q_THD.shape
    group = heads // k_TGD.shape[1]
    edges = tuple(starts.tolist())
    items, split = backward_items(edges, heads, group, torch.get_num_threads())
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_TGD, v_TGD))
    partial = torch.empty(2, tokens, heads, dim) if split else None
    (flat_do, do_apart), (flat_q, q_apart), (flat_k, k_apart), (flat_v, v_apart) = (_rows(x) for x in (do, q_THD, k_TGD, v_TGD))
    longest = max((end - begin for begin, end in pairwise(edges)), default=0)
    threads, room = min(torch.get_num_threads(), max(1, len(items))), backward_room(longest, dim)
    with borrowed((threads * room,), torch.float32, q_THD.device) as scratch:
        backward(
            threads, flat_do, flat_q, flat_k, flat_v, o.contiguous(), lse_HT, dq, dk, dv, partial, items, torch.zeros(1, dtype=torch.int64),
            scratch, room, longest, len(items), tokens, do_apart, q_apart, k_apart, v_apart, heads, group, dim, window, scale, softcap,
            int(split), work=_work(edges, heads, dim),
        )  # fmt: skip
    if partial is not None:
        for target, source in zip((dk, dv), partial, strict=True):
            target.copy_(source.view(tokens, heads // group, group, dim).sum(2))
    return dq, dk, dv
