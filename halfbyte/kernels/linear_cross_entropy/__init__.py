"""linear_cross_entropy: the output layer and the token loss in one, without the logits of all tokens.

    z_NV  = softcap * tanh(scale * (h_NH @ W_VH.T + b_V) / softcap)        (softcap and bias only where given)
    loss  = sum over rows with a label of  logsumexp(z_n) - z_n[label_n]
    dz    = softmax(z) - onehot(label),  then times (1 - (z/softcap)^2) * scale
    dh    = dz @ W,   dW = dz.T @ h,   db = sum_n dz

Rows labelled -100 are dropped before any matmul.  The rest goes through in chunks of about 64 MiB of fp32 logits; the forward already
leaves the gradients behind (only those that are asked for), so that the backward multiplies them by the upstream scalar and no
logits are kept or made twice.  Softmax and the gradient p - 1 of the true class are formed in fp32 before they are rounded.
Labels are taken as they stand: the shift by one token is the caller's.

Source: https://arxiv.org/abs/2410.10989 (Liger), https://arxiv.org/abs/2411.09009 (cut cross-entropy)
Shapes: hidden (N, H), weight (V, H), labels (N,) int64, bias (V,) -> () fp32 (fp64 for fp64 inputs)
"""

from halfbyte.kernels.linear_cross_entropy.reference import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
