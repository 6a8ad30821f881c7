"""An adapter folded into its base, written as an ordinary model folder in 16 bits (or 32) that any program loads.

    onto trained    W = dequantize(the packed weight the adapter was trained on) + delta     what was trained, exactly
    onto original   W = the weight before quantization + delta                               another base than the adapter has seen

A 4-bit base is dequantized and stays so: quantizing the sum again would round away most of what was learnt (peft#2321).  The finished
folder is loaded again and its logits are compared with those of the unmerged model.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte import surgery
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.evaluate.opened import Located, Opened, locate, open_model
from halfbyte.export import folder, probe
from halfbyte.formats import peft
from halfbyte.lora.inject import updates
from halfbyte.lora.layer import LoraLinear
from halfbyte.lora.merge import merge
from halfbyte.models.cast import cast
from halfbyte.models.packed_folder import storage_of
from halfbyte.models.save import save_dense
from halfbyte.models.source import require_folder
from halfbyte.quant.dense import dense_weight, with_weight
from halfbyte.quant.dense_experts import with_expert_weights
from halfbyte.quant.experts import QuantExperts
from halfbyte.quant.linear import QuantLinear
from halfbyte.units import bytes_text, percent_text

BASES = ("trained", "original")
ROUNDED = {
    "bfloat16": "  (merged weights are rounded to bfloat16, 8 bits of each; --dtype float32 rounds none)"
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Merged:
    """What a merge did; `difference` compares the written folder, loaded again, with the unmerged model."""

    out: Path
    onto: str
    base: str
    storage: str
    dtype: str
    merged: int
    dequantized: int
    rounding_error: float
    untied: bool
    bytes: int
    difference: probe.Difference
    classifies: bool = False

    def text(self) -> str:
        """The report that is printed."""
        seen = self.difference
        lines = [
            f"merged {self.merged} adapted weights into {self.base}, written in {self.dtype}: {self.out} ({bytes_text(self.bytes)})",
            f"logits beside those of the unmerged model: they differ by {seen.mean:.3g} on the mean and {seen.largest:.4g} at most, "
            f"where the largest logit is {seen.largest_logit:.3g}; same likeliest token at {percent_text(seen.same_choice)} "
            f"of {seen.positions} positions",
            ROUNDED.get(self.dtype, ""),
        ]
        if self.onto == "original" and self.storage != "none":
            lines.append(
                f"what this changes: the adapter was trained on the {self.storage} base and has learnt to work with its rounding; the "
                f"original weights differ from it, so the merged model is not the one that was trained. --onto trained keeps it."
            )
        elif self.storage != "none":
            layers = "1 layer" if self.dequantized == 1 else f"{self.dequantized} layers"
            others = f", also those of {layers} without an adapter" if self.dequantized else ""
            lines.append(
                f"the {self.storage} weights were written out as they are{others}; nothing was quantized again. "
                f"Quantizing this folder later changes it."
            )
        if self.untied:
            lines.append("output head and embedding were one table and are two now (tie_word_embeddings is false)")
        out = shlex.quote(str(self.out))
        lines.append(f"next     halfbyte {f'eval {out} --data FILE.jsonl' if self.classifies else f'chat {out}'}")
        return "\n".join(line for line in lines if line)


def merge_to_folder(
    run: str | Path,
    out: Path,
    *,
    onto: str = "trained",
    dtype: str = "bfloat16",
    model: str | None = None,
    allow_download: bool = False,
    force_base: bool = False,
) -> Merged:
    """Merge the adapter of a run or adapter folder and write the model to `out`.  Raises ConfigError, AdapterError, StorageError."""
    for name, value, legal in (("--onto", onto, BASES), ("--dtype", dtype, tuple(DTYPES))):
        if value not in legal:
            raise ConfigError("this choice is not known", code="E-CONF-083", place=name, found=value, expected=", ".join(legal),
                              nothing_done="Nothing was merged.")  # fmt: skip
    folder.require_new(out)
    require_folder(run)
    _require_mergeable(run, locate(run, base=model), onto)
    opening: dict[str, Any] = {"base": model, "allow_download": allow_download, "force_base": force_base}
    opening["dtype"] = None if dtype == "bfloat16" else "float32"  # rounded once, to the type that is written
    opened = open_model(run, **opening)
    biased = [name for name, layer in updates(opened.model).items() if isinstance(layer, LoraLinear) and _new_bias(layer)]
    if biased:
        raise AdapterError(
            "a merged model has the layers its config.json describes",
            code="E-ADAPT-083",
            place=str(run),
            found=f"an update with a bias for {len(biased)} layers that have none, e.g. {biased[0]}",
            remedy="use the adapter unmerged",
            nothing_done="Nothing was merged.",
        )
    packed = storage_of(opened.source.folder)
    if packed is not None and onto == "original":
        raise AdapterError(
            "the original weights must be at hand", code="E-ADAPT-085", place=str(run),
            found=f"--onto original with the base {opened.source.name}, a folder that is already in {packed.format}",
            expected="--onto trained, or the model's 16-bit folder", nothing_done="Nothing was merged.",
            remedy="leave --onto out, or name the 16-bit folder with --model",
        )  # fmt: skip
    storage = packed.format if packed is not None else _packed_to(opened)
    unmerged = probe.logits_of(opened.model, opened.tokenizer)
    if onto == "original" and storage != "none":
        opened = open_model(run, quant="none", **opening)
    report = merge(opened.model)
    dequantized = write_out(opened.model)
    cast(opened.model, DTYPES[dtype])
    if opened.template_path is not None:
        opened.tokenizer.chat_template = opened.template.source
    save_dense(opened.model, opened.tokenizer, out, over=False)
    count, error, untied = report.count, report.rounding_error, report.untied
    base, classifies = opened.source.name, bool(opened.labels)
    del opened, report
    difference = probe.compare(unmerged, _logits_of_folder(out, dtype))
    return Merged(out, onto, base, storage, dtype, count, dequantized, error, untied, folder.size_of(out), difference, classifies)


def _require_mergeable(run: str | Path, located: Located, onto: str) -> None:
    """Raise AdapterError where no adapter is, and for one that began on an error of its base which the original weights do not have."""
    if located.adapter is None:
        raise AdapterError(
            "only a model with an adapter can be merged", code="E-ADAPT-081", place=str(run), found="no adapter folder",
            remedy="name a run of method qlora or lora, or an adapter folder", nothing_done="Nothing was merged.",
        )  # fmt: skip
    config = located.config
    if onto == "original" and config is not None and (config.quant.calibrate is True or config.lora.init == "calibrated"):
        raise AdapterError(
            "the adapter of a calibrated base belongs to that base", code="E-ADAPT-084", place=str(run), found="--onto original",
            expected="--onto trained", remedy="leave --onto out", nothing_done="Nothing was merged.",
        )  # fmt: skip


def _packed_to(opened: Opened) -> str:
    """How the run, or the adapter's own start, packed a base that is dense on disk."""
    if opened.located.config is not None:
        return opened.located.config.quant_format
    begun = peft.read(opened.located.adapter).loftq if opened.located.adapter is not None else None
    return begun.format if begun is not None else "none"


def _new_bias(layer: LoraLinear) -> bool:
    return layer.lora_bias is not None and getattr(layer.frozen_base, "bias", None) is None


def write_out(model: nn.Module) -> int:
    """Replace every packed layer by a dense one with the same weight; returns how many."""
    packed = list(surgery.modules_of(model, lambda _, module: isinstance(module, (QuantLinear, QuantExperts))))
    for name, layer in packed:
        if isinstance(layer, QuantExperts):
            surgery.replace(model, name, with_expert_weights(layer, {}))
        else:
            bias = layer.bias if isinstance(layer.bias, torch.Tensor) else None
            surgery.replace(model, name, with_weight(layer, dense_weight(layer), bias))
    return len(packed)


def _logits_of_folder(out: Path, dtype: str) -> list[torch.Tensor]:
    """Logits of the written folder, loaded as any other model is."""
    opened = open_model(out, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    return probe.logits_of(opened.model, opened.tokenizer)
