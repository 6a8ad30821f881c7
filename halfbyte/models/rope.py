"""Rotary frequencies kept exact: float32 and as config.json defines them, whatever dtype the weights have.

    angle(position, i) = position / base^(2i/d)     in bfloat16 position 15,962 would be off by up to 2^6 turns' worth of rounding

After a load, and after any cast of a whole model, the frequency buffers are made again from the module's own config.
"""

import inspect

import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError


def rotary_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the modules that hold inverse frequencies and know their config."""
    return [
        (name, module) for name, module in model.named_modules()
        if any(key.endswith("inv_freq") for key in module._buffers) and hasattr(module, "config")
    ]  # fmt: skip


def exact_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a rotary module, made again in float32 from its config."""
    options = {"layer_type": module.layer_type} if "layer_type" in inspect.signature(type(module)).parameters else {}
    with torch.device("cpu"):
        made = type(module)(config=module.config, **options)
    return {key: value.to(torch.float32) for key, value in made.named_buffers(recurse=False)}


def restore(model: nn.Module) -> int:
    """Put exact float32 frequencies into every rotary module of `model`; the number of modules.

    Raises ModelError where a module makes other buffers from its config than it holds.
    """
    count = 0
    for name, module in rotary_modules(model):
        for key, exact in exact_buffers(module).items():
            held = module._buffers[key]
            if held is None or held.shape != exact.shape:
                raise ModelError(
                    "rotary frequencies must be those of config.json", code="E-MODEL-043", place=f"{name}.{key}",
                    found="absent" if held is None else f"shape {tuple(held.shape)}", expected=f"shape {tuple(exact.shape)}",
                )  # fmt: skip
            module.register_buffer(key, exact.to(held.device), persistent=key not in module._non_persistent_buffers_set)
        count += 1
    return count
