"""A source -> a transformers model, dense or packed, and its tokenizer.

Weights stream from the memory-mapped files; a layer to be packed is packed as its tensor arrives, so the most memory held is the
result and about two tensors.  A folder that transformers + bitsandbytes saved in 4 or 8 bits is read into the same layers.
What this does not do: run code from the folder, read pickles, reach the network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from halfbyte import host
from halfbyte.config.quant import QuantConfig
from halfbyte.errors import ConfigError, DoesNotFitError, ModelError, UnsupportedError, WeightError
from halfbyte.formats import bnb4bit
from halfbyte.formats.safetensors_io import TensorInfo
from halfbyte.log import logger
from halfbyte.models import folder_checks, rope
from halfbyte.models.packed_folder import packed_layers, require_agreement, storage_of
from halfbyte.models.packed_values import require_values
from halfbyte.models.quantizer import LoadConfig, wrong_shape
from halfbyte.models.source import Source, resolve
from halfbyte.models.transformers_calls import plain_exceptions, quiet
from halfbyte.quant.experts import QuantExperts
from halfbyte.quant.linear import QuantLinear
from halfbyte.shape import require_readable
from halfbyte.units import bytes_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MAPPINGS: dict[str, Any] = {"causal-lm": MODEL_FOR_CAUSAL_LM_MAPPING, "sequence-classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING}


def choose_dtype(dtype: str = "auto") -> tuple[torch.dtype, str]:
    """(dtype, why): "auto" is bfloat16 where the machine multiplies it natively, float32 elsewhere.  Raises ConfigError."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(
                "a model computes in one of two types", code="E-CONF-089", place="dtype", found=str(dtype),
                expected="auto, float32, bfloat16",
            )  # fmt: skip
        return DTYPES[dtype], "asked for"
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU multiplies bfloat16 natively"
        return torch.float32, "this GPU has no native bfloat16"
    native = host.native_bf16()
    if native:
        return torch.bfloat16, f"this processor multiplies bfloat16 natively ({native})"
    return torch.float32, "this processor has no native bfloat16"


def load_model(
    source: Source | str | Path, *, dtype: str = "auto", quant: QuantConfig | None = None, task: str = "causal-lm",
    labels: Sequence[str] = (), attention: str = "sdpa",
) -> PreTrainedModel:  # fmt: skip
    """The model in eval mode; raises ModelError or WeightError before or while loading, each naming file, tensor or key.

    dtype   of what is not packed, and of the values that packed weights are read back as: "auto", "float32" or "bfloat16"
    quant   None: as the folder has it; format "none": dense; else every matrix of the backbone is packed while it arrives.  A packed
            folder keeps its storage: what was set to something else is refused
    labels  names of the classes, for task "sequence-classification"
    """
    folder = as_source(source).folder
    raw = folder_checks.read_config(folder)
    folder_checks.check_architecture(raw, folder, task)
    require_readable(raw, str(folder / "config.json"))
    tensors = folder_checks.check_weight_files(folder)
    config = folder_checks.make_config(raw, folder)
    if task == "sequence-classification":
        _set_labels(config, labels)
    chosen, _ = choose_dtype(dtype)
    packing = _packing(raw, quant, tensors, folder)
    model = _from_pretrained(folder, config, task, chosen, attention, packing)
    if packing is not None and not any(isinstance(module, (QuantLinear, QuantExperts)) for module in model.modules()):
        raise UnsupportedError(
            "a model to be quantized must have layers that can be packed", code="E-UNSUP-048", place=str(folder),
            found=f"{type(model).__name__} has none of the known kinds", expected="linear layers or fused experts",
            remedy="use the model without quantization: --quant none, method=lora", nothing_done="Nothing was loaded.",
        )  # fmt: skip
    if packing is not None:
        require_values(model, packing.report.written, folder)
    _check_finite(model)
    rope.restore(model)
    host.drop_mapped_pages(folder.glob("*.safetensors"))  # weights in use come back; the rest was packed or cast
    return model


def as_source(source: Source | str | Path) -> Source:
    """A Source as it is; a name or path resolved without downloads."""
    return source if isinstance(source, Source) else resolve(str(source))


def _set_labels(config: PretrainedConfig, labels: Sequence[str]) -> None:
    names = list(labels) or [str(name) for name in (config.id2label or {}).values()]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "single_label_classification"


def _packing(raw: dict[str, object], quant: QuantConfig | None, tensors: dict[str, TensorInfo], folder: Path) -> LoadConfig | None:
    """How weights are packed on the way in; None for a dense load."""
    wanted = None if quant is None or quant.format == "none" else quant
    block = raw.get("quantization_config")
    if isinstance(block, dict):
        stored = storage_of(folder)
        if quant is not None and stored is not None:
            require_agreement(quant, stored, folder)
        have = bnb4bit.read_quantization_config(block)
        made = LoadConfig(have.format, 64, have.double_quant)
        made.stored = packed_layers(list(tensors))
        return made
    if wanted is None:
        return None
    named = "nf4" if wanted.format == "auto" else wanted.format
    made = LoadConfig(named, wanted.blocksize, wanted.double_quant, wanted.skip, wanted.quantize_head)
    made.report.files = sorted(folder.glob("*.safetensors"))
    return made


def _from_pretrained(
    folder: Path, config: PretrainedConfig, task: str, dtype: torch.dtype, attention: str, packing: LoadConfig | None
) -> PreTrainedModel:
    kind = _MAPPINGS[task][type(config)]
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None  # 5.17 and 5.20 drop the cap without a word
    if attention == "sdpa" and (capped or not kind._supports_sdpa):
        logger().info("%s has no fused attention that computes all of it; the eager one is used", kind.__name__)
        attention = "eager"
    options: dict[str, Any] = {}
    if packing is not None and packing.stored:
        config.quantization_config = packing.carried()
    elif packing is not None:
        options["quantization_config"] = packing
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a new classification head is the same each time
            model, report = kind.from_pretrained(
                folder, config=config, dtype=dtype, attn_implementation=attention, local_files_only=True, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    except (RuntimeError, ValueError, KeyError, ImportError, OSError, MemoryError) as fault:
        if packing is not None and packing.report.fault is not None:
            raise packing.report.fault from None
        if host.is_out_of_memory(fault):
            raise _does_not_fit(fault, folder) from fault
        raise ModelError(
            "transformers must be able to load this folder", code="E-MODEL-011", place=str(folder),
            found=_brief(fault, folder),
            remedy="compare config.json and the weights with the original model's",
        ) from fault  # fmt: skip
    _check_report(model, report, task)
    return model


def _does_not_fit(fault: BaseException, folder: Path) -> DoesNotFitError:
    total, available = host.memory_bytes()
    return DoesNotFitError(
        "a model's weights must fit into memory", code="E-FIT-403", place=str(folder), found=_brief(fault, folder),
        expected=f"more than what is left: {bytes_text(available)} of {bytes_text(total)}",
        remedy="see what fits with `halfbyte plan`; a limit of the shell is shown by `ulimit -v`", nothing_done="Nothing was loaded.",
    )  # fmt: skip


def _check_report(model: PreTrainedModel, report: dict[str, object], task: str) -> None:
    """Refuse what transformers would fill with random numbers or drop."""
    for name, found, expected in sorted(report["mismatched_keys"]):  # type: ignore[call-overload]
        raise wrong_shape(name, tuple(found), tuple(expected))
    prefix = f"{model.base_model_prefix}."
    new_head = task == "sequence-classification"
    missing = sorted(name for name in report["missing_keys"] if not new_head or name.startswith(prefix))  # type: ignore[attr-defined]
    if missing:
        raise WeightError(
            "every tensor of the model must be in its files", code="E-WEIGHT-053", place=f"tensor {missing[0]}",
            found=f"missing, with {len(missing) - 1} more" if len(missing) > 1 else "missing",
            remedy="fetch the model again; a shard may be incomplete",
        )  # fmt: skip
    surplus = sorted(name for name in report["unexpected_keys"] if not new_head or name.startswith(prefix))  # type: ignore[attr-defined]
    if surplus:
        raise WeightError(
            "every tensor in the files must belong to the model", code="E-WEIGHT-054", place=f"tensor {surplus[0]}",
            found=f"unknown to the model, with {len(surplus) - 1} more" if len(surplus) > 1 else "unknown to the model",
            remedy="config.json may describe a smaller model than the files hold",
        )  # fmt: skip


def _check_finite(model: nn.Module) -> None:
    """Refuse NaN and infinity in what was not packed (the packer refuses its own); no temporary of a tensor's size."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        low, high = torch.aminmax(parameter.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            count = int(sum((~torch.isfinite(part)).sum() for part in parameter.detach().reshape(-1).split(1 << 22)))
            raise WeightError(
                "weights must be finite numbers", code="E-WEIGHT-055", place=f"tensor {name}",
                found=f"{count} of {parameter.numel()} are NaN or infinite",
                remedy="the file is damaged or its training diverged; fetch it again or use another model",
            )  # fmt: skip


def load_tokenizer(source: Source | str | Path) -> PreTrainedTokenizerBase:
    """The source's tokenizer, checked against the model's vocabulary; raises ModelError.

    Its padding token is the model's own where it has one, else the end token; it serves padding only, never a label.
    """
    found = as_source(source)
    raw = folder_checks.read_config(found.folder)
    folder_checks.check_tokenizer_files(found.folder)
    try:
        with quiet(), plain_exceptions():
            tokenizer = AutoTokenizer.from_pretrained(found.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as fault:
        raise ModelError(
            "the folder must hold a tokenizer that transformers can read", code="E-MODEL-031", place=str(found.folder),
            found=_brief(fault, found.folder),
            remedy="copy tokenizer.json and tokenizer_config.json beside the weights",
        ) from fault  # fmt: skip
    folder_checks.check_vocabulary(tokenizer, raw, found.folder)
    return tokenizer


def _brief(fault: BaseException, folder: Path) -> str:
    """The first 200 characters of another library's error, the folder by its name."""
    text = " ".join(str(fault).replace(str(folder), folder.name).split())
    if "trust_remote_code" in text:
        return "the folder asks for code of its own to be run, which is never done"
    return f"{type(fault).__name__}: {text[:200]}"


def token_limit(source: Source | str | Path) -> int | None:
    """Positions the model was made for; None where its config does not say."""
    raw = folder_checks.read_config(as_source(source).folder)
    text = raw.get("text_config")
    tables = [text, raw] if isinstance(text, dict) else [raw]
    values = [table.get(key) for table in tables for key in ("max_position_embeddings", "n_positions")]
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def task_of_folder(source: Source | str | Path) -> str:
    """What a model folder was saved as: sequence-classification where its config names such an architecture, else causal-lm."""
    named = folder_checks.read_config(as_source(source).folder).get("architectures")
    classifies = isinstance(named, list) and any(str(name).endswith("ForSequenceClassification") for name in named)
    return "sequence-classification" if classifies else "causal-lm"
