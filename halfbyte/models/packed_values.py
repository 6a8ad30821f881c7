"""Did every packed layer get its values?  Asked after each load, whatever version of transformers did the loading.

    named to be packed, nothing was written to it                       refused (E-WEIGHT-057)
    all scales zero, the tensor in the file is not zero or not found     refused (E-WEIGHT-058)

A layer of zeros computes, trains and saves without complaint, so nothing later would show the loss.  Files do hold layers of zeros
(blocks added to a model start so); the file is therefore asked, and only for a layer whose scales are all zero.
"""

from pathlib import Path

import torch
from torch import nn

from halfbyte.errors import WeightError
from halfbyte.formats.safetensors_io import open_tensors
from halfbyte.quant.blockwise import plain_absmax
from halfbyte.quant.experts import QuantExperts
from halfbyte.quant.linear import QuantLinear
from halfbyte.quant.quant_state import QuantState

_SCALES = ("nested_absmax", "absmax", "SCB")  # of a packed weight in a file, where they are floats
_REMEDY = "report this with the version of transformers that is installed; until then load without quantization: --quant none"


def require_values(model: nn.Module, written: set[str], folder: Path) -> None:
    """Raise WeightError where a packed weight of `model` was not `written` or lost its values on the way from `folder`."""
    for name, states in packed_weights(model).items():
        if name not in written or any(state.absmax.is_meta for state in states):
            raise WeightError(
                "every packed layer must be given its values", code="E-WEIGHT-057", place=f"tensor {name}", found="nothing was written",
                remedy=_REMEDY,
            )  # fmt: skip
        if not any(torch.any(plain_absmax(state)) for state in states) and not _zero_in_file(name, model, folder):
            raise WeightError(
                "a packed layer must hold what its file holds", code="E-WEIGHT-058", place=f"tensor {name}",
                found="every scale is zero, the values in the file are not", remedy=_REMEDY,
            )  # fmt: skip


def packed_weights(model: nn.Module) -> dict[str, list[QuantState]]:
    """Name of each packed weight -> how its bytes are read, one state an expert where they are fused."""
    found: dict[str, list[QuantState]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found[f"{name}.weight"] = [module.state]
        elif isinstance(module, QuantExperts):
            for key, (count, _, _) in module.shapes.items():
                found[f"{name}.{key}"] = [module.state(key, expert) for expert in range(count)]
    return found


def _zero_in_file(name: str, model: nn.Module, folder: Path) -> bool:
    """The file holds this weight, dense or packed, and it is zero there."""
    prefix = f"{model.base_model_prefix}."
    tail = name.removeprefix(prefix)
    stem = tail.rpartition(".")[0]
    with open_tensors(folder) as tensors:
        own = {key.removeprefix(prefix): key for key in tensors}
        scales = [key for part in _SCALES for key in (f"{tail}.{part}", f"{stem}.{part}") if key in own]
        values = [tensors[own[key]] for key in scales or [tail] if key in own]
        floats = [value for value in values if value.is_floating_point()]
        return bool(floats) and not any(torch.any(value) for value in floats)
