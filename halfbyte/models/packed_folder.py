"""A model folder that is already packed: what it holds, and whether that is what was asked for.

Formats, block sizes and the choice of layers were decided when the folder was written; loading reads them as they are.  A setting that
somebody wrote down and that says something else is refused, because it would change nothing.  Defaults follow the folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.config.quant import QuantConfig
from halfbyte.config.run import RunConfig
from halfbyte.errors import ModelError
from halfbyte.formats import bnb4bit, safetensors_io
from halfbyte.models import folder_checks

SETTINGS = ("format", "blocksize", "double_quant", "skip", "quantize_head")


def packed_layers(tensors: Sequence[str]) -> list[str]:
    """Names of the layers whose packed weight is among the names of a folder's tensors."""
    return sorted(name.removesuffix(end) for name in tensors for end in (".weight.absmax", ".SCB") if name.endswith(end))


def storage_of(folder: Path) -> QuantConfig | None:
    """How the folder's layers are packed; None where they are not.  Raises ModelError and WeightError."""
    block = folder_checks.read_config(folder).get("quantization_config")
    if not isinstance(block, dict):
        return None
    have = bnb4bit.read_quantization_config(block)
    made: dict[str, Any] = {"format": have.format}
    with safetensors_io.open_tensors(folder) as tensors:
        layers = packed_layers(list(tensors))
        if have.format != "int8" and layers:  # rows of 8 bits have neither of these
            made |= {"double_quant": have.double_quant, "blocksize": bnb4bit.blocksize_of(f"{layers[0]}.weight", tensors)}
    if any(name.rpartition(".")[2] == "lm_head" for name in layers):
        made["quantize_head"] = True
    return QuantConfig.model_construct(**{**dict(QuantConfig()), **made})  # unchecked: other programs' block sizes need not be settings


def require_agreement(asked: QuantConfig, have: QuantConfig, folder: Path) -> None:
    """Raise ModelError unless each setting that was written down in `asked` is what the folder has."""
    written = [name for name in SETTINGS if name in asked.model_fields_set and getattr(asked, name) != "auto"]
    wrong = [name for name in written if getattr(asked, name) != getattr(have, name)]
    if not wrong:
        return

    def listed(config: QuantConfig) -> str:
        return ", ".join(f"quant.{name}={_text(getattr(config, name))}" for name in wrong)

    raise ModelError(
        "a folder that is already packed keeps its storage", code="E-MODEL-042", place=str(folder),
        found=f"{have.format}, asked for {listed(asked)}", expected=listed(have),
        remedy="leave these settings out, or load the model's 16-bit folder", nothing_done="Nothing was loaded.",
    )  # fmt: skip


def settled(config: RunConfig, folder: Path) -> RunConfig:
    """The run's settings with the storage that its base really has, or gets.  Raises ModelError where they contradict each other."""
    have = storage_of(folder)
    if have is None:
        _require_own_head(config.quant, folder)
        return config
    if config.method != "qlora":
        raise ModelError(
            "a packed folder serves method qlora only", code="E-MODEL-044", place=str(folder),
            found=f"method {config.method} with a base in {have.format}", expected="method qlora",
            remedy="set method=qlora, or name the model's 16-bit folder", nothing_done="Nothing was trained.",
        )  # fmt: skip
    if config.quant.calibrate is True:
        raise ModelError(
            "a base is calibrated while it is quantized, from 16 or 32 bits", code="E-MODEL-046", place=str(folder),
            found=f"a folder that is already in {have.format}, with quant.calibrate=true", expected="the model's 16-bit folder",
            remedy="set quant.calibrate=false (lora.init=calibrated if it has a start), or name the 16-bit folder",
            nothing_done="Nothing was trained.",
        )  # fmt: skip
    require_agreement(config.quant, have, folder)
    return config.model_copy(update={"quant": have})


def _require_own_head(quant: QuantConfig, folder: Path) -> None:
    """Raise ModelError where the head is to be quantized and is the embedding, which is looked up by rows and stays as it is."""
    if quant.quantize_head and folder_checks.make_config(folder_checks.read_config(folder), folder).get_text_config().tie_word_embeddings:
        raise ModelError(
            "only an output head with weights of its own can be quantized", code="E-MODEL-049", place=f"quant.quantize_head, {folder}",
            found="quant.quantize_head=true with a model whose head is its embedding (tie_word_embeddings)",
            expected="quant.quantize_head=false", remedy="leave quant.quantize_head out", nothing_done="Nothing was trained.",
        )  # fmt: skip


def _text(value: object) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value).lower()
