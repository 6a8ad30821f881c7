"""The optimizer, its learning rate and its state."""

from typing import Annotated, Literal

from pydantic import Field

from halfbyte.config.base import Auto, Positive, Settings, Share, Switch

Beta = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]


class OptimConfig(Settings):
    """AdamW."""

    learning_rate: Auto | LearningRate = "auto"
    """Largest learning rate; auto is 5e-4 for an adapter on a model below 3 billion parameters, 2e-4 above, a tenth for method full."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    final_lr_share: Share = 0.1
    """Share of the learning rate that is left at the last step (linear and cosine)."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of all steps in which the learning rate rises from zero."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The same in steps; replaces warmup_share."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the two running means of AdamW."""
    eps: Positive = 1e-8
    """Added to the root of the second mean."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay, not applied to biases and norms."""
    clip_norm: Positive | None = 1.0
    """Largest norm of all gradients together; null does not clip."""
    state: Literal["float32", "int8"] = "float32"
    """Type of the running means: 8 bytes a trained parameter, or about 2."""
    paged: Switch = False
    """Let the running means move to the host's memory when the accelerator's is short; on the CPU they are there already."""
    lora_plus_ratio: Positive = 1.0
    """Learning rate of lora_b as a multiple of lora_a's (LoRA+)."""
    embedding_lr: LearningRate | None = None
    """Learning rate of trained embeddings, where it differs."""
