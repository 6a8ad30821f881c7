"""LoraLinear: a frozen linear layer with a low-rank update beside it.

    y_TO = base(x_TI) + scaling * B_OR (A_RI drop(x_TI))          scaling = alpha / rank

The base is any layer whose dense weight can be asked for (quant/dense.py): nn.Linear, Conv1D, QuantLinear.  It is never changed.
The factors are float32 masters by default whatever the base is kept in.  The plain update is computed in the type of the base's result,
with the factors rounded to it and every product accumulated in float32: so layers that share an input share what the backward pass
keeps of it.  DoRA and a lora_bias are computed in the factors' type.  No type is ever read from a weight: a packed weight is uint8.

An initialisation that needs "base minus its own start" (PiSSA) keeps the start as two constant factors beside the trained ones:

    delta = scaling * (B A - B0 A0) = scaling * [B | -B0] [A ; A0]

so that the base stays as it was loaded and the adapter works on it anywhere.
Does not choose layers (targets.py), start values (init.py) or file names.  Source: https://arxiv.org/abs/2106.09685
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.config.lora import LoraConfig
from halfbyte.errors import UnsupportedError
from halfbyte.lora.trained import TrainedParts
from halfbyte.lora.variants import dora_gain, row_norms, scaling_of
from halfbyte.quant.dense import dense_weight, shape_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PassedBy(UnsupportedError, AttributeError):
    """Somebody asks an adapted layer for its weight; an AttributeError too, so that looking whether there is one finds none."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(
            "a model must call the layers that carry an adapter", code="E-UNSUP-047", place="lora.targets",
            found=f"it reads the weight of {base!r} itself", remedy="put such layers into lora.exclude, by the end of their names",
            nothing_done="Nothing was trained.",
        )  # fmt: skip


class LoraLinear(nn.Module):
    """`base` (O, I) with factors lora_a (R, I) and lora_b (O, R); optional lora_bias (O,) and DoRA magnitude (O,)."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_bias: nn.Parameter | None
    magnitude: nn.Parameter | None
    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(self, base: nn.Module, config: LoraConfig, *, rank: int | None = None, alpha: float | None = None) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.rank = config.rank if rank is None else rank
        self.alpha = float(config.alpha if alpha is None else alpha)
        self.scaling = scaling_of(self.alpha, self.rank, config.rslora)
        self.dropout = config.dropout
        self.variant = "dora" if config.dora else "plain"
        self.out_features, self.in_features = shape_of(self.frozen_base)
        dtype, device = DTYPES[config.dtype], device_of(base)
        self.lora_a = nn.Parameter(torch.zeros(self.rank, self.in_features, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, self.rank, dtype=dtype, device=device))
        self.lora_bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if config.lora_bias else None
        self.magnitude = nn.Parameter(torch.ones(self.out_features, dtype=dtype, device=device)) if config.dora else None
        self.register_buffer("start_a", None)
        self.register_buffer("start_b", None)

    def __getattr__(self, name: str) -> Any:
        """As of any module; a model that reads the weight itself (a fused Mamba kernel) would pass by the adapter, which is refused."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "weight":
                raise PassedBy(self.base) from None
            raise

    @property
    def frozen_base(self) -> nn.Module:
        """The layer as it was before anything was trained."""
        return self.base.base if isinstance(self.base, TrainedParts) else self.base

    @property
    def bias(self) -> Tensor | None:
        """The base's bias (O,), the trained one where biases are trained."""
        bias = getattr(self.base, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) whose product is the update before scaling: (R, I) and (O, R), or 2R with a constant start taken off."""
        if self.start_a is None or self.start_b is None:
            return self.lora_a, self.lora_b
        return torch.cat([self.lora_a, self.start_a]), torch.cat([self.lora_b, -self.start_b], dim=1)

    def norm(self) -> Tensor:
        """Row norms of W + delta, (O,) float32, without gradient."""
        lora_a, lora_b = self.factors()
        return row_norms(dense_weight(self.frozen_base).detach(), lora_a, lora_b, self.scaling)

    @torch.no_grad()
    def start_magnitude(self) -> None:
        """DoRA begins with the norms of the weight it starts from, so that the first forward equals the base's."""
        if self.magnitude is not None:
            self.magnitude.copy_(self.norm())

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling * B A, (O, I) in float32; without DoRA's gain."""
        lora_a, lora_b = self.factors()
        return (lora_b.float() @ lora_a.float()) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O), in the type that the base answers in."""
        y = self.base(x)
        dropping = self.training and self.dropout > 0
        h = F.dropout(x, self.dropout) if dropping else x
        lora_a, lora_b = self.factors()
        if self.magnitude is None and self.lora_bias is None and y.dtype == x.dtype:
            low_TR = F.linear(h, lora_a.to(y.dtype)).reshape(-1, lora_a.shape[0])
            return torch.addmm(y.reshape(-1, self.out_features), low_TR, lora_b.to(y.dtype).T, alpha=self.scaling).view_as(y)
        update = F.linear(F.linear(h.to(lora_a.dtype), lora_a), lora_b, self.lora_bias) * self.scaling
        if self.magnitude is None:
            return (y + update).to(y.dtype)
        gain = dora_gain(self.magnitude, self.norm())
        straight = self.base(h) if dropping else y
        if self.bias is not None:
            straight = straight - self.bias
        return (y + (gain - 1) * straight + gain * update).to(y.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}, dropout={self.dropout:g}, {self.variant}"


def device_of(module: nn.Module) -> torch.device:
    """Where the module's tensors lie; the CPU for a module without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
