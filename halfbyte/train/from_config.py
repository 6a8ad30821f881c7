"""RunConfig -> a finished run folder: the whole road, for the command line, for `hb.train` and for the tour.

settings -> tokenizer and rows (cheap, so mistakes in the data are told first) -> plan -> model -> loop -> report
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte import env
from halfbyte.config.run import RunConfig
from halfbyte.data.load import TrainData, load_data, require_task
from halfbyte.log import logger
from halfbyte.models.assemble import Assembled, assemble
from halfbyte.models.load import load_tokenizer, token_limit
from halfbyte.models.packed_folder import settled
from halfbyte.models.source import resolve
from halfbyte.pages import report
from halfbyte.plan.decide import Decision
from halfbyte.redact import terminal
from halfbyte.train import loop, planning
from halfbyte.train.calibrated_base import with_calibrated_base
from halfbyte.train.finished import finished
from halfbyte.train.loop import TrainResult
from halfbyte.train.metrics import Observer
from halfbyte.train.run_folder import RunFolder


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin: its settings with the labels filled in, its rows, its model, and its plan where there is one."""

    config: RunConfig
    data: TrainData
    assembled: Assembled
    plan: Decision | None = None


def prepare(config: RunConfig, *, resume: bool = False) -> Prepared:
    """Read the rows, make the plan, then load and assemble the model.

    Raises what these raise: DoesNotFitError before anything is loaded; and ConfigError when the folder holds a run already.
    """
    folder = RunFolder(Path(config.out))
    folder.check(resume=resume)
    source = resolve(config.model.name, revision=config.model.revision, allow_download=config.model.allow_download)
    if resume:
        config = planning.as_begun(config, folder)
    config = settled(planning.with_packed_base(config, source.folder), source.folder)
    data = load_data(
        config.data, load_tokenizer(source), model_limit=token_limit(source), template=config.model.template, labels=config.model.labels,
        now=folder.template_time() if resume else None,
    )  # fmt: skip
    require_task(data, classify=config.model.task == "sequence-classification", place=config.data.path)
    for note in data.notes:
        logger().info("data: %s", terminal(note))
    if config.model.task == "sequence-classification" and not config.model.labels:
        config = config.model_copy(update={"model": config.model.model_copy(update={"labels": data.labels})})
    plan = planning.plan_of(config, source.folder, data, resume=resume)
    if plan is not None:
        config = plan.config
    if config.data.packing and config.data.max_tokens != "auto":  # a length that the plan chose
        data = replace(data, report=replace(data.report, max_tokens=config.data.max_tokens))
    config, base = with_calibrated_base(config, source, data, resume=resume)
    assembled = assemble(config, base=base)
    return Prepared(anchored(config), data, assembled, plan)


def anchored(config: RunConfig) -> RunConfig:
    """`config` with whole paths of the files it names, so that what is written down is found from any working directory."""

    def whole(name: str | None) -> str | None:
        path = env.at_home(name or "")
        return str(path.absolute()) if name and (path.exists() or any(sign in name for sign in "*?[")) else name

    model = {"template": whole(config.model.template)} | ({} if config.model.name == "starter" else {"name": whole(config.model.name)})
    data = {"path": whole(config.data.path), "eval_path": whole(config.data.eval_path)}
    return config.model_copy(update={"model": config.model.model_copy(update=model), "data": config.data.model_copy(update=data)})


def train_prepared(prepared: Prepared, *, resume: bool = False, observers: Sequence[Observer] | None = None) -> TrainResult:
    """Run the loop and write the report."""
    result = loop.run(prepared.config, prepared.assembled, prepared.data, resume=resume, observers=observers, plan=prepared.plan)
    report.write(result.run_folder)
    return result


def train_from_config(config: RunConfig, *, resume: bool = False, observers: Sequence[Observer] | None = None) -> TrainResult:
    """Everything a run needs, from its settings to its report.  Raises what `prepare` and `loop.run` raise.

    Resuming a finished run says that it is one, loads nothing and changes nothing.
    """
    if resume and (done := finished(anchored(config))) is not None:
        logger().info(
            "this run is finished: step %d of %d%s; nothing was changed. A longer one: train.max_steps=N or train.epochs=N",
            done.steps, done.total_steps, ", stopped early" if done.stopped_early else "",
        )  # fmt: skip
        return done
    return train_prepared(prepare(config, resume=resume), resume=resume, observers=observers)
