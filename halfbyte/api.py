"""What `import halfbyte` gives: a few functions, each of them one step of the road, and `Run`.

docs/python.md is made from the docstrings here, with examples.
"""

import json
import shlex
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
from halfbyte.export.merged import Merged, merge_to_folder
from halfbyte.export.quantized import Quantized, calibration, quantize_to_folder
from halfbyte.lora import inject as injection
from halfbyte.lora.inject import Injected
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
    """(model, tokenizer), both of transformers, the model in eval mode.

    model           starter, a folder, a GGUF file, a Hub id, a run folder or an adapter folder; a run comes with its adapter
    quant           nf4 or fp4 (4 bits a weight) or int8: packed tensor by tensor while loading; none: not packed; unless given, a run
                    keeps its own storage and anything else stays as it lies there
    adapter         an adapter folder on top
    dtype           float32 or bfloat16, of what is not packed; auto, the default, is bfloat16 where the machine multiplies it natively
    revision        of a Hub id: branch, tag or commit
    allow_download  fetch a Hub id that is not here yet
    force_base      accept an adapter that was trained on other weights
    Raises ModelError, WeightError, AdapterError, ConfigError, EnvironmentFault, StorageError.
    """
    opened = open_model(
        model, quant=quant, adapter=adapter, dtype=dtype, revision=revision, allow_download=allow_download, force_base=force_base
    )
    return opened.model, opened.tokenizer


def inject(model: nn.Module, *, seed: int = 0, **settings: Any) -> Injected:
    """Put LoRA layers into a model, in place, and freeze the rest; as it begins by default, the adapter changes nothing.

    settings  those of the `lora` group in docs/config.md: rank=16, alpha=32, targets="all-linear", dropout=0.0, init="default" ...
    seed      of the first values of the factors

    Gives back `names` of the layers that carry an adapter, `ranks` by name, `trainable_params`, `total_params` and `share`, the one over
    the other, 0 to 1.  The decoder layers are exchanged for faster ones with the same names and results where their structure is known, and
    in training the output layer makes logits only when they are looked at.
    Raises ConfigError for a setting, TargetError for a target that matches nothing, AdapterError for a model that carries an adapter.
    """
    nothing = "Nothing was injected."
    config, start = make(LoraConfig, settings, "lora", nothing), make(TrainConfig, {"seed": seed}, "", nothing)
    return _made_fast(model, injection.inject(model, config, seed=start.seed))


def eject(model: nn.Module) -> int:
    """Take the adapter out of a model; returns how many layers were put back, 0 where there was none.

    The weights are to the bit those before `inject` or `load_adapter` (after init loftq the quantized ones it made); all stay frozen, and
    the decoder layers stay the faster ones.  What was trained is gone: save it first.
    """
    return injection.eject(model)


def _made_fast(model: nn.Module, injected: Injected) -> Injected:
    fuse(model)
    make_lazy(model)
    return injected


def save_adapter(model: nn.Module, folder: str | Path, *, base: str | None = None, allow_untrained: bool = False) -> Path:
    """Write the adapter of a model as a folder in PEFT's format, and give back the folder.

    base             the name of the base that is noted in it; the model's own name or path unless given
    allow_untrained  write an adapter that changes nothing, as it is before the first step, which else is refused

    The weights of the model's folder are noted too, so that the adapter is not put on others unseen.  Raises AdapterError, StorageError.
    """
    return adapter_folder.save_adapter(
        model, folder, base_name=base, base_digest=loaded_weights(model), allow_untrained=allow_untrained
    )


def SaveAdapter(folder: str | Path) -> "TrainerCallback":
    """A callback for transformers.Trainer and TRL: the adapter goes to `CHECKPOINT/adapter` at each save and to `folder` at the end.

    Of several processes the first alone writes.  Raises what `save_adapter` does.
    """
    from halfbyte.models import trainer_callback  # it loads transformers' trainer, and with it peft and bitsandbytes where they are

    return trainer_callback.SaveAdapter(folder, save_adapter)


def load_adapter(model: nn.Module, folder: str | Path, *, force_base: bool = False, allow_untrained: bool = False) -> Injected:
    """Put the adapter of a PEFT folder into a model that has none, in place; gives back what `inject` does.

    force_base       take a model of other weights than the adapter was trained on; an adapter that began with init loftq wants the dense
                     model and quantizes it as then, with force_base it takes one that is packed
    allow_untrained  take an adapter that changes nothing
    Raises AdapterError where they do not fit; nothing is changed then.
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
    """Fine-tune a model and return the finished run; progress goes to standard error.

    model     starter, the default, a folder, a GGUF file, a Hub id or a quantized folder
    data      rows to train on: jsonl, json, csv or parquet; a tenth of them, at most 200, is held out
    method    qlora, the default, lora, full, or auto: lora if it fits with room, else qlora
    out       a new folder for the run; runs/run unless given
    config    a YAML file; what is given here beats it
    resume    go on with the run in `out` from its newest whole checkpoint
    settings  groups as dicts, or single ones by dotted name: `train={"max_steps": 40}, **{"lora.rank": 32}`; all are in docs/config.md
    Raises subclasses of HalfbyteError, whose text is the error block of the command line.
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
    """Loss in nats per scored token, perplexity, tokens and rows of a model, run or adapter folder; with `metrics` scores of its answers.

    model     as for `load`, or `run.opened`
    data      rows as for training; all are judged, those over the model's limit are left out and counted as rows_left_out
    metrics   exact_match, final_answer, rouge1, rouge2 and rougeL (0 to 1), bleu and chrf (0 to 100), of greedy answers
    options   batch_size=8 rows, max_rows (all), max_new_tokens=128 with metrics; adapter, quant, allow_download and force_base as for
              `load`, template: the path of a chat template

    Of a classifier: the loss in nats per row, rows, accuracy and macro_f1 (0 to 1).
    Raises DataError, ConfigError, ModelError.
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
    """The answer to a prompt, or a list with one for each of several, each on its own.

    model    as for `load`; it is loaded for this call, `Run.generate` keeps it
    system   system message before each prompt
    options  max_new_tokens=256; temperature=0.0, which always takes the likeliest token; top_p=1.0; seed=0; batch_size=8 prompts;
             raw=True continues the text itself, without the chat template
    Raises ConfigError for a setting out of its range and for a prompt that leaves no room, ModelError.
    """
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
    """What a classifier takes a text for, as (label, probability 0 to 1), or a list with one for each of several; None for a text that is
    empty or longer than what the model can see, for a text is read whole.

    model       a run with model.task=sequence-classification, or a model folder saved as such; `Run.label` keeps it loaded
    batch_size  texts at a time; changes the speed, not the labels
    Raises ModelError for a model that is no classifier, NumericError for damaged weights.
    """
    opened = open_model(model, adapter=adapter, quant=quant, allow_download=allow_download, force_base=force_base)
    return _labels(opened, texts, batch_size)


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
    """Fold the adapter of a run or adapter folder into its base and write an ordinary model folder, which any program loads.

    onto   trained: the base exactly as the adapter saw it, 4-bit weights written out in 16 bits; original: the base before quantization
    dtype  of the written weights: bfloat16, float16 or float32
    model  the base, where the folder names none at hand

    Gives back among others `out`, `bytes` of the written files, `rounding_error`, and `difference`: the `largest` and `mean` gap between
    the logits of the written and the unmerged model on real prompts.  `text()` says all of it.
    Raises ConfigError, AdapterError, ModelError; StorageError where `out` holds files.
    """
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
    """Write a quantized copy of a model in bitsandbytes' format.

    format        nf4, fp4 or int8
    blocksize     weights that share a scale, for nf4 and fp4
    double_quant  hold these scales in 8 bits
    calibrate     rows as for training: the scales are fitted to what they activate
    options       with `calibrate`: start_rank=0 (above 0 writes the low-rank start too), calibration_rows=128, seed=0, template

    Gives back among others `bytes_before`, `bytes_after` and `errors`, (layer, |difference| / |weights|) with the worst first, empty with
    `calibrate`; `text()` says all of it.
    Raises ConfigError, DataError, ModelError, WeightError; StorageError where `out` holds files.
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
        """The run in a folder, finished or not; nothing is loaded.  Raises ConfigError when there is none."""
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
        """The resolved settings of the run, as `run.config.lora.rank`."""
        return load_config(RunFolder(self.folder).config)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The contents of run.json: status, steps, seconds, peak_memory_bytes, final_eval_loss (nats per token or row) and more."""
        path = RunFolder(self.folder).summary
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def metrics(self) -> list[dict[str, Any]]:
        """One record per logged step (step, loss, lr, grad_norm, tokens_per_second, memory_bytes ...), evaluation and note."""
        return read_metrics(RunFolder(self.folder).metrics)

    @property
    def adapter_folder(self) -> Path | None:
        """Where the adapter is, in PEFT's format; None for method full."""
        return RunFolder(self.folder).adapter if self.config.method != "full" else None

    @property
    def model_folder(self) -> Path | None:
        """Where the trained model is, for method full; None otherwise."""
        return RunFolder(self.folder).model if self.config.method == "full" else None

    @property
    def report(self) -> Path:
        """Where the page of the run is."""
        return self.folder / "report.html"

    @cached_property
    def opened(self) -> Opened:
        """The trained model with its `model` and `tokenizer`, loaded at first use and kept.  Raises ConfigError until the run has ended."""
        return open_model(self.folder)

    def generate(self, prompt: str | Sequence[str], *, system: str | None = None, **options: Any) -> str | list[str]:
        """The trained model's answer to a prompt, or a list with one for each of several; options as for `generate`."""
        return _answer(self.opened, prompt, system, options)

    def label(self, texts: str | Sequence[str], *, batch_size: int = 8) -> Label | list[Label | None] | None:
        """What the trained classifier takes a text for, or a list with one answer for each of several; as `label` says."""
        return _labels(self.opened, texts, batch_size)

    def evaluate(self, data: str | Path, *, metrics: Sequence[str] = (), **options: Any) -> dict[str, float | int]:
        """Loss and scores of the trained model on rows, as `evaluate` says."""
        return evaluate_rows(self.opened, data, metrics=metrics, **options)

    def closing_text(self) -> str:
        """Where everything is and what to type next."""
        trained = self.adapter_folder or self.model_folder
        classifies = self.config.model.task == "sequence-classification"
        held_out = self.config.data.eval_path or "FILE.jsonl"
        run = shlex.quote(str(self.folder))
        label = f"then     halfbyte label {run} --data FILE --out NEW.jsonl"
        judged = [f"next     halfbyte eval {run} --data {shlex.quote(held_out)}", label]
        return "\n".join(
            [
                f"{'adapter' if self.adapter_folder else 'model':<8} {trained}",
                f"report   {self.report}",
                *(judged if classifies else [f"next     halfbyte chat {run}"]),
            ]
        )
