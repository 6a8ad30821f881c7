"""A whole model in another type, but for what its class keeps in float32, such as a router's correction of the expert scores.

transformers names those tensors (`_keep_in_fp32_modules_strict`, and for float16 also `_keep_in_fp32_modules`) and heeds them while it
loads; `model.to(dtype)` does not.  https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py
"""

import re
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.models import rope


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The weights that are not packed in another type, in place; what is kept in float32 stays, and rotary frequencies are exact."""
    kept = kept_in_float32(model, dtype)
    model.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    now = _tensors(model)
    for name, values in kept.items():
        now[name].data = values
    rope.restore(model)


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """name -> values of the parameters and buffers that the model's class keeps in float32 where the rest is in `dtype`."""
    patterns = [re.compile(pattern.replace("*", r".*")) for pattern in model._get_dtype_plan(dtype)]
    return {
        name: tensor.data.float() for name, tensor in _tensors(model).items()
        if tensor.is_floating_point() and any(pattern.search(name) for pattern in patterns)
    }  # fmt: skip


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))
