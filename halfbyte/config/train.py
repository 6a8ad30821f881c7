"""How long, in what portions and with what safety net the training runs."""

from typing import Annotated, Literal

from pydantic import Field

from halfbyte.config.base import Auto, Count, Positive, Settings, Switch


class TrainConfig(Settings):
    """The training run."""

    epochs: Positive = 1.0
    """Passes over the training rows; 0.5 is half of them."""
    max_steps: Count | None = None
    """Optimizer steps, in place of epochs."""
    micro_batch_size: Auto | Count = "auto"
    """Sequences per forward pass; auto takes what fits into memory."""
    global_batch_size: Count = 16
    """Sequences per optimizer step."""
    activations: Literal["auto", "keep", "recompute_mlp", "recompute", "offload"] = "auto"
    """What is kept for the backward pass: all; all but the MLP's inner part; each layer's input; that in host memory; auto: what fits."""
    eval_every_steps: Auto | Count | None = "auto"
    """Steps between evaluations; auto is about eight a run, null none."""
    save_every_steps: Auto | Count | None = "auto"
    """Steps between checkpoints; auto is about eight a run, null none."""
    log_every_steps: Count = 1
    """Steps between lines of metrics."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept."""
    early_stop_patience: Count | None = None
    """Stop after this many evaluations without a better held-out loss."""
    keep_best: Switch = True
    """Deliver the weights with the best held-out loss, not the last ones."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Start of all random numbers: order of rows, adapter start, dropout."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Services that receive the metrics beside metrics.jsonl."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """At a loss or gradient that is not finite: stop, leave the step out, or return to the last checkpoint."""
    threads: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """CPU threads for arithmetic; auto is what OMP_NUM_THREADS says, else one for each core."""
    sample_prompts: Annotated[int, Field(ge=0, le=100)] = 3
    """Held-out prompts whose answers before and after are put into the report."""
    verify_checkpoints: Switch = True
    """Read each checkpoint back and compare its hashes before older ones are removed."""
