"""The specification of linear_cross_entropy (`plain`) and of its middle part (`cross_entropy_`) in plain PyTorch."""

import torch
from torch import Tensor


def plain(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, *, bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """All logits at once, gradients by autograd."""
    logits = torch.nn.functional.linear(hidden_NH, weight_VH, bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, labels_N, ignore_index=-100, reduction="sum")


def cross_entropy_(z: Tensor, labels: Tensor, softcap: float | None, scale: float, gradient: bool) -> Tensor:
    """() summed loss; z (n, V) raw logits become dloss/dz in place where `gradient`, through a copy in fp32 where they are narrower."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
    if softcap is not None:
        wide.div_(softcap).tanh_()
        slope = 1 - wide * wide
        wide *= softcap
    wide -= wide.amax(dim=1, keepdim=True) if wide.numel() else 0  # a certain row's loss is smaller than the last place of its logits
    true = wide.gather(1, labels[:, None])
    log_total = torch.logsumexp(wide, dim=1, keepdim=True)
    loss = (log_total - true).sum()
    if gradient:
        wide.sub_(log_total).exp_()
        wide.scatter_add_(1, labels[:, None], wide.new_full((len(labels), 1), -1.0))
        if softcap is not None:
            wide *= slope
        wide *= scale
        z.copy_(wide)
    return loss
