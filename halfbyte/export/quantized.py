"""A model folder in 4 or 8 bits, in bitsandbytes' format, with its size and the error that was made.

The error of a weight is |W - dequantize(quantize(W))| / |W| in the Frobenius norm, measured tensor by tensor from the files themselves,
so neither model is held in memory for it.

With `Rows` the scales are searched for what the activations on those rows say (halfbyte/calibrate), and a low-rank start may lie beside.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from halfbyte import surgery
from halfbyte.calibrate.base import REPORT, Calibration, choose_rows, write_base
from halfbyte.calibrate.quality import Quality
from halfbyte.config.data import DataConfig
from halfbyte.config.load import make
from halfbyte.config.lora import LoraConfig
from halfbyte.config.model import ModelConfig
from halfbyte.config.quant import QuantConfig
from halfbyte.config.train import TrainConfig
from halfbyte.data.load import load_data, require_task
from halfbyte.errors import ConfigError, ModelError
from halfbyte.export import folder
from halfbyte.formats import safetensors_io
from halfbyte.models.calibrated_base import START
from halfbyte.models.load import load_model, load_tokenizer, task_of_folder, token_limit
from halfbyte.models.packed_folder import storage_of
from halfbyte.models.save import save_quantized
from halfbyte.models.source import Source, resolve
from halfbyte.quant.dense import dense_weight
from halfbyte.quant.experts import QuantExperts
from halfbyte.quant.linear import QuantLinear
from halfbyte.units import bytes_text, percent_text

FORMATS = ("nf4", "fp4", "int8")
NOTHING_DONE = "Nothing was written."


@dataclass(frozen=True)
class Quantized:
    """What a quantization did; `errors` holds (weight, relative error), the worst first."""

    out: Path
    format: str
    layers: int
    bytes_before: int
    bytes_after: int
    errors: tuple[tuple[str, float], ...]
    quality: Quality | None = None

    def text(self) -> str:
        """The report that is printed."""
        if self.quality is not None:
            return self._calibrated_text(self.quality)
        mean = sum(error for _, error in self.errors) / max(1, len(self.errors))
        lines = [
            f"{self.layers} layers in {self.format}: {self.out}",
            f"size {bytes_text(self.bytes_before)} -> {bytes_text(self.bytes_after)} "
            f"({percent_text(self.bytes_after / self.bytes_before)})",
            f"relative error of a weight, measured on {len(self.errors)}: mean {percent_text(mean)}, largest:",
        ]
        lines += [f"  {percent_text(error):>8}  {name}" for name, error in self.errors[:5]]
        return "\n".join([*lines, f"next     halfbyte train --model {self.out} --data FILE"])

    def _calibrated_text(self, quality: Quality) -> str:
        lines = [
            f"in {self.format}: {self.out}",
            f"size of all files {bytes_text(self.bytes_before)} -> {bytes_text(self.bytes_after)} "
            f"({percent_text(self.bytes_after / self.bytes_before)})" + (", the start included" if quality.rank else ""),
            quality.text(), f"each layer: {self.out / REPORT}",
        ]  # fmt: skip
        if quality.rank:
            lines.append(f"start of rank {quality.rank}: {self.out / START}")
        settings = f" lora.init=calibrated lora.rank={quality.rank}" if quality.rank else ""
        return "\n".join([*lines, f"next     halfbyte train --model {self.out} --data FILE{settings}"])


@dataclass(frozen=True)
class Rows:
    """What to calibrate on: at most `count` rows of a data file, drawn with `seed`; `start_rank` 0 writes no low-rank start."""

    path: Path
    start_rank: int = 0
    count: int = 128
    seed: int = 0
    template: str | None = None


def calibration(
    path: str | Path | None, *, start_rank: int = 0, calibration_rows: int = 128, seed: int = 0, template: str | None = None
) -> Rows | None:
    """The rows to calibrate on; None without a path.  Raises ConfigError where an option is wrong or has nothing to act on."""
    rows = Rows(Path(path or ""), start_rank, calibration_rows, seed, template)
    if path is not None:
        count = make(QuantConfig, {"calibration_rows": calibration_rows}, "quant", NOTHING_DONE).calibration_rows
        rank = 0 if rows.start_rank == 0 else make(LoraConfig, {"rank": start_rank}, "lora", NOTHING_DONE).rank
        return Rows(rows.path, rank, count, make(TrainConfig, {"seed": seed}, "", NOTHING_DONE).seed, template)
    if rows != Rows(Path("")):
        raise ConfigError("these options belong to a calibration", code="E-CONF-097", found="no --calibrate",
                          place="--start-rank, --calibration-rows, --seed, --template", expected="--calibrate ROWS",
                          remedy="name the rows, or leave these options out", nothing_done="Nothing was written.")  # fmt: skip
    return None


def quantize_to_folder(
    model: str, out: Path, *, format: str = "nf4", blocksize: int = 64, double_quant: bool = True, allow_download: bool = False,
    rows: Rows | None = None,
) -> Quantized:  # fmt: skip
    """Quantize a model while it is loaded and write the folder.  Raises ConfigError, DataError, ModelError, WeightError, StorageError."""
    if format not in FORMATS:
        raise ConfigError("this storage is not known", code="E-CONF-084", place="--format", found=format, expected=", ".join(FORMATS),
                          nothing_done="Nothing was written.")  # fmt: skip
    quant = make(QuantConfig, {"format": format, "blocksize": blocksize, "double_quant": double_quant}, "quant", NOTHING_DONE)
    if format == "int8" and (quant.blocksize, quant.double_quant) != (64, True):
        raise ConfigError("int8 has one scale for each row of a weight", code="E-CONF-087", place="--blocksize, --double-quant",
                          found=f"{blocksize}, {str(double_quant).lower()}", remedy="leave them out, or take --format nf4",
                          nothing_done="Nothing was written.")  # fmt: skip
    folder.require_new(out)
    source = resolve(model, allow_download=allow_download)
    packed = storage_of(source.folder)
    if packed is not None:
        raise ModelError("a model is quantized from 16 or 32 bits", code="E-MODEL-045", place=str(source.folder),
                         found=f"a folder that is already in {packed.format}", remedy="name the model's 16-bit folder",
                         nothing_done="Nothing was written.")  # fmt: skip
    before = folder.size_of(source.folder)  # now: `out` may be a folder in it
    if rows is not None:
        quality = _calibrate(source, out, quant, rows)
        layers = len(quality.layers)
        return Quantized(out, format, layers, before, folder.size_of(out), (), quality)
    loaded = load_model(source, quant=quant)
    layers = len(list(surgery.modules_of(loaded, lambda _, module: isinstance(module, (QuantLinear, QuantExperts)))))
    errors = relative_errors(loaded, source)
    save_quantized(loaded, load_tokenizer(source), out, over=False)
    worst = tuple(sorted(errors, key=lambda entry: -entry[1]))
    return Quantized(out, format, layers, before, folder.size_of(out), worst)


def _calibrate(source: Source, out: Path, quant: QuantConfig, rows: Rows) -> Quality:
    """Read the rows as a training would, and write the calibrated folder."""
    if quant.format == "int8":
        raise ConfigError("rows serve the 4-bit formats", code="E-CONF-096", place="--calibrate, --format", found="int8",
                          remedy="take --format nf4, or leave --calibrate out", nothing_done="Nothing was written.")  # fmt: skip
    task = task_of_folder(source)
    settings = make(DataConfig, {"path": str(rows.path), "eval_rows": 0}, "data", NOTHING_DONE)
    data = load_data(settings, load_tokenizer(source), model_limit=token_limit(source), template=rows.template)
    require_task(data, classify=task == "sequence-classification", place=str(rows.path))
    chosen = choose_rows([row.input_ids for row in data.train], rows.count, rows.seed, str(rows.path))
    lora = make(LoraConfig, {"rank": rows.start_rank, "alpha": 2 * rows.start_rank}, "lora") if rows.start_rank else None
    how = Calibration(quant, lora, make(ModelConfig, {"task": task}, "model"), rows.seed)
    return write_base(source, chosen, out, how, over=False)


def relative_errors(model: nn.Module, source: Source) -> list[tuple[str, float]]:
    """(name, relative error) of each packed layer that stands under its name in the model's files."""
    found = []
    turned: set[str] = model.config.quantization_config.report.transposed  # type: ignore[union-attr, assignment]  # quantizer.py's report
    with safetensors_io.open_tensors(source.folder) as tensors:
        for name, layer in surgery.modules_of(model, lambda _, module: isinstance(module, QuantLinear)):
            if f"{name}.weight" not in tensors:  # under another name in the files, e.g. one expert of many
                continue
            original = tensors[f"{name}.weight"].float()
            original = original.T if name in turned else original
            gap = dense_weight(layer, torch.float32) - original
            found.append((name, float(gap.norm() / original.norm().clamp_min(1e-30))))
    return found
