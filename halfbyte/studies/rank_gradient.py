"""Stage B, no optimizer: how many directions of the first gradient come back on other rows.

A module's gradient G_OI = sum over tokens of delta x^T is never stored.  An adapter with B = 0 has the gradient G A^T in B, one with A = 0
has B^T G in A, and neither changes the model; so sketches of all gradients come out of ordinary backward passes:

    half 1   B = random, A = 0     -> B^T G1          -> P, a basis of its leading right directions
    half 1   A = P^T,   B = 0      -> G1 P = U S W^T  -> U and V = P W
    half 2   A = [V | random]^T    -> G2 V, and G2 times random for |G2|^2

    e(r) = |U_r^T G2 V_r|^2 / |G2|^2  -  the same for random bases of the same size
    rank of a module = smallest r with 90 % of e(r_max)

The noise of small samples is of full rank but does not come back; a spectrum of one gradient would count it.  The rank of the gradient
still overstates what is needed (https://arxiv.org/abs/2502.12171 and others), so it moves the decision by one step only.

The shares also say where parameters do most: `module_ranks` gives each module directions by the part of its own gradient that they explain
(EVA, https://arxiv.org/abs/2410.07170), at most RHO times the rank, the sum of parameters unchanged.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor

from halfbyte.data.batches import Batch
from halfbyte.studies.rank_problem import Adapter, Problem, adapt, eject, gradient

SKETCH, OVER = 128, 32
ENOUGH = 0.9
RHO = 2


@dataclass(frozen=True)
class ModuleGradient:
    """shares_K: e(1) .. e(K), rising; norm of G2; stable rank |G1|^2 / largest squared singular value, within the sketch; size O + I."""

    shares: tuple[float, ...]
    norm: float
    stable_rank: float
    parameters_per_rank: int

    @property
    def rank(self) -> int:
        """Smallest r with 90 % of what K directions explain; 0 where nothing comes back."""
        return next((r + 1 for r, share in enumerate(self.shares) if share >= ENOUGH * self.shares[-1] > 0), 0)


@dataclass(frozen=True)
class Gradient:
    """All modules; the tokens used; seconds of a forward and backward pass per token, at the rank `directions`; `sketch`, the most
    directions that a share is known of (the passes have OVER more)."""

    modules: dict[str, ModuleGradient]
    tokens: int
    seconds_per_token: float
    sketch: int

    @property
    def directions(self) -> int:
        """Rank of the adapter that the passes ran with."""
        return self.sketch + OVER

    @property
    def median_rank(self) -> int:
        """Median rank over the modules, each weighing as much as its gradient."""
        total, seen = sum(module.norm**2 for module in self.modules.values()), 0.0
        for module in sorted(self.modules.values(), key=lambda module: module.rank):
            seen += module.norm**2
            if seen >= total / 2:
                return max(1, module.rank)
        return 1

    def explained(self, rank: int) -> float:
        """Share of what comes back that `rank` directions a module explain: 0 to 1, weighted by the gradients."""
        most = sum(module.norm**2 * module.shares[-1] for module in self.modules.values())
        some = sum(module.norm**2 * module.shares[min(rank, len(module.shares)) - 1] for module in self.modules.values())
        return some / most if most else 1.0

    @property
    def stable_rank(self) -> float:
        """Median over the modules."""
        return statistics.median(module.stable_rank for module in self.modules.values())


def gradient_spectrum(
    problem: Problem, half_1: Sequence[Batch], half_2: Sequence[Batch], *, sketch: int = SKETCH, seed: int = 0
) -> Gradient:
    """Stage B on two disjoint halves of a sample."""
    generator = torch.Generator().manual_seed(seed)
    layers = adapt(problem, sketch + OVER, alpha=float(sketch + OVER), start=False)
    problem.model.train()
    _set(layers, lora_b={name: torch.randn(layer.lora_b.shape, generator=generator) for name, layer in layers.items()})
    gradient(problem, half_1)
    bases = {name: torch.linalg.qr(_of(layer.lora_a).T)[0] for name, layer in layers.items()}
    _set(layers, lora_a={name: basis.T for name, basis in bases.items()})
    began = monotonic()
    tokens = gradient(problem, half_1)
    seconds = (monotonic() - began) / max(1, tokens)
    parts = {name: _leading(_of(layer.lora_b), bases[name], sketch) for name, layer in layers.items()}
    draws = {name: torch.randn(OVER, layer.lora_a.shape[1], generator=generator) for name, layer in layers.items()}
    _set(layers, lora_a={name: torch.cat([_padded(parts[name][2].T, sketch), draws[name]]) for name in layers})
    tokens += gradient(problem, half_2)
    found = {name: _compared(_of(layer.lora_b), parts[name], sketch, generator) for name, layer in layers.items()}
    eject(problem.model)
    return Gradient(found, tokens, seconds, sketch)


def _of(parameter: torch.nn.Parameter) -> Tensor:
    """The parameter's gradient in float32 on the CPU, zero where there is none."""
    return torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad.detach().float().cpu()


def _set(layers: Mapping[str, Adapter], *, lora_a: Mapping[str, Tensor] | None = None, lora_b: Mapping[str, Tensor] | None = None) -> None:
    """Put values into one factor, zeros beyond them and into the other, so that the update is zero."""
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_a.zero_()
            layer.lora_b.zero_()
            if lora_a is not None:
                layer.lora_a[: lora_a[name].shape[0]].copy_(lora_a[name])
            if lora_b is not None:
                layer.lora_b.copy_(lora_b[name])


def _leading(reduced_OK: Tensor, basis_IK: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) of G ~ reduced basis^T, at most `most` directions."""
    u, values, wh = torch.linalg.svd(reduced_OK[:, : basis_IK.shape[1]], full_matrices=False)
    return u[:, :most], values[:most], (basis_IK @ wh.T)[:, :most]


def _padded(rows_KI: Tensor, rows: int) -> Tensor:
    return torch.cat([rows_KI, rows_KI.new_zeros(rows - rows_KI.shape[0], rows_KI.shape[1])])


def _compared(seen: Tensor, parts: tuple[Tensor, Tensor, Tensor], sketch: int, generator: torch.Generator) -> ModuleGradient:
    """Half 1's directions on half 2; seen = [G2 V | G2 random] (O, sketch + OVER)."""
    left, values, right = parts
    size_in, size_out, kept = right.shape[0], left.shape[0], values.numel()
    core, noisy = left.T @ seen[:, :kept], seen[:, sketch:]
    total = float(noisy.square().sum()) / OVER
    if total <= 0:
        return ModuleGradient((0.0,) * kept, 0.0, 1.0, size_in + size_out)
    by_corner = torch.cumsum(torch.cumsum(core.square(), 0), 1).diagonal()
    random_basis = torch.linalg.qr(torch.randn(size_out, min(OVER, size_out), generator=generator))[0]
    # a random direction on either side, squared: what r by r of them catch grows with r^2
    each = float((random_basis.T @ noisy).square().mean()) / size_in
    counts = torch.arange(1, kept + 1)
    shares = ((by_corner - each * counts.square()) / total).clamp_min(0).cummax(0).values
    stable = float(values.square().sum() / values[0].square()) if float(values[0]) > 0 else 1.0
    return ModuleGradient(tuple(shares.tolist()), total**0.5, stable, size_in + size_out)


def module_ranks(found: Gradient, rank: int) -> dict[str, int]:
    """Ranks of modules with the parameters of `rank` everywhere: directions by the share of their own gradient they explain per parameter,
    at least 1 and at most RHO * rank a module.  Empty where `rank` is all the directions that were looked at: there is no choice then."""
    modules = found.modules
    if rank >= found.sketch:
        return {}
    budget = rank * sum(module.parameters_per_rank for module in modules.values())
    ranks = dict.fromkeys(modules, 1)
    spent = sum(module.parameters_per_rank for module in modules.values())
    worth = sorted(
        (((module.shares[place] - module.shares[place - 1]) / module.parameters_per_rank, -place, name)
         for name, module in modules.items() for place in range(1, min(len(module.shares), RHO * rank))), reverse=True,
    )  # fmt: skip
    for _, _, name in worth:
        cost = modules[name].parameters_per_rank
        if spent + cost <= budget:
            ranks[name], spent = ranks[name] + 1, spent + cost
    return ranks
