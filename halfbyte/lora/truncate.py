"""An adapter of a smaller rank that is as near as can be to a trained one, module by module.

    D_OI = scaling * B_OR A_RI            B = Q_b R_b,  A^T = Q_a R_a   (two thin QR)
    scaling * R_b R_a^T = U S V^T         (R x R: the large matrix D is never made)
    D_r = (Q_b U)_r S_r (Q_a V)_r^T       the nearest matrix of rank r in the Frobenius norm (Eckart and Young)

The smaller factors share the singular values evenly, B' = U_r (S_r / s)^1/2 and A' = (S_r / s)^1/2 V_r^T, and alpha shrinks with the rank
(with its root for rsLoRA), so that the scaling s stays what it was.  A module whose rank is not reduced keeps its tensors to the bit.

    |D - D_r|^2 = sum of the S_i^2 left out; over several modules with one budget of parameters, a direction is worth S_i^2 / (O + I)

Biases, modules trained whole and DoRA's magnitudes stay as they are; for DoRA the direction W + D_r is what is nearest, then its rows get
the learnt lengths again.  Fused experts (one pair of factors for each of many experts in one tensor) are refused, and an adapter of init
loftq, whose rank decides how its base is quantized.  Source: https://en.wikipedia.org/wiki/Low-rank_approximation
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.config.lora import LoraConfig
from halfbyte.errors import AdapterError
from halfbyte.lora.variants import scaling_of


@dataclass(frozen=True)
class Spectrum:
    """scaling * B A = left_OK diag(values_K) right_KI in float64, values descending, K = min(rank, O, I)."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def parameters_per_rank(self) -> int:
        """O + I: what one more direction costs."""
        return self.left.shape[0] + self.right.shape[1]

    def left_out(self, rank: int) -> float:
        """Share of the squared norm that a truncation to `rank` loses, 0 to 1."""
        total = float(self.values.square().sum())
        return float(self.values[rank:].square().sum()) / total if total else 0.0

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the shares of squared norm: K for a flat spectrum, 1 for a single direction, 0 for an empty update."""
        share = self.values.square() / self.values.square().sum().clamp_min(1e-300)
        share = share[share > 0]
        return math.exp(float(-(share * share.log()).sum())) if share.numel() else 0.0


def spectrum(lora_a_RI: Tensor, lora_b_OR: Tensor, scaling: float) -> Spectrum:
    """Singular value decomposition of scaling * B A through the factors alone: O((O + I) R^2)."""
    left, core_b = torch.linalg.qr(lora_b_OR.double())
    right, core_a = torch.linalg.qr(lora_a_RI.double().T)
    u, values, vh = torch.linalg.svd(scaling * (core_b @ core_a.T), full_matrices=False)
    return Spectrum(left @ u, values, vh @ right.T)


def shortened(parts: Spectrum, rank: int, scaling: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(A' (rank, I), B' (O, rank)) whose product times `scaling` is the nearest update of this rank."""
    root = (parts.values[:rank] / scaling).sqrt()
    return (root[:, None] * parts.right[:rank]).to(dtype).contiguous(), (parts.left[:, :rank] * root).to(dtype).contiguous()


def scalings(config: LoraConfig, names: Mapping[str, object]) -> dict[str, float]:
    """The factor before B A of each module; `config` names modules whole, as lora.tensors.collected and formats.peft.read give it."""
    return {
        name: scaling_of(config.alphas.get(name, config.alpha), config.ranks.get(name, config.rank), config.rslora) for name in names
    }  # fmt: skip


def spectra(tensors: Mapping[str, Tensor], config: LoraConfig, kinds: Mapping[str, str]) -> dict[str, Spectrum]:
    """module -> Spectrum of its update.  AdapterError for fused experts."""
    for name, kind in kinds.items():
        if kind == "experts":
            raise AdapterError(
                "a spectrum needs one pair of factors for each weight", code="E-ADAPT-090", place=name, found="fused experts",
                expected="linear layers and embeddings", remedy="train with the experts in lora.exclude, or keep their rank",
                nothing_done="Nothing was truncated.",
            )  # fmt: skip
    return {
        name: spectrum(tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"], scaling) for name, scaling in scalings(config, kinds).items()
    }  # fmt: skip


def joint_ranks(parts: Mapping[str, Spectrum], rank: int, *, weights: Mapping[str, float] | None = None) -> dict[str, int]:
    """Ranks of all modules together that lose least for the parameters of `rank` everywhere; each module keeps at least one direction.

    Directions are taken by squared singular value per parameter until the budget is used; a weight multiplies those of its module.
    """
    budget = rank * sum(part.parameters_per_rank for part in parts.values())
    ranks = dict.fromkeys(parts, 1)
    spent = sum(part.parameters_per_rank for part in parts.values())
    worth = sorted(
        ((float(value) ** 2 * (weights or {}).get(name, 1.0) / part.parameters_per_rank, name)
         for name, part in parts.items() for value in part.values[1:]), reverse=True,
    )  # fmt: skip
    for value, name in worth:  # within a module values fall, so its directions come in their order
        cost = parts[name].parameters_per_rank
        if value > 0 and spent + cost <= budget:
            ranks[name], spent = ranks[name] + 1, spent + cost
    return ranks


def truncated(
    tensors: Mapping[str, Tensor], config: LoraConfig, kinds: Mapping[str, str], ranks: Mapping[str, int],
    parts: Mapping[str, Spectrum] | None = None,
) -> tuple[dict[str, Tensor], LoraConfig]:  # fmt: skip
    """(tensors, config) of the adapter with `ranks` where they are lower than its own; what is not reduced is the same tensor.

    `config` and the names are as formats.peft.read gives them; `parts` are its spectra, if they are known.  Raises AdapterError.
    """
    old = {name: config.ranks.get(name, config.rank) for name in kinds}
    reduced = {name: rank for name, rank in ranks.items() if rank < old[name]}
    if not reduced:
        return dict(tensors), config
    _require_able(config, kinds, reduced)
    known = parts or spectra(tensors, config, {name: kinds[name] for name in reduced})
    factor = scalings(config, kinds)
    made, new, alphas = dict(tensors), dict(old), {name: config.alphas.get(name, config.alpha) for name in kinds}
    for name, rank in reduced.items():
        new[name] = min(rank, known[name].values.numel())
        dtype = tensors[f"{name}.lora_a"].dtype
        made[f"{name}.lora_a"], made[f"{name}.lora_b"] = shortened(known[name], new[name], factor[name], dtype)
        alphas[name] = factor[name] * (math.sqrt(new[name]) if config.rslora else new[name])
    return made, with_ranks(config, new, alphas)


def with_ranks(config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> LoraConfig:
    """The config with these ranks and alphas of modules; what most modules have is its `rank` and `alpha`, the rest are exceptions."""
    rank, alpha = Counter((ranks[name], alphas[name]) for name in ranks).most_common(1)[0][0]
    return config.model_copy(update={
        "rank": rank, "alpha": alpha,
        "ranks": {name: own for name, own in ranks.items() if own != rank},
        "alphas": {name: own for name, own in alphas.items() if own != alpha},
    })  # fmt: skip


def _require_able(config: LoraConfig, kinds: Mapping[str, str], reduced: Mapping[str, int]) -> None:
    if config.init == "loftq":
        raise AdapterError(
            "the rank of an adapter of init loftq decides how its base is quantized", code="E-ADAPT-091", place="lora.init",
            found="loftq", expected="an adapter whose base does not depend on it",
            remedy="merge the adapter into its base (halfbyte merge), or train with another init", nothing_done="Nothing was truncated.",
        )  # fmt: skip
    for name, rank in reduced.items():
        if rank < 1:
            raise AdapterError(
                "every adapted module keeps at least one direction", code="E-ADAPT-092", place=name, found=f"rank {rank}",
                expected="1 or more", nothing_done="Nothing was truncated.",
            )  # fmt: skip
