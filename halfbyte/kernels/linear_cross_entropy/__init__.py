"""linear_cross_entropy: the output layer and the token loss in one, without the logits of all tokens.

    z_NV  = softcap * tanh(scale * (h_NH @ W_VH.T + b_V) / softcap)        (softcap and bias only where given)
    loss  = sum over rows with a label of  logsumexp(z_n) - z_n[label_n]
    dz    = softmax(z) - onehot(label),  then times (1 - (z/softcap)^2) * scale
    dh    = dz @ W,   dW = dz.T @ h,   db = sum_n dz

Rows labelled -100 are dropped before any matmul.  The rest goes through in chunks (`chunks.py`) whose logits share one buffer; the
forward already leaves the gradients behind (only those that are asked for), so that the backward multiplies them by the upstream
scalar and no logits are kept or made twice.  The part between the two matmuls is an op of its own, `cross_entropy_`, which turns logits
into their gradient where they lie: bfloat16 logits are never widened into a second buffer.  Softmax and the gradient p - 1 of the
true class are formed in fp32 before they are rounded.  Labels are taken as they stand: the shift by one token is the caller's.

Source: https://arxiv.org/abs/2410.10989 (Liger), https://arxiv.org/abs/2411.09009 (cut cross-entropy), https://arxiv.org/abs/1805.02867
(maximum and sum in one pass)
Shapes: hidden (N, H), weight (V, H), labels (N,) int64, bias (V,) -> () fp32 (fp64 for fp64 inputs)
"""

import torch
from torch import Tensor

from halfbyte.kernels import listing
from halfbyte.kernels.library import LIBRARY

OP = "linear_cross_entropy"
LIBRARY.define("cross_entropy_(Tensor(a!) z, Tensor labels, float? softcap, float scale, bool gradient) -> Tensor")


def check(z: Tensor, labels: Tensor) -> None:
    """Raise ValueError where the arguments do not fit each other."""
    if z.dim() != 2 or not z.is_floating_point() or labels.shape != z.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"logits {z.dtype} {tuple(z.shape)} and labels {labels.dtype} {tuple(labels.shape)} do not fit")


def _serve(z: Tensor, labels: Tensor, softcap: float | None, scale: float, gradient: bool) -> Tensor:
    check(z, labels)
    return listing.implementation(OP, z).cross_entropy_(z, labels, softcap, scale, gradient)


def _fake(z: Tensor, labels: Tensor, softcap: float | None, scale: float, gradient: bool) -> Tensor:
    return z.new_empty((), dtype=torch.promote_types(z.dtype, torch.float32))


LIBRARY.impl("cross_entropy_", _serve, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::cross_entropy_", _fake, lib=LIBRARY)


def cross_entropy_(z: Tensor, labels: Tensor, softcap: float | None, scale: float, gradient: bool) -> Tensor:
    """() summed loss of raw logits z (n, V), which become dloss/dz in their own dtype where `gradient`; labels (n,) within 0..V-1.

    Labels are not checked against V here: the caller has looked at all of them at once.  Raises ValueError on shapes that do not fit.
    """
    return torch.ops.halfbyte.cross_entropy_(z, labels, softcap, scale, gradient)


from halfbyte.kernels.linear_cross_entropy.chunks import linear_cross_entropy  # noqa: E402  (the op above must be there first)

__all__ = ["cross_entropy_", "linear_cross_entropy"]
