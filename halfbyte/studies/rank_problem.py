"""What the stages of the rank recommender work on: a model, what may be adapted, rows to learn from, rows held out, and a loss.

The loss is a function of model and batch, so that the same stages serve rows of text (`token_loss`) and a student that learns from a
teacher's logits.  A stage puts the adapter it needs into the model with `adapt`, and the next one takes it out again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.config.lora import LoraConfig
from halfbyte.config.optim import OptimConfig
from halfbyte.data.batches import Batch
from halfbyte.errors import UnsupportedError
from halfbyte.lora.embedding import LoraEmbedding
from halfbyte.lora.inject import eject, inject, updates
from halfbyte.lora.layer import LoraLinear
from halfbyte.lora.truncate import Spectrum, shortened, spectrum
from halfbyte.models.heads import head_of
from halfbyte.models.modes import evaluating
from halfbyte.models.token_loss import token_loss_sum
from halfbyte.optim import param_groups
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.schedules import share_at
from halfbyte.train.step import clip

LossSum = Callable[[nn.Module, Batch], tuple[Tensor, int]]
Adapter = LoraLinear | LoraEmbedding
PLAIN: dict[str, Any] = {
    "ranks": {}, "alphas": {}, "dropout": 0.0, "dora": False, "lora_bias": False, "train_bias": "none", "init": "default",
    "fully_trained": (),
}  # fmt: skip
"""What every trial of a rank leaves out of the adapter."""


def token_loss(model: nn.Module) -> LossSum:
    """The loss of training: sum over trained tokens of a batch, and their number."""
    head = head_of(model)
    return lambda current, batch: token_loss_sum(current, head, batch)


@dataclass(frozen=True)
class Problem:
    """model     the frozen base, with or without an adapter in it
    lora      targets, alpha and start of the adapter; its rank is what is looked for, dropout and DoRA are left out
    windows   a new iterator over the batches of each optimizer step, the same at every call, without end
    held_out  batches that are not trained on; each is one observation for the standard error
    loss_sum  (model, batch) -> (sum of losses in nats, number of tokens)
    optim     schedule and clipping; learning_rate is a number
    device    where batches go
    """

    model: nn.Module
    lora: LoraConfig
    windows: Callable[[], Iterator[list[Batch]]]
    held_out: Sequence[Batch]
    loss_sum: LossSum
    optim: OptimConfig
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def alpha(self) -> float:
        """Alpha of the adapter, the same for every rank, so that the best learning rate does not depend on the rank."""
        return self.lora.alpha


def adapt(problem: Problem, rank: int, *, alpha: float | None = None, start: bool = True) -> dict[str, Adapter]:
    """Take out what is in the model and put in a plain adapter of this rank everywhere; module -> layer.

    Raises UnsupportedError for fused experts.
    """
    eject(problem.model)
    config = problem.lora.model_copy(update={**PLAIN, "rank": rank, "alpha": problem.alpha if alpha is None else alpha})
    inject(problem.model, config, seed=problem.seed, start=start)
    found: dict[str, Adapter] = {}
    for name, layer in updates(problem.model).items():
        if not isinstance(layer, (LoraLinear, LoraEmbedding)):
            raise UnsupportedError(
                "the rank of fused experts is not measured", code="E-UNSUP-540", place=name, found=type(layer).__name__,
                expected="linear layers and embeddings", remedy="name the targets without experts, or take --stages capacity",
                nothing_done="Nothing was measured.",
            )  # fmt: skip
        found[name] = layer
    return found


def put(layers: Mapping[str, Adapter], parts: Mapping[str, Spectrum], rank: int) -> None:
    """Give the layers the nearest updates of `rank`; what a layer has beyond that rank is zero."""
    with torch.no_grad():
        for name, layer in layers.items():
            lora_a, lora_b = shortened(parts[name], rank, layer.scaling)
            kept = lora_a.shape[0]
            layer.lora_a.zero_()[:kept].copy_(lora_a)
            layer.lora_b.zero_()[:, :kept].copy_(lora_b)


def spectra_of(layers: Mapping[str, Adapter]) -> dict[str, Spectrum]:
    """Spectra of the updates as they are now."""
    with torch.no_grad():
        return {name: spectrum(layer.lora_a.cpu(), layer.lora_b.cpu(), layer.scaling) for name, layer in layers.items()}


def gradient(problem: Problem, batches: Sequence[Batch]) -> int:
    """Fill the gradients of all trainable parameters with that of the mean loss over `batches`; returns the trained tokens."""
    moved = [batch.to(problem.device) for batch in batches]
    total = sum(batch.trained_tokens for batch in moved)
    for parameter in problem.model.parameters():
        parameter.grad = None
    for batch in moved:
        if batch.trained_tokens:
            (problem.loss_sum(problem.model, batch)[0] / total).backward()
    return total


def train(problem: Problem, steps: int, rate: float) -> int:
    """Train the adapter in the model for `steps` optimizer steps from the first window on; returns the trained tokens seen."""
    optimizer = AdamW(param_groups.groups(problem.model, problem.optim, rate), betas=problem.optim.betas, eps=problem.optim.eps)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    windows, seen = problem.windows(), 0
    problem.model.train()
    for step in range(1, steps + 1):
        seen += gradient(problem, next(windows))
        clip(parameters, problem.optim.clip_norm)
        param_groups.set_rate(optimizer.param_groups, share_at(problem.optim, step, steps))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return seen


@dataclass(frozen=True)
class HeldOut:
    """Loss of each held-out batch in nats, summed, and its tokens."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return sum(self.sums) / sum(self.counts)

    def gap(self, other: "HeldOut") -> tuple[float, float | None]:
        """(loss minus the other's, standard error of that) on the same batches; one batch has no standard error, which is None then."""
        total = sum(self.counts)
        gap = self.loss - other.loss
        if len(self.sums) < 2:
            return gap, None
        rest = [(mine - theirs) - gap * count for mine, theirs, count in zip(self.sums, other.sums, self.counts)]
        return gap, (len(rest) / (len(rest) - 1) * sum(value**2 for value in rest)) ** 0.5 / total


def held_out(problem: Problem) -> HeldOut:
    """Loss of the model as it is on the held-out batches."""
    sums, counts = [], []
    with evaluating(problem.model), torch.inference_mode():
        for batch in problem.held_out:
            summed, count = problem.loss_sum(problem.model, batch.to(problem.device))
            if count:
                sums.append(float(summed))
                counts.append(count)
    return HeldOut(tuple(sums), tuple(counts))
