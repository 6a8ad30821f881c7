"""LoraEmbedding: a frozen token embedding with a low-rank update beside it.

    y_TO = base(ids_T) + scaling * A^T[ids_T] B^T          A (R, V), B (O, R), V vocabulary, O width

A begins at zero and B at random (the other way round than in a linear layer, as in loralib), so only rows of tokens that occur are moved.
With DoRA the columns of the table, one per output feature, have a magnitude.  A scaled embedding (Gemma) scales the update alike.
There is no dropout here: a token is present or not.  Source: https://github.com/microsoft/LoRA/blob/main/loralib/layers.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.config.lora import LoraConfig
from halfbyte.lora.layer import DTYPES
from halfbyte.lora.variants import dora_gain, row_norms, scaling_of


class LoraEmbedding(nn.Module):
    """`base` (V, O) with factors lora_a (R, V) and lora_b (O, R); optional DoRA magnitude (O,)."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    magnitude: nn.Parameter | None

    def __init__(self, base: nn.Embedding, config: LoraConfig, *, rank: int | None = None, alpha: float | None = None) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.rank = config.rank if rank is None else rank
        self.alpha = float(config.alpha if alpha is None else alpha)
        self.scaling = scaling_of(self.alpha, self.rank, config.rslora)
        self.variant = "dora" if config.dora else "plain"
        self.num_embeddings, self.embedding_dim = base.weight.shape
        dtype, device = DTYPES[config.dtype], base.weight.device
        self.lora_a = nn.Parameter(torch.zeros(self.rank, self.num_embeddings, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.embedding_dim, self.rank, dtype=dtype, device=device))
        self.magnitude = nn.Parameter(torch.ones(self.embedding_dim, dtype=dtype, device=device)) if config.dora else None

    @property
    def frozen_base(self) -> nn.Module:
        """The table as it was loaded."""
        return self.base

    def norm(self) -> Tensor:
        """Column norms of the table with its update, (O,) float32, without gradient."""
        return row_norms(self.base.weight.detach().T, self.lora_a, self.lora_b, self.scaling)

    @torch.no_grad()
    def start_magnitude(self) -> None:
        """DoRA begins with the norms of the table it starts from."""
        if self.magnitude is not None:
            self.magnitude.copy_(self.norm())

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling * (B A)^T, (V, O) in float32; without DoRA's gain."""
        return (self.lora_b.float() @ self.lora_a.float()).T * self.scaling

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., O), in the type that the base answers in."""
        y = self.base(ids)
        rows = F.embedding(ids, self.lora_a.T, padding_idx=self.base.padding_idx)
        update = (rows @ self.lora_b.T) * self.scaling
        scale = getattr(self.base, "embed_scale", None)
        if scale is not None:
            update = update * scale
        if self.magnitude is None:
            return (y + update).to(y.dtype)
        gain = dora_gain(self.magnitude, self.norm())
        return (gain * y + gain * update).to(y.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}, {self.variant}"
