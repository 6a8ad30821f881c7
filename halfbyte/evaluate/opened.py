"""A model, a run folder or an adapter folder, opened for use: answer prompts, stream replies, switch adapters.

| the path is                         | base                                         | adapter          |
|-------------------------------------|----------------------------------------------|------------------|
| a run of method qlora or lora       | the run's model in the run's storage         | <run>/adapter    |
| a run with quant.calibrate=true     | <run>/base                                   | <run>/adapter    |
| a run of method full                | <run>/model                                  | none             |
| an adapter folder inside a run      | as the run                                   | that folder      |
| any other adapter folder            | `base`, or the base it names if that is here | that folder      |
| anything else                       | a model: starter, folder, GGUF file, Hub id  | none             |

The base an adapter names is never fetched.  Under an adapter that began with init loftq the base is quantized as it was then.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfbyte import env
from halfbyte.adapters.folder import rebuild_base, require_fit, start_of
from halfbyte.adapters.store import AdapterStore
from halfbyte.config import QuantConfig, RunConfig, load_config
from halfbyte.data.templates import Template, from_tokenizer
from halfbyte.devices import compute_device
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.evaluate.prompts import Messages, prompt_tokens, require_text
from halfbyte.formats import peft
from halfbyte.models.calibrated_base import base_of_run
from halfbyte.models.cast import cast
from halfbyte.models.generate import generate, writes_no_text
from halfbyte.models.heads import settle_padding
from halfbyte.models.load import choose_dtype, load_model, load_tokenizer, task_of_folder
from halfbyte.models.source import Source, did_you_mean, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SHORT_RUNS = ("sweep", "points")
"""Folders of a study whose runs find a learning rate."""


@dataclass(frozen=True)
class Located:
    """What a path turned out to be: the base's name, the adapter's folder, and the settings of the run around it."""

    base: str
    adapter: Path | None = None
    config: RunConfig | None = None


def locate(name: str | Path, *, base: str | None = None) -> Located:
    """Find out what a path is, by what lies there; see the table of this module.  Raises AdapterError and ConfigError."""
    path = env.at_home(name)
    if (path / "adapter_config.json").is_file():
        config = _run_config(path.parent)
        if base is None and config is not None:
            base = _base_of(path.parent, config)
        return Located(base or _named_base(path), path, config)
    config = _run_config(path)
    if config is None:
        return Located(base or str(name))
    if config.method == "full":
        return Located(str(_trained(path, "model")), None, config)
    return Located(base or _base_of(path, config), _trained(path, "adapter"), config)


def _base_of(run: Path, config: RunConfig) -> str:
    """The base of a run: the model it names, or the calibrated one it made.  Raises ModelError when that is gone."""
    return config.model.name if config.quant.calibrate is not True else str(base_of_run(run))


def _run_config(folder: Path) -> RunConfig | None:
    file = folder / "config.yaml"
    return load_config(file) if file.is_file() and (folder / "metrics.jsonl").is_file() else None


def _name_for(folder_name: str) -> str:
    """A folder's name as one that an adapter may have: what is no letter, digit, dot or line becomes a line.

    >>> _name_for("my first run"), _name_for("\u00fc")
    ('my-first-run', 'adapter')
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder_name).strip("._-")[:56] or "adapter"


def _no_adapter(folder: Path) -> AdapterError:
    return AdapterError(
        "an adapter is a folder with adapter_config.json, or a run of method qlora or lora",
        code="E-ADAPT-082",
        place=str(folder),
        found="something else" if env.at_home(folder).exists() else "no such folder",
        remedy=did_you_mean(folder) or "name the folder that holds adapter_config.json",
        nothing_done="Nothing was loaded.",
    )


def _trained(run: Path, part: str) -> Path:
    """The folder of what a run was trained to.  Raises ConfigError where there is none."""
    if (run / part).is_dir():
        return run / part
    whole = run.absolute()
    study = next((folder for folder in whole.parents[:3] if (folder / "study.json").is_file()), None)
    if study is not None and whole.relative_to(study).parts[0] in SHORT_RUNS:
        raise ConfigError(
            "a study keeps the records of its short runs, not their weights",
            code="E-CONF-095",
            place=str(run),
            found=f"a point of a study, no folder {part}",
            expected=f"{run / part}",
            remedy=f"train with its settings: halfbyte train {run / 'config.yaml'} out=runs/NEW",
        )
    again = f"halfbyte train --resume {run}"
    if study is not None:
        log = whole.with_name(f"{whole.name}.log")
        again = f"repeat the comparison's command, with --out {study}; one that diverged is not trained again, {log} says why"
    raise ConfigError(
        "only a run that has finished can be used",
        code="E-CONF-081",
        place=str(run),
        found=f"no folder {part}",
        expected=f"{run / part}",
        remedy=f"finish it first: {again}",
    )


def _named_base(adapter: Path) -> str:
    named = peft.read(adapter).base_name or ""
    if named == "starter" or (named and env.at_home(named).exists()):
        return named
    raise AdapterError(
        "the base of an adapter must be at hand",
        code="E-ADAPT-080",
        place=str(adapter),
        found=f"it names {named!r}, which is no folder here",
        remedy="name the base with --model; a name in an adapter is never fetched",
    )


class Opened:
    """A loaded model with its tokenizer, its chat template and its adapters."""

    def __init__(
        self,
        located: Located,
        source: Source,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        template: str | None,
        start: tuple[object, ...] | None = None,
        force_base: bool = False,
    ) -> None:
        self.located, self.source, self.model, self.tokenizer = located, source, model, tokenizer
        self.template_path = template
        self._template: Template | None = None
        self.store = AdapterStore(model, base_digest=source.weights, start=start, allow_other_base=force_base)
        self.folders: dict[Path, str] = {}

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters at hand."""
        return list(self.store.names)

    @property
    def active(self) -> str | None:
        """Name of the adapter in use; None for the bare model."""
        return self.store.active

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes of a classifier; empty for a language model."""
        if self.located.config is not None:
            return self.located.config.model.labels
        return tuple((self.model.config.id2label or {}).values()) if task_of_folder(self.source) == "sequence-classification" else ()

    @property
    def train_on(self) -> str:
        """Which turns of a conversation carry the loss: as in the run, else the assistant's."""
        return self.located.config.data.train_on if self.located.config else "assistant"

    def title(self) -> str:
        """What this is, in a few words."""
        return self.source.name + (f" with adapter {self.active}" if self.active else "")

    def add(self, folder: Path) -> str:
        """Put an adapter folder at hand, under its folder's name (its run's name for <run>/adapter); returns the name."""
        folder = (folder / "adapter" if (folder / "adapter" / "adapter_config.json").is_file() else folder).resolve()
        if folder not in self.folders:
            wanted = _name_for(folder.parent.name if folder.name == "adapter" else folder.name)
            name = next(one for one in chain([wanted], (f"{wanted}-{number}" for number in count(2))) if one not in self.store.names)
            self.store.add(name, folder)
            self.folders[folder] = name
        return self.folders[folder]

    def activate(self, name: str | None) -> None:
        """Use an adapter by name or by folder; None is the bare model."""
        if name is not None and name not in self.store.names and env.at_home(name).is_dir():
            name = self.add(env.at_home(name))
        self.store.activate(name)
        self.model.eval()

    @property
    def template(self) -> Template:
        """The chat template; of a model without one, the plain one for prompt and completion."""
        if self._template is None:
            self._template = from_tokenizer(self.tokenizer, self.template_path, shape="prompt-completion")
        return self._template

    def reply(self, messages: Messages, *, stream: Callable[[str], None] | None = None, **options: Any) -> str:
        """The model's next message in a conversation; `stream` is told each piece as it comes."""
        return generate(self.model, self.tokenizer, prompt_tokens(self.template, self.tokenizer, [messages]), stream=stream, **options)[0]

    def answer(self, prompts: Sequence[str], *, system: str | None = None, raw: bool = False, **options: Any) -> list[str]:
        """One answer for each prompt; `raw` continues the text itself, without the chat template."""
        if raw:
            for prompt in prompts:
                require_text(prompt)
            tokens = [self.tokenizer(prompt).input_ids for prompt in prompts]
        else:
            first = [{"role": "system", "content": system}] if system else []
            talks = [[*first, {"role": "user", "content": prompt}] for prompt in prompts]
            tokens = prompt_tokens(self.template, self.tokenizer, talks)
        return generate(self.model, self.tokenizer, tokens, **options)


def open_model(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    quant: str | QuantConfig | None = None,
    base: str | None = None,
    dtype: str | None = None,
    template: str | None = None,
    revision: str | None = None,
    allow_download: bool = False,
    force_base: bool = False,
    writes: bool = False,
) -> Opened:
    """Open a model, run or adapter folder; see the table of this module.

    adapter     an adapter folder on top, in place of the one the path brings
    quant       storage of the base: nf4, fp4, int8 or none; a run keeps the one it was trained with
    force_base  put an adapter also on a base with other weights than the one it was trained on
    writes      refuse a classifier, before it is loaded
    """
    located = locate(name, base=base)
    if adapter is not None:
        found = locate(adapter, base=located.base)
        if found.adapter is None:
            raise _no_adapter(Path(adapter))
        located = Located(located.base, found.adapter, found.config or located.config)
    config = located.config
    if revision is None and config is not None and located.base == config.model.name:
        revision = config.model.revision
    source = resolve(located.base, revision=revision, allow_download=allow_download)
    task = config.model.task if config else task_of_folder(source)
    if writes and task == "sequence-classification":
        raise writes_no_text(str(name))
    dtype = dtype or (config.model.dtype if config else "auto")
    begun = _loftq_adapter(located.adapter) if quant is None else None
    model = load_model(
        source,
        dtype=dtype if begun is None else "float32",
        quant=_storage(quant, config) if begun is None else None,
        task=task,
        labels=config.model.labels if config else (),
    )
    if begun is not None and begun.loftq is not None:
        require_fit(model, begun, located.adapter or "")
        cast(model, DTYPES[begun.loftq.dtype])
        rebuild_base(model, begun)
        cast(model, choose_dtype(dtype)[0])
    model.to(compute_device(config.model.device if config else "auto"))  # type: ignore[arg-type]  # transformers' wrapper hides it
    template = template or (config.model.template if config else None)
    tokenizer = load_tokenizer(source)
    if task == "sequence-classification":
        settle_padding(model, tokenizer)
    opened = Opened(located, source, model, tokenizer, template, start_of(begun) if begun else None, force_base)
    if located.adapter is not None:
        opened.activate(opened.add(located.adapter))
    return opened


def open_with(adapters: Sequence[Path], name: str | Path, **options: Any) -> Opened:
    """Open with several adapters at hand; the first of `adapters` acts, else the one the path brings.  Options as for `open_model`."""
    alone = locate(name).adapter is None  # the first then says how the base is stored, as it would as the only one
    opened = open_model(name, adapter=adapters[0] if adapters and alone else None, **options)
    names = [opened.add(env.at_home(folder)) for folder in adapters]
    if names:
        opened.activate(names[0])
    return opened


def _loftq_adapter(folder: Path | None) -> peft.PeftAdapter | None:
    """The adapter of a folder, if it began with init loftq."""
    adapter = peft.read(folder) if folder is not None else None
    return adapter if adapter is not None and adapter.loftq is not None else None


def _storage(quant: str | QuantConfig | None, config: RunConfig | None) -> QuantConfig | None:
    """The storage asked for, or that of the run; None is as it lies in the folder."""
    if quant is None:
        if config is None or config.quant_format == "none" or config.quant.calibrate is True:
            return None
        return config.quant.model_copy(update={"format": config.quant_format})
    if isinstance(quant, QuantConfig):
        return quant
    formats = ("nf4", "fp4", "int8", "none")
    if quant not in formats:
        raise ConfigError(
            "the storage of a base is one of four",
            code="E-CONF-082",
            place="--quant",
            found=quant,
            expected=", ".join(formats),
            remedy="leave it out to keep the weights as they are",
        )
    return QuantConfig(format=quant)  # type: ignore[arg-type]
