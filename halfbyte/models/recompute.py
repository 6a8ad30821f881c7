"""Which activations are kept for the backward pass: all of them, or only each layer's input, from which the rest is computed again.

Recomputing is always non-reentrant: that form gives gradients although the embeddings are frozen, and replays the random state of dropout.
It acts in training mode only.
"""

from torch import nn


def recompute(model: nn.Module) -> None:
    """Keep each layer's input only.  Raises ValueError for a model of transformers that cannot."""
    # the names were gradient_checkpointing_* before transformers gave them their present ones
    switch = "activation_checkpointing_enable" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing_enable"
    getattr(model, switch)({"use_reentrant": False})


def stop_recomputing(model: nn.Module) -> None:
    """Undo `recompute`."""
    switch = "activation_checkpointing_disable" if hasattr(model, "activation_checkpointing_disable") else "gradient_checkpointing_disable"
    getattr(model, switch)()
