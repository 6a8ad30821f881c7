"""What is kept of the forward pass for the backward pass: one policy for the model.

| policy          | kept for each layer                    | computed again                                   |
|-----------------|----------------------------------------|--------------------------------------------------|
| `keep`          | x, q, k, v, o, s, gate, up             | norms and activations                            |
| `recompute_mlp` | x, q, k, v, o, s                       | and gate, up                                     |
| `recompute`     | x                                      | the layer, but for its last matrix product       |
| `offload`       | nothing on the device, x on the host   | the same                                         |

The table holds for Halfbyte's own decoder layers (models/decoder_layer.py).  On transformers' layers `keep` keeps what autograd keeps, and
the others are its checkpointing of whole layers, always non-reentrant: that form gives gradients although the embeddings are frozen, and
replays the random state of dropout.  Policies act in training mode only; on a CPU the host is the device, and `offload` is `recompute`.
"""

from typing import Any

from torch import nn

from halfbyte.models.structure import POLICIES, is_fused, set_policy


def use_policy(model: Any, policy: str) -> None:
    """Set one of POLICIES.  Raises ValueError for a model of transformers that cannot recompute."""
    assert policy in POLICIES
    if is_fused(model):
        set_policy(model, policy)
    elif policy != "keep":
        _checkpointing(model, True)
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        _checkpointing(model, False)


def _checkpointing(model: nn.Module, on: bool) -> None:
    # the names were gradient_checkpointing_* before transformers gave them their present ones
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    switch = getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}")
    if on:
        switch({"use_reentrant": False})
    else:
        switch()
