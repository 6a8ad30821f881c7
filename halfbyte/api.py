"""What `import halfbyte` gives: a few functions, each of them one step of the road, and `Run`.

run = hb.train(model="starter", data="rows.jsonl", method="qlora", out="runs/first")
print(run.generate("..."))

model, tokenizer = hb.load("path/or/id", quant="nf4")     a transformers model, for transformers.Trainer, TRL or an own loop
hb.inject(model, rank=16, alpha=32, targets="all-linear")
hb.save_adapter(model, "adapter")                         PEFT's format
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from halfbyte.adapters import folder as adapter_folder
from halfbyte.config import LoraConfig, RunConfig, TrainConfig, load_config, make
from halfbyte.errors import ConfigError
from halfbyte.evaluate.labelling import Label, label_texts
from halfbyte.evaluate.opened import Opened, open_model
from halfbyte.evaluate.rows import evaluate_rows
from halfbyte.export.labelled import Labelled, label_to_file, require_new_file
from halfbyte.export.merged import Merged, merge_to_folder
from halfbyte.export.quantized import Quantized, calibration, quantize_to_folder
from halfbyte.lora import inject as injection
from halfbyte.lora.inject import Injected
from halfbyte.models import trainer_callback
from halfbyte.models.lazy_logits import make_lazy
from halfbyte.models.source import loaded_weights
from halfbyte.models.structure import fuse
from halfbyte.train.from_config import train_from_config
from halfbyte.train.metrics import read as read_metrics
from halfbyte.train.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

__all__ = [
    "Run",
    "eject",
    "evaluate",
    "generate",
    "inject",
    "label",
    "label_file",
    "load",
    "load_adapter",
    "merge",
    "open_model",
    "quantize",
    "save_adapter",
    "train",
    "train_config",
]


def load(
    model: str | Path = "starter",
    *,
    quant: str | None = None,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    allow_download: bool = False,
    force_base: bool = False,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """(model, tokenizer), both of transformers; `model` is a name, a folder, a GGUF file, a run folder or an adapter folder.

    quant       nf4, fp4 or int8: packed tensor by tensor while loading; None as it lies there
    force_base  accept an adapter that was trained on other weights
    Raises ModelError, WeightError, AdapterError, EnvironmentFault.
    """
    opened = open_model(
        model, quant=quant, adapter=adapter, dtype=dtype, revision=revision, allow_download=allow_download, force_base=force_base
    )
    return opened.model, opened.tokenizer


def inject(model: nn.Module, *, seed: int = 0, **settings: Any) -> Injected:
    """Put LoRA layers into a model, in place, and freeze the rest; settings are those of the `lora` group (docs/config.md).

    The decoder layers are exchanged for faster ones with the same names and results where their structure is known, and in training the
    output layer makes logits only when they are looked at (models/structure.py, models/lazy_logits.py).
    Raises ConfigError for a setting, TargetError for a target that matches nothing.
    """
    nothing = "Nothing was injected."
    config, start = make(LoraConfig, settings, "lora", nothing), make(TrainConfig, {"seed": seed}, "", nothing)
    return _made_fast(model, injection.inject(model, config, seed=start.seed))


def eject(model: nn.Module) -> int:
    """Take the adapter out of a model; returns how many layers carried one, 0 where none did.

    The weights are to the bit those before `inject` or `load_adapter` (after init loftq the quantized ones it made); all stay frozen, and
    the decoder layers stay the faster ones.  What was trained is gone: save it first.
    """
    return injection.eject(model)


def _made_fast(model: nn.Module, injected: Injected) -> Injected:
    fuse(model)
    make_lazy(model)
    return injected


def save_adapter(model: nn.Module, folder: str | Path, *, base: str | None = None, allow_untrained: bool = False) -> Path:
    """Write the adapter of a model in PEFT's format; `base` is the name of the base that is noted in it.

    The weights of the folder that the model was loaded from are noted too, so that the adapter is not put on others unseen.
    An adapter that changes nothing, as it is before the first step, is refused unless `allow_untrained`.
    """
    return adapter_folder.save_adapter(
        model, folder, base_name=base, base_digest=loaded_weights(model), allow_untrained=allow_untrained
    )


def SaveAdapter(folder: str | Path) -> "TrainerCallback":
    """A callback for transformers.Trainer and TRL: the adapter goes to <checkpoint>/adapter at each save and to `folder` at the end."""
    return trainer_callback.SaveAdapter(folder, save_adapter)


def load_adapter(model: nn.Module, folder: str | Path, *, force_base: bool = False, allow_untrained: bool = False) -> Injected:
    """Put the adapter of a PEFT folder into a model that has none.  Raises AdapterError where they do not fit; nothing is changed then.

    force_base takes a model of other weights than the adapter was trained on.  An adapter that began with init loftq wants the dense model
    and quantizes it as then; force_base takes one that is packed.
    allow_untrained takes one that changes nothing.
    """
    done = adapter_folder.load_adapter(
        model, folder, base_digest=loaded_weights(model), allow_other_base=force_base, allow_untrained=allow_untrained
    )
    return _made_fast(model, done)


def train(
    model: str | Path | None = None,
    data: str | Path | None = None,
    method: str | None = None,
    out: str | Path | None = None,
    *,
    config: str | Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> "Run":
    """Fine-tune a model and return the finished run.

    config     a YAML file; what is given here beats it
    settings   groups as dicts, or single ones by dotted name: train={"max_steps": 40}, **{"lora.rank": 32}
    resume     go on with the run in `out` from its newest whole checkpoint
    Raises what the command line says in its error block: subclasses of HalfbyteError.
    """
    named = {"model": model, "data": data, "method": method, "out": out}
    given = {**{name: value for name, value in named.items() if value is not None}, **settings}
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    path = Path(config) if config is not None else None
    if resume and path is None and out is not None and data is None:
        path = RunFolder(Path(out)).config
    return train_config(load_config(path, flags=flags, origin="hb.train"), resume=resume)


def train_config(config: RunConfig, *, resume: bool = False) -> "Run":
    """Fine-tune as a RunConfig says."""
    return Run.open(train_from_config(config, resume=resume).run_folder)


def evaluate(model: str | Path | Opened, data: str | Path, *, metrics: Sequence[str] = (), **options: Any) -> dict[str, float | int]:
    """Loss, perplexity and counts of a model, run or adapter folder on rows; with `metrics` also scores of its own answers.

    metrics   any names of evaluate/generation.py's METRICS, such as rougeL; a classifier gives accuracy and macro_f1 by itself
    options   batch_size, max_new_tokens, max_rows, and those of `open_model`: adapter, quant, template, allow_download, force_base
    """
    names = ("adapter", "quant", "template", "allow_download", "force_base")
    opening = {name: options.pop(name) for name in names if name in options}
    late = [name for name, value in opening.items() if value not in (None, False)]
    if isinstance(model, Opened) and late:
        raise ConfigError(
            "how a model is opened is told before it is open", code="E-CONF-099", place=", ".join(late), found="a model that is open",
            expected="a name, a folder or a run", remedy="give these options to open_model", nothing_done="Nothing was evaluated.",
        )  # fmt: skip
    opened = model if isinstance(model, Opened) else open_model(model, **opening)
    return evaluate_rows(opened, data, metrics=metrics, **options)


def generate(
    model: str | Path,
    prompt: str | Sequence[str],
    *,
    system: str | None = None,
    adapter: str | Path | None = None,
    quant: str | None = None,
    allow_download: bool = False,
    force_base: bool = False,
    **options: Any,
) -> str | list[str]:
    """The answer to a prompt, or one for each of several; options: max_new_tokens, temperature, top_p, seed, raw."""
    opened = open_model(model, adapter=adapter, quant=quant, allow_download=allow_download, force_base=force_base, writes=True)
    return _answer(opened, prompt, system, options)


def label(
    model: str | Path,
    texts: str | Sequence[str],
    *,
    adapter: str | Path | None = None,
    quant: str | None = None,
    batch_size: int = 8,
    allow_download: bool = False,
    force_base: bool = False,
) -> Label | list[Label | None] | None:
    """What a classifier takes a text for, as (label, probability), or one for each of several; None for a text that it cannot read.

    A text is read whole; one that is empty, or longer than what the model can see, gets None.
    batch_size  texts at a time; changes the speed, not the labels
    Raises ModelError for a model that is no classifier.
    """
    opened = open_model(model, adapter=adapter, quant=quant, allow_download=allow_download, force_base=force_base)
    return _labels(opened, texts, batch_size)


def label_file(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    text_field: str | None = None,
    prefix: str = "",
    batch_size: int = 8,
    **opening: Any,
) -> Labelled:
    """The rows of a file with their labels, as a new file of JSON lines; see export/labelled.py.  `opening` as for `open_model`."""
    require_new_file(Path(out), data)
    opened = open_model(model, **opening)
    return label_to_file(opened, data, Path(out), text_field=text_field, prefix=prefix, batch_size=batch_size)


def merge(
    run: str | Path,
    out: str | Path,
    *,
    onto: str = "trained",
    dtype: str = "bfloat16",
    model: str | None = None,
    allow_download: bool = False,
    force_base: bool = False,
) -> Merged:
    """Fold the adapter of a run or adapter folder into its base and write an ordinary model folder; see export/merged.py."""
    return merge_to_folder(run, Path(out), onto=onto, dtype=dtype, model=model, allow_download=allow_download, force_base=force_base)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    allow_download: bool = False,
    calibrate: str | Path | None = None,
    **options: Any,
) -> Quantized:
    """Write a quantized copy of a model in bitsandbytes' format, with its size and error; see export/quantized.py.

    calibrate   rows as for training: the scales are fitted to what they activate
    options     with `calibrate`: start_rank (writes the low-rank start too), calibration_rows, seed, template
    """
    rows = calibration(calibrate, **options)
    return quantize_to_folder(
        str(model), Path(out), format=format, blocksize=blocksize, double_quant=double_quant, allow_download=allow_download, rows=rows
    )


def _answer(opened: Opened, prompt: str | Sequence[str], system: str | None, options: Mapping[str, Any]) -> str | list[str]:
    one = isinstance(prompt, str)
    answers = opened.answer([prompt] if isinstance(prompt, str) else prompt, system=system, **{"max_new_tokens": 256, **options})
    return answers[0] if one else answers


def _labels(opened: Opened, texts: str | Sequence[str], batch_size: int) -> Label | list[Label | None] | None:
    found = label_texts(opened, [texts] if isinstance(texts, str) else texts, batch_size=batch_size)
    return found[0] if isinstance(texts, str) else found


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and what can be done with it."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """The run in a folder.  Raises ConfigError when there is none."""
        path = Path(folder)
        if not RunFolder(path).config.is_file():
            raise ConfigError(
                "a run is a folder that `halfbyte train` wrote",
                code="E-CONF-085",
                place=str(path),
                found="no config.yaml in it" if path.is_dir() else "no such folder",
                remedy="name the folder that was given as out",
            )
        return cls(path)

    @cached_property
    def config(self) -> RunConfig:
        """The resolved settings of the run."""
        return load_config(RunFolder(self.folder).config)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the run reached: status, steps, losses, time, memory; the contents of run.json."""
        path = RunFolder(self.folder).summary
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def metrics(self) -> list[dict[str, Any]]:
        """One record per logged step, evaluation and note."""
        return read_metrics(RunFolder(self.folder).metrics)

    @property
    def adapter_folder(self) -> Path | None:
        """The adapter in PEFT's format; None for method full."""
        return RunFolder(self.folder).adapter if self.config.method != "full" else None

    @property
    def model_folder(self) -> Path | None:
        """The trained model, for method full; None otherwise."""
        return RunFolder(self.folder).model if self.config.method == "full" else None

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.folder / "report.html"

    @cached_property
    def opened(self) -> Opened:
        """The trained model, loaded at first use and kept."""
        return open_model(self.folder)

    def generate(self, prompt: str | Sequence[str], *, system: str | None = None, **options: Any) -> str | list[str]:
        """The trained model's answer to a prompt, or one for each of several."""
        return _answer(self.opened, prompt, system, options)

    def label(self, texts: str | Sequence[str], *, batch_size: int = 8) -> Label | list[Label | None] | None:
        """What the trained classifier takes a text for, or one answer for each of several; see `label`."""
        return _labels(self.opened, texts, batch_size)

    def evaluate(self, data: str | Path, *, metrics: Sequence[str] = (), **options: Any) -> dict[str, float | int]:
        """Loss and scores of the trained model on rows; see `evaluate`."""
        return evaluate_rows(self.opened, data, metrics=metrics, **options)

    def closing_text(self) -> str:
        """Where everything is and what to type next."""
        trained = self.adapter_folder or self.model_folder
        classifies = self.config.model.task == "sequence-classification"
        held_out = self.config.data.eval_path or "FILE.jsonl"
        return "\n".join(
            [
                f"{'adapter' if self.adapter_folder else 'model':<8} {trained}",
                f"report   {self.report}",
                f"next     halfbyte eval {self.folder} --data {held_out}" if classifies else f"next     halfbyte chat {self.folder}",
            ]
        )
