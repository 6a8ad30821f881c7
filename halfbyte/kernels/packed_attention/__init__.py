"""packed_attention: causal attention of many sequences laid end to end, none of which sees another.

    s_ij  = scale q_i . k_j                    then softcap tanh(s / softcap) where softcap > 0
    seen    i and j in one segment, j <= i, and i - window < j where window > 0
    p_ij  = exp(s_ij - lse_i),   lse_i = ln sum_j e^(s_ij)            over what i sees
    o_i   = sum_j p_ij v_j

    delta_i = do_i . o_i,   ds_ij = p_ij (do_i . v_j - delta_i) (1 - (s_ij / softcap)^2)
    dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i p_ij do_i

Heads are grouped: query head h reads key and value head h // (H / G).  Between forward and backward stay q, k, v, o and lse, no
probabilities; a kernel holds scores of one block of queries at a time.  On the CPU a segment's result depends on that segment alone, to
the bit.  A GPU runs PyTorch's own attention (`gpu.py`).  Scores and sums are float32; float64 stays float64.

Source: https://arxiv.org/abs/2205.14135, https://arxiv.org/abs/2307.08691 (FlashAttention); window: https://arxiv.org/abs/2310.06825
(Mistral); soft cap: https://arxiv.org/abs/2408.00118 (Gemma 2)
Shapes: q, o (T, H, D), k, v (T, G, D), H a multiple of G; starts (S + 1,) int32 on the CPU, 0 ... T rising; lse (H, T) fp32
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.library import LIBRARY
from halfbyte.kernels.packed_attention import gpu, reference

OP = "packed_attention"
LIBRARY.define("packed_attention(Tensor q, Tensor k, Tensor v, Tensor starts, float scale, int window, float softcap) -> (Tensor, Tensor)")
LIBRARY.define(
    "packed_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor starts, float scale, int window,"
    " float softcap) -> (Tensor, Tensor, Tensor)"
)


def check(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int, softcap: float) -> None:
    """Raise ValueError where the arguments do not fit each other."""
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]) or not q.shape[2]:
        raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit each other")
    if not k.shape[1] or not q.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"queries, keys and values have one floating-point type, found {q.dtype}, {k.dtype}, {v.dtype}")
    if starts.dtype != torch.int32 or starts.device.type != "cpu" or starts.dim() != 1 or not len(starts):
        raise ValueError(f"starts are one row of int32 on the CPU, found {starts.dtype} of shape {tuple(starts.shape)} on {starts.device}")
    edges = starts.tolist()
    if edges[0] != 0 or edges[-1] != q.shape[0] or edges != sorted(edges):
        raise ValueError(f"starts rise from 0 to the number of tokens, {q.shape[0]}, found {edges[:4]} ... {edges[-4:]}")
    if window < 0 or softcap < 0:
        raise ValueError(f"window and softcap are 0 (none) or positive, found {window} and {softcap}")


def _implementation(q: Tensor) -> Any:
    # the op itself meets a GPU only with what PyTorch's attention cannot do
    return reference if q.device.type == "cuda" else listing.implementation(OP, q)


def _forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int, softcap: float) -> tuple[Tensor, Tensor]:
    check(q, k, v, starts, window, softcap)
    return _implementation(q).packed_attention(q, k, v, starts, scale, window, softcap)


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, starts: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    check(q, k, v, starts, window, softcap)
    if do.shape != q.shape or o.shape != q.shape or do.dtype != q.dtype or o.dtype != q.dtype or lse.shape != (q.shape[1], q.shape[0]):
        raise ValueError(f"do {tuple(do.shape)}, o {tuple(o.shape)} and lse {tuple(lse.shape)} do not fit queries {tuple(q.shape)}")
    return _implementation(q).packed_attention_backward(do, q, k, v, o, lse, starts, scale, window, softcap)


def _fake(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int, softcap: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, starts: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ctx.scale, ctx.window, ctx.softcap = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, starts)


def _gradients(ctx: Any, do: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = torch.ops.halfbyte.packed_attention_backward(do, *ctx.saved_tensors, ctx.scale, ctx.window, ctx.softcap)
    return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None, None


LIBRARY.impl("packed_attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("packed_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::packed_attention", _fake, lib=LIBRARY)
torch.library.register_fake("halfbyte::packed_attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("halfbyte::packed_attention", _gradients, setup_context=_keep, lib=LIBRARY)


def packed_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, starts: Tensor, scale: float, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """o (T, H, D) of q's dtype; differentiable in q, k and v.  Raises ValueError on arguments that do not fit."""
    if q_THD.device.type == "cuda" and listing.chosen(OP, "cuda") == "torch" and not gpu.missing(q_THD, softcap):
        check(q_THD, k_TGD, v_TGD, starts, window, softcap)
        return gpu.packed_attention(q_THD, k_TGD, v_TGD, starts, scale, window)
    return torch.ops.halfbyte.packed_attention(q_THD, k_TGD, v_TGD, starts, scale, window, softcap)[0]


def packed_attention_backward(
    do: Tensor, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, o: Tensor, lse_HT: Tensor, starts: Tensor, scale: float, window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) with the shapes and dtypes of q, k, v; `o` and `lse_HT` are what the forward op returned."""
    return torch.ops.halfbyte.packed_attention_backward(do, q_THD, k_TGD, v_TGD, o, lse_HT, starts, scale, window, softcap)
