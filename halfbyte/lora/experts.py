"""LoraExperts: low-rank updates beside the fused weights of a mixture of experts.

A fused parameter holds the weights of E experts as one tensor, (E, O, I), or (E, I, O) where the module is `is_transposed`.  Each expert e
has its own update, and the factors of all experts lie in two matrices, laid out as PEFT's ParamWrapper writes them:

    lora_a (E R, I)   expert-major: rows e R ... e R + R - 1 belong to expert e
    lora_b (O, E R)   rank-major:   column r E + e belongs to expert e

    y = x W_e^T + scaling * (x A_e^T) B_e^T

The update is applied to the tokens of the expert, so no dense (O, I) update is ever built in training.
No dropout, DoRA or bias here, as in PEFT (the update cannot be told apart from the weight in its forward).
Source: https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py (ParamWrapper)
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.config.lora import LoraConfig
from halfbyte.errors import UnsupportedError
from halfbyte.lora.layer import DTYPES, device_of
from halfbyte.lora.variants import scaling_of
from halfbyte.quant.experts import expert_shapes, experts_forward, projection


class ExpertUpdate(nn.Module):
    """The factors of one fused parameter: lora_a (E R, I), lora_b (O, E R)."""

    def __init__(
        self, shape: tuple[int, int, int], config: LoraConfig, *, rank: int, alpha: float, name: str, device: torch.device
    ) -> None:
        super().__init__()
        if config.dropout or config.dora or config.lora_bias:
            raise UnsupportedError(
                "updates of fused experts know no dropout, DoRA or bias", code="E-UNSUP-042", place=name,
                found=f"dropout={config.dropout}, dora={config.dora}, lora_bias={config.lora_bias}", expected="none of them",
                remedy="set them off, or take the experts out of the targets",
            )  # fmt: skip
        self.config = config
        self.num_experts, self.out_features, self.in_features = shape
        self.rank, self.alpha, self.scaling = rank, float(alpha), scaling_of(alpha, rank, config.rslora)
        dtype = DTYPES[config.dtype]
        self.lora_a = nn.Parameter(torch.zeros(self.num_experts * rank, self.in_features, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, self.num_experts * rank, dtype=dtype, device=device))

    def factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """(A_e (R, I), B_e (O, R)); views."""
        lora_a = self.lora_a.view(self.num_experts, self.rank, self.in_features)[expert]
        return lora_a, self.lora_b.view(self.out_features, self.rank, self.num_experts)[:, :, expert]

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """x (T, I) of the tokens of one expert -> the update (T, O)."""
        lora_a, lora_b = self.factors(expert)
        return F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b) * self.scaling

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling * B_e A_e of all experts, (E, O, I) in float32."""
        lora_a = self.lora_a.float().view(self.num_experts, self.rank, self.in_features)
        lora_b = self.lora_b.float().view(self.out_features, self.rank, self.num_experts)
        return torch.einsum("ore,eri->eoi", lora_b, lora_a) * self.scaling

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}"


class LoraExperts(nn.Module):
    """`base`, a module of fused experts, with an update for each parameter in `own`: name -> (rank, alpha)."""

    def __init__(self, base: nn.Module, config: LoraConfig, own: Mapping[str, tuple[int, float]], *, name: str) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.updates = nn.ModuleDict()
        for parameter, shape in expert_shapes(base).items():
            if parameter in own:
                rank, alpha = own[parameter]
                place = f"{name}.{parameter}"
                self.updates[parameter] = ExpertUpdate(shape, config, rank=rank, alpha=alpha, name=place, device=device_of(base))

    @property
    def frozen_base(self) -> nn.Module:
        """The experts as they were loaded."""
        return self.base

    def named_updates(self) -> dict[str, ExpertUpdate]:
        """parameter name -> its update, in definition order of the parameters."""
        return {name: update for name, update in self.updates.items() if isinstance(update, ExpertUpdate)}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden (T, H), index and weights (T, K) -> (T, H), as the stock module."""
        straight, updates = projection(self.base), self.named_updates()

        def project(name: str, x: Tensor, expert: int) -> Tensor:
            y = straight(name, x, expert)
            return (y + updates[name](x, expert)).to(y.dtype) if name in updates else y

        return experts_forward(self.base, project, hidden_states, top_k_index, top_k_weights)
