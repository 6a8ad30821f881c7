"""A model folder in 4 or 8 bits, in bitsandbytes' format, with its size and the error that was made.

The error of a weight is |W - dequantize(quantize(W))| / |W| in the Frobenius norm, measured tensor by tensor from the files themselves,
so neither model is held in memory for it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from halfbyte import surgery
from halfbyte.config.load import make
from halfbyte.config.quant import QuantConfig
from halfbyte.errors import ConfigError, ModelError
from halfbyte.export import folder
from halfbyte.formats import safetensors_io
from halfbyte.models.load import load_model, load_tokenizer
from halfbyte.models.packed_folder import storage_of
from halfbyte.models.save import save_quantized
from halfbyte.models.source import Source, resolve
from halfbyte.quant.dense import dense_weight
from halfbyte.quant.experts import QuantExperts
from halfbyte.quant.linear import QuantLinear
from halfbyte.units import bytes_text, percent_text

FORMATS = ("nf4", "fp4", "int8")


@dataclass(frozen=True)
class Quantized:
    """What a quantization did; `errors` holds (weight, relative error), the worst first."""

    out: Path
    format: str
    layers: int
    bytes_before: int
    bytes_after: int
    errors: tuple[tuple[str, float], ...]

    def text(self) -> str:
        """The report that is printed."""
        mean = sum(error for _, error in self.errors) / max(1, len(self.errors))
        lines = [
            f"{self.layers} layers in {self.format}: {self.out}",
            f"size {bytes_text(self.bytes_before)} -> {bytes_text(self.bytes_after)} "
            f"({percent_text(self.bytes_after / self.bytes_before)})",
            f"relative error of a weight, measured on {len(self.errors)}: mean {percent_text(mean)}, largest:",
        ]
        return "\n".join([*lines, *(f"  {percent_text(error):>8}  {name}" for name, error in self.errors[:5])])


def quantize_to_folder(
    model: str, out: Path, *, format: str = "nf4", blocksize: int = 64, double_quant: bool = True, allow_download: bool = False
) -> Quantized:
    """Quantize a model while it is loaded and write the folder.  Raises ConfigError, ModelError, WeightError, StorageError."""
    if format not in FORMATS:
        raise ConfigError("this storage is not known", code="E-CONF-084", place="--format", found=format, expected=", ".join(FORMATS),
                          nothing_done="Nothing was written.")  # fmt: skip
    quant = make(QuantConfig, {"format": format, "blocksize": blocksize, "double_quant": double_quant}, "quant")
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
    loaded = load_model(source, quant=quant)
    layers = len(list(surgery.modules_of(loaded, lambda _, module: isinstance(module, (QuantLinear, QuantExperts)))))
    errors = relative_errors(loaded, source)
    save_quantized(loaded, load_tokenizer(source), out)
    worst = tuple(sorted(errors, key=lambda entry: -entry[1]))
    return Quantized(out, format, layers, folder.size_of(source.folder), folder.size_of(out), worst)


def relative_errors(model: nn.Module, source: Source) -> list[tuple[str, float]]:
    """(name, relative error) of each packed layer that stands under its name in the model's files."""
    found = []
    with safetensors_io.open_tensors(source.folder) as tensors:
        for name, layer in surgery.modules_of(model, lambda _, module: isinstance(module, QuantLinear)):
            if f"{name}.weight" not in tensors:  # under another name in the files, e.g. one expert of many
                continue
            original = tensors[f"{name}.weight"]
            gap = dense_weight(layer, torch.float32) - original.float()
            found.append((name, float(gap.norm() / original.float().norm().clamp_min(1e-30))))
    return found
