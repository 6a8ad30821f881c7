"""A dense module of fused experts with other weights: what dense.with_weight is for linear layers.

The new module is of the stock class, with the weights in the stock layout ((E, O, I), or (E, I, O) where `is_transposed`), and
shares biases, norms and settings with the old one.  Packed experts are dequantized expert by expert; nothing is ever packed again.
"""

import torch
from torch import Tensor, nn

from halfbyte.quant.experts import QuantExperts, dense_expert, expert_shapes


@torch.no_grad()
def dense_fused(module: nn.Module, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """(E, O, I) the dense weights of one fused parameter; a new tensor."""
    return torch.stack([dense_expert(module, name, expert, dtype) for expert in range(expert_shapes(module)[name][0])])


@torch.no_grad()
def with_expert_weights(module: nn.Module, weights_EOI: dict[str, Tensor]) -> nn.Module:
    """Stock experts like `module` in which the named parameters have these (E, O, I) values; the others keep theirs, densely."""
    kind = module.stock if isinstance(module, QuantExperts) else type(module)
    with torch.device("meta"):
        new: nn.Module = kind(module.config)
    for name in expert_shapes(module):
        value = weights_EOI[name] if name in weights_EOI else dense_fused(module, name)
        value = value.transpose(1, 2) if module.is_transposed else value
        new.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=False))
    for name, parameter in module.named_parameters(recurse=False):
        if name not in expert_shapes(module):
            new.register_parameter(name, parameter)
    for name, child in module.named_children():
        new.add_module(name, child)
    return new.train(module.training)
