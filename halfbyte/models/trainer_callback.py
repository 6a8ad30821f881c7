"""Write the adapter from inside transformers.Trainer or TRL, at each of its saves and at the end."""

from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ADAPTER = "adapter"


class SaveAdapter(TrainerCallback):
    """trainer.add_callback(SaveAdapter(folder, save)): `save(model, folder, allow_untrained=...)` writes an adapter folder.

    At each of Trainer's saves the adapter goes to <checkpoint>/adapter, at the end to `folder`.  Only the first process writes.
    Trainer's warm-up begins with a step of rate 0, so a save may come before the adapter changes anything; at the end it must.
    """

    def __init__(self, folder: str | Path, save: Callable[..., object]) -> None:
        self.folder, self.save = Path(folder), save

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **ignored: object
    ) -> None:
        """Beside Trainer's own checkpoint of this step."""
        if model is not None and state.is_world_process_zero:
            self.save(model, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / ADAPTER, allow_untrained=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **ignored: object
    ) -> None:
        """The finished adapter."""
        if model is not None and state.is_world_process_zero:
            self.save(model, self.folder)
