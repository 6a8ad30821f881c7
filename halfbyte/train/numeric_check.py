"""Is everything still a number?  Checks that do not trust the loss, and the search for where it went wrong.

A NaN weight can give a finite loss: attention on the CPU returns 0 for a query row of NaN.  So each step looks at the norm of all
gradients, and every 50 steps (and before the first) all weights, gradients' owners and optimizer tensors are scanned.  A tensor's float32
sum is finite if and only if all its elements are, but for sums that overflow; only a suspicious sum is looked at element by element.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from halfbyte.data.batches import Batch
from halfbyte.errors import NumericError

SCAN_EVERY_STEPS = 50


def is_bad(tensor: Tensor) -> bool:
    """True when a floating-point tensor holds NaN or infinity."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return False
    if torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
        return False
    return not bool(torch.isfinite(tensor).all())


def bad_tensors(named: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """"name (count of numel values not finite)" of each bad tensor, in the given order."""
    for name, tensor in named:
        if is_bad(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            yield f"{name} ({count:,} of {tensor.numel():,} values)"


def everything(model: nn.Module, optimizer_tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """All tensors a step depends on: parameters (frozen ones too), buffers, optimizer state."""
    yield from ((f"weight {name}", value) for name, value in model.named_parameters())
    yield from ((f"buffer {name}", value) for name, value in model.named_buffers())
    yield from ((f"optimizer state {name}", value) for name, value in optimizer_tensors.items())


def scan(model: nn.Module, optimizer_tensors: dict[str, Tensor], *, step: int) -> None:
    """Raise NumericError naming the first weight, buffer or optimizer tensor that is not finite.

    Masked buffers that hold minus infinity on purpose do not exist in the models served here.
    """
    found = next(bad_tensors(everything(model, optimizer_tensors)), None)
    if found:
        raise NumericError(
            "every weight and every optimizer tensor must be finite", code="E-NUM-301", place=f"step {step}", found=found,
            expected="finite numbers", remedy="lower optim.learning_rate and resume from the last checkpoint, or repair the model file",
            nothing_done="No checkpoint was written from these weights.",
        )


def locate(model: nn.Module, window: Sequence[Batch], forward: Callable[[Batch], object]) -> str:
    """Say where a step went wrong: the first bad weight, else the first module whose output is bad, else the first bad gradient.

    Runs the window again, with gradients, one micro-batch at a time; leaves no gradients behind.  `forward` returns the loss sum.
    """
    weight = next(bad_tensors((f"weight {name}", value) for name, value in model.named_parameters()), None)
    if weight:
        return weight
    seen: list[str] = []

    def hook_for(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple | list) else (output,)
            if any(isinstance(value, Tensor) and is_bad(value) for value in tensors):
                seen.append(f"output of {name or 'the model'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules()]
    try:
        for batch in window:
            loss = forward(batch)
            if seen:
                return f"{seen[0]}, rows {batch.rows}"
            assert isinstance(loss, Tensor)
            if is_bad(loss.detach()):
                return f"loss of rows {batch.rows}"
            loss.backward()
            gradients = ((f"gradient of {name}", p.grad) for name, p in model.named_parameters() if p.grad is not None)
            bad = next(bad_tensors(gradients), None)
            if bad:
                return f"{bad}, rows {batch.rows}"
        return "not found again when the step was repeated"
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)


def dead_adapters(model: nn.Module) -> list[str]:
    """Trainable tensors that the step's backward pass did not reach, and adapters of which no factor got a gradient other than zero."""
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    pairs: dict[str, list[bool]] = {}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if parameter.requires_grad and parameter.grad is not None and last in ("lora_a", "lora_b"):
            pairs.setdefault(owner, []).append(bool((parameter.grad != 0).any()))
    return unreached + [owner for owner, alive in pairs.items() if not any(alive)]


def require_gradients(model: nn.Module) -> None:
    """Raise NumericError when some of what should train got no gradient in the first step."""
    dead = dead_adapters(model)
    if dead:
        trainable = sum(parameter.requires_grad for parameter in model.parameters())
        shown = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
        raise NumericError(
            "every trainable tensor must get a gradient in the first step", code="E-NUM-302", place="step 1",
            found=f"none for {len(dead)} of {trainable}: {shown}", expected="a gradient for each",
            remedy="leave the named modules out with lora.exclude, or report the model's architecture",
            nothing_done="Nothing was trained.",
        )
