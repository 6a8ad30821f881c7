"""What a run says before its first step: model, method, what trains, data, steps, memory."""

from typing import TYPE_CHECKING

from halfbyte import host
from halfbyte.optim.param_groups import describe
from halfbyte.plan.decide import lines as plan_lines
from halfbyte.redact import secrets, terminal
from halfbyte.train.identity import flatten, without_secrets
from halfbyte.train.metrics import Header
from halfbyte.units import bytes_text, count_text, percent_text

if TYPE_CHECKING:
    from halfbyte.train.training import Training


def header_of(training: "Training") -> Header:
    """The header of a run that is about to begin or to go on."""
    config, assembled, data, train = training.config, training.assembled, training.data, training.config.train
    share = assembled.trainable_params / assembled.total_params
    total, available = host.memory_bytes()
    stored = "" if config.quant_format == "none" else f", base in {config.quant_format}"
    packed = f" in {len(training.items):,} packed ones" if config.data.packing else ""
    windows = train.global_batch_size // int(train.micro_batch_size)
    own = "" if assembled.injected is None else " with the adapter"
    lines = [
        ("model", f"{assembled.source.name}, {count_text(assembled.total_params)} parameters{own}, {bytes_text(assembled.weight_bytes)}"),
        ("dtype", assembled.dtype + (f": {assembled.dtype_reason}" if assembled.dtype_reason else "")),
        ("method", f"{config.method}{stored}" + ("" if train.activations == "keep" else f", activations: {train.activations}")),
        ("trains", f"{count_text(assembled.trainable_params)} parameters, {percent_text(share)}"),
        ("optimizer", describe(training.groups)),
        ("data", f"{len(data.train):,} rows to train on{packed}, {len(data.eval):,} held out"),
        ("steps", f"{training.total_steps:,}, each of {train.global_batch_size} rows ({windows} x {train.micro_batch_size})"),
        ("memory", f"{bytes_text(host.rss_bytes())} in use, {bytes_text(available)} of {bytes_text(total)} available"),
        ("folder", str(training.folder.path)),
    ]
    if training.plan is not None:
        lines += plan_lines(training.plan)
    if training.progress.step:
        lines.append(("resumes", f"after step {training.progress.step}"))
    return Header(
        lines=[(label, terminal(secrets(part))) for label, text in lines for part in text.splitlines()], total_steps=training.total_steps,
        first_step=training.progress.step, settings=without_secrets(flatten(config.model_dump(mode="json"))),
    )
