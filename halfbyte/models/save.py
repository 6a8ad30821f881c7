"""A model folder that plain transformers loads: weights, config, generation config, tokenizer, chat template, end tokens.

    dense      every parameter as it is, names and layouts as in the original files
    packed     each QuantLinear as bitsandbytes' tensors, the rest dense; fused experts are written dense, for bitsandbytes has no
               format for them

A tensor that two names share is written once where the config ties them (transformers ties them again on loading), and twice where it
does not.  The folder appears whole or not at all: it is written beside its place and renamed.
"""

import copy
import errno
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from halfbyte.errors import ModelError, StorageError
from halfbyte.formats import bnb4bit, safetensors_io
from halfbyte.models.generate import stop_ids
from halfbyte.models.quantizer import LoadConfig
from halfbyte.quant.dense import is_conv1d
from halfbyte.quant.dense_experts import dense_fused
from halfbyte.quant.experts import QuantExperts
from halfbyte.quant.linear import QuantLinear

SHARD_BYTES = 4 << 30


def save_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str, *, over: bool = True) -> Path:
    """Write a model without packed layers and adapters; returns the folder.  Raises ModelError, StorageError.

    over  whether a model folder that is there may be replaced
    """
    packed = [name for name, module in model.named_modules() if isinstance(module, (QuantLinear, QuantExperts))]
    if packed:
        raise ModelError(
            "only a dense model is written densely", code="E-MODEL-050", place=packed[0], found=f"{len(packed)} packed layers",
            remedy="merge first, or write it with save_quantized",
        )  # fmt: skip
    _refuse_adapters(model)
    return _write(model, tokenizer, Path(folder), _reverted(model, _unshared(model)), _config(model), over)


def save_quantized(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str, *, over: bool = True) -> Path:
    """Write a packed model in bitsandbytes' format, which transformers + bitsandbytes loads with equal dequantized bits.

    over  whether a model folder that is there may be replaced
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    formats = {module.format for module in layers.values()}
    if len(formats) != 1:
        raise ModelError(
            "a packed folder has one format", code="E-MODEL-051", place="model", found=", ".join(sorted(formats)) or "no packed layer",
            expected="nf4, fp4 or int8", remedy="load the model with quant first",
        )  # fmt: skip
    _refuse_adapters(model)
    tensors = _unshared(model)
    for name, layer in layers.items():
        for key, _ in layer.named_buffers(recurse=False):
            tensors.pop(f"{name}.{key}")
        tensors.update(bnb4bit.to_named_tensors(f"{name}.weight", layer.packed, layer.state))
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts):
            _put_dense(tensors, name, module)
    first = next(iter(layers.values()))
    config = _config(model)
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear or is_conv1d(module)]
    config.quantization_config = bnb4bit.quantization_config_json(
        first.format, double_quant=first.absmax2 is not None, compute_dtype=first.compute_dtype or first.dtype, skip=tuple(dense)
    )
    return _write(model, tokenizer, Path(folder), _reverted(model, tensors), config, over)


def _put_dense(tensors: dict[str, Tensor], name: str, module: QuantExperts) -> None:
    """In place of a packed module's buffers, its fused parameters in the stock layout."""
    for key, _ in list(module.named_buffers(recurse=False)):
        tensors.pop(f"{name}.{key}", None)
    for key in module.shapes:
        fused = dense_fused(module, key)
        tensors[f"{name}.{key}"] = fused.transpose(1, 2).contiguous() if module.is_transposed else fused


def _refuse_adapters(model: nn.Module) -> None:
    found = [name for name, module in model.named_modules() if type(module).__module__.startswith("halfbyte.lora")]
    if found:
        raise ModelError(
            "a model folder holds no adapter", code="E-MODEL-052", place=found[0], found=f"{len(found)} adapted modules",
            remedy="save it as an adapter folder, or take it out: hb.eject(model)",
        )  # fmt: skip


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each shared storage named once where the config ties it, and copied where it does not."""
    tied = bool(model.config.get_text_config().tie_word_embeddings)  # type: ignore[union-attr, operator]
    targets = set(getattr(model, "all_tied_weights_keys", {}))
    kept: dict[str, Tensor] = {}
    seen: dict[tuple[int, int, tuple[int, ...]], str] = {}
    state = model.state_dict()
    for name in sorted(state, key=lambda one: one in targets):  # sources before their aliases
        tensor = state[name]
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            if tied and name in targets:
                continue
            tensor = tensor.clone()
        seen.setdefault(place, name)
        kept[name] = tensor
    return {name: kept[name] for name in state if name in kept}


def _reverted(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and layouts as in the files the model came from (experts apart again); other names stay."""
    report = getattr(getattr(model.config, "quantization_config", None), "report", None)
    if report is None or not report.renaming:
        return revert_weight_conversion(model, tensors)
    return revert_weight_conversion(_Renaming(model, report.renaming), tensors)  # type: ignore[arg-type]


class _Renaming:
    """What `revert_weight_conversion` asks of a model: its conversions and its config."""

    def __init__(self, model: PreTrainedModel, renaming: list[object]) -> None:
        self._weight_conversions, self.config, self.base_model_prefix = renaming, model.config, model.base_model_prefix


def _config(model: PreTrainedModel) -> PretrainedConfig:
    """A copy of the model's config for the new folder."""
    config = copy.deepcopy(model.config)
    if isinstance(getattr(config, "quantization_config", None), LoadConfig):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    return config


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, tensors: Mapping[str, Tensor], config: PretrainedConfig,
    over: bool,
) -> Path:  # fmt: skip
    """All files into a new folder beside `folder`, then the rename; where `over`, an older model folder of that name is replaced."""
    if over and folder.exists() and not _replaceable(folder):
        raise StorageError(
            "a model is written to a new folder, or over a model folder", code="E-STORE-050", place=str(folder), found="other files in it",
            remedy="name another folder", nothing_done="Nothing was written.",
        )  # fmt: skip
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            staging = Path(temporary) / "new"
            staging.mkdir()
            safetensors_io.save_sharded(staging, tensors, SHARD_BYTES, {"format": "pt"})
            config.save_pretrained(staging)
            _write_generation(model, tokenizer, staging)
            tokenizer.save_pretrained(staging)
            move_in(staging, folder, Path(temporary) / "old", over=over)
    except OSError as fault:
        raise StorageError(
            "the model folder must be writable and have room", code="E-STORE-051", place=str(folder),
            found=f"{type(fault).__name__}: {fault.strerror or fault}", remedy="free some space, or name another folder",
        ) from fault  # fmt: skip
    return folder


def move_in(made: Path, folder: Path, aside: Path, *, over: bool) -> None:
    """Give `made` the name `folder`.  Where `over`, what is there is moved `aside`, and back if that fails; else it is never touched.

    Raises OSError, and StorageError for files that came to `folder` in the meantime.
    """
    if over and folder.exists():
        folder.rename(aside)
    try:
        made.rename(folder)  # the system refuses a folder with files in it, so of two that write at once the second is told
    except OSError as fault:
        if aside.exists():
            aside.rename(folder)
        if over or fault.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise StorageError(
            "an export never overwrites", code="E-STORE-052", place=str(folder), found="something that was not there at the beginning",
            remedy="keep what is there, or name another folder with --out", nothing_done="Nothing was written.",
        ) from fault  # fmt: skip


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))


def _write_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, staging: Path) -> None:
    """generation_config.json with every id that ended answers here, so that they end the same elsewhere."""
    if getattr(model, "generation_config", None) is None:
        return
    settings = copy.deepcopy(model.generation_config)
    stops = stop_ids(model, tokenizer)
    settings.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    (staging / "generation_config.json").write_text(settings.to_json_string(use_diff=True), encoding="utf-8")
