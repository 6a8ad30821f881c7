"""RunConfig -> a model ready to train: the one place where full, LoRA and QLoRA differ.

| method | base                   | trained          |
|--------|------------------------|------------------|
| full   | dense                  | every parameter  |
| lora   | dense                  | adapters         |
| qlora  | packed (quant.format)  | adapters         |
"""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.config.run import RunConfig
from halfbyte.data.templates import from_tokenizer
from halfbyte.devices import compute_device
from halfbyte.lora.inject import Injected, inject, total_parameters
from halfbyte.models.calibrated_base import read_start
from halfbyte.models.heads import settle_padding
from halfbyte.models.load import choose_dtype, load_model, load_tokenizer
from halfbyte.models.packed_folder import settled
from halfbyte.models.packing_probe import require_separate
from halfbyte.models.source import Source, resolve
from halfbyte.models.structure import Fused, fuse
from halfbyte.surgery import trainable

NOT_FUSED = Fused(0, 0, "not asked for")


@dataclass(frozen=True)
class Assembled:
    """What training starts from.

    weight_bytes  of all parameters and buffers as they lie in memory, shared ones once
    dtype_reason  why the base has the dtype it has
    fused         which decoder layers run on own ops
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    injected: Injected | None
    trainable_params: int
    total_params: int
    weight_bytes: int
    dtype: str = "float32"
    dtype_reason: str = ""
    fused: Fused = NOT_FUSED


def assemble(config: RunConfig, *, for_training: bool = True, base: Path | None = None) -> Assembled:
    """Load the base as the config says, put adapters in where the method has them, and set what trains.

    `base` is the calibrated folder that stands in for the model (quant.calibrate).  With for_training=False nothing asks for a
    gradient.  Raises UnsupportedError for packed rows on a model that mixes their samples.
    """
    assert config.method != "auto"  # a plan has chosen (plan/decide.py)
    if base is None:
        source = resolve(config.model.name, revision=config.model.revision, allow_download=config.model.allow_download)
        config = settled(config, source.folder)
    else:
        source = replace(resolve(str(base)), name=config.model.name)
    quant = config.quant.model_copy(update={"format": config.quant_format})
    dtype, reason = choose_dtype(config.model.dtype)
    # LoftQ quantizes the dense layers itself, together with their factors; a calibrated base is as it lies.
    at_load = None if base is not None or (config.method != "full" and config.lora.init == "loftq") else quant
    model = load_model(
        source, dtype=config.model.dtype, quant=at_load, task=config.model.task, labels=config.model.labels,
        attention=config.model.attention,
    )  # fmt: skip
    model.to(compute_device(config.model.device))  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    tokenizer = load_tokenizer(source)
    if config.model.template is not None:  # what is written later carries the template it was trained with
        tokenizer.chat_template = from_tokenizer(tokenizer, config.model.template).source
    if config.model.task == "sequence-classification":
        settle_padding(model, tokenizer)
    begun = read_start(model, source.folder, config.lora) if config.method != "full" and config.lora.init == "calibrated" else None
    injected = None if config.method == "full" else inject(model, config.lora, seed=config.train.seed, quant=quant, begun=begun)
    if injected is None:
        model.requires_grad_(True)
    if not for_training:
        model.requires_grad_(False)
    fused = fuse(model) if config.model.layers == "auto" else Fused(0, 0, "model.layers is original")
    if config.data.packing and for_training:
        require_separate(model)
    model.train(for_training)
    trained = sum(parameter.numel() for _, parameter in trainable(model))
    total = total_parameters(model)
    name = str(dtype).removeprefix("torch.")
    return Assembled(model, tokenizer, source, injected, trained, total, weight_bytes(model), name, reason, fused)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, a storage that several names share counted once."""
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(held.values())
