"""The end of a run: the best or the last weights as an adapter or a model, and run.json, the summary.

The best weights are read back from their checkpoint, which rotation keeps, so what is delivered is what was measured.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfbyte import devices
from halfbyte.errors import CheckpointError
from halfbyte.formats import peft
from halfbyte.lora.tensors import collected
from halfbyte.models.recompute import use_policy
from halfbyte.models.save import save_dense
from halfbyte.train import checkpoint, samples
from halfbyte.train.state import trainables_of

if TYPE_CHECKING:
    from halfbyte.train.training import Training


def deliver(training: "Training") -> dict[str, Any]:
    """Put the best weights into the model, write adapter or model, samples and summary; the fields of `TrainResult`."""
    delivered = load_best(training)
    use_policy(training.model, "keep")
    training.model.eval()
    adapter, model = None, None
    assembled, folder = training.assembled, training.folder
    if assembled.injected is not None:
        adapter = folder.adapter
        save_adapter(training, adapter)
    else:
        model = folder.model
        save_dense(training.model, assembled.tokenizer, model)
    samples.write_after(training)
    summary = write_summary(training, status="stopped early" if training.stopped_early else "finished", delivered=delivered)
    training.say_end(summary)
    return {
        "run_folder": folder.path, "adapter_folder": adapter, "model_folder": model, "steps": training.progress.step,
        "total_steps": training.total_steps, "tokens": training.progress.tokens_seen, "seconds": summary["seconds"],
        "peak_rss_bytes": summary["peak_memory_bytes"], "first_eval_loss": summary["first_eval_loss"],
        "last_eval_loss": summary["last_eval_loss"], "best_eval_loss": summary["best_eval_loss"], "best_step": summary["best_step"],
        "delivered_step": delivered, "stopped_early": training.stopped_early, "history": training.history,
    }


def save_adapter(training: "Training", folder: Path) -> None:
    """The adapter as it is in the model, in PEFT's format; read back before this returns."""
    found, config, source = collected(training.model), training.config, training.assembled.source
    calibrated = config.quant.calibrate is True  # the base is then a folder of the run
    base, revision = (str(source.folder.absolute()), None) if calibrated else (config.model.name, config.model.revision)
    peft.save(
        folder, found.tensors, found.config, kinds=found.kinds, targets=found.targets, parameters=found.parameters,
        task=config.model.task, base_name=base, revision=revision, base_digest=source.weights, notes=found.notes,
        loftq=found.loftq,
    )


def load_best(training: "Training") -> int:
    """Put the weights with the best held-out loss into the model; the step they are of (the last step where nothing better is kept)."""
    progress = training.progress
    if not training.config.train.keep_best or progress.best_step is None or progress.best_step == progress.step:
        return progress.step
    path = training.saver.folder / checkpoint.step_name(progress.best_step)
    try:
        saved = checkpoint.load_trainables(path)
    except CheckpointError as error:
        training.note(f"the best weights (step {progress.best_step}) cannot be read, the last ones are delivered: {error.found}")
        return progress.step
    with torch.no_grad():
        for name, tensor in trainables_of(training.model).items():
            tensor.copy_(saved[name])
    return progress.best_step


def write_summary(training: "Training", *, status: str, delivered: int | None = None, error: str = "") -> dict[str, Any]:
    """run.json: how the run ended ("finished", "stopped early", "stopped", "failed") and what it reached."""
    summary = summary_of(training, status=status, delivered=delivered, error=error)
    training.folder.write_json(training.folder.summary, summary)
    return summary


def summary_of(training: "Training", *, status: str, delivered: int | None = None, error: str = "") -> dict[str, Any]:
    """What run.json holds."""
    progress, assembled, config = training.progress, training.assembled, training.config
    evaluations = [record for record in training.history if "eval_loss" in record]
    summary: dict[str, Any] = {
        "status": status, "method": config.method, "model": assembled.source.name, "data": config.data.path,
        "train_rows": len(training.data.train), "eval_rows": len(training.data.eval), "data_notes": training.data.notes,
        "steps": progress.step, "total_steps": training.total_steps, "epochs": progress.step / training.batches.steps_per_epoch,
        "tokens": progress.tokens_seen, "skipped_steps": progress.skipped_steps, "seconds": training.seconds(),
        "peak_memory_bytes": training.peak_memory_bytes(), "weight_bytes": assembled.weight_bytes,
        "trainable_params": assembled.trainable_params, "total_params": assembled.total_params,
        "trainable_share": assembled.trainable_params / assembled.total_params,
        "first_eval_loss": evaluations[0]["eval_loss"] if evaluations else None,
        "last_eval_loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "best_eval_loss": progress.best_metric, "best_step": progress.best_step,
        "micro_batch_size": progress.micro_batch_size or config.train.micro_batch_size,
        "activations": config.train.activations, "versions": devices.versions(),
    }
    if delivered is not None:
        of_delivered = [record for record in evaluations if record["step"] == delivered]
        summary["delivered_step"] = delivered
        summary["final_eval_loss"] = of_delivered[-1]["eval_loss"] if of_delivered else None
        summary["accuracy"] = of_delivered[-1].get("accuracy") if of_delivered else None
    for name, folder in (("adapter", training.folder.adapter), ("model_folder", training.folder.model)):
        if delivered is not None and folder.is_dir():
            summary[name] = folder.name
            summary["adapter_bytes" if name == "adapter" else "model_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    if error:
        summary["error"] = error
    return summary
