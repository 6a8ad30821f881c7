"""A model folder, judged before transformers sees it: config.json, weight files, tokenizer files.

A model comes from a stranger.  So: the architecture must be one that transformers itself implements, no code of the folder runs, keys of
config.json that could choose code, files or kernels are dropped, and the headers of all weight files are read with limits and
compared with the index.  What this does not do: judge values; models/load.py looks at the loaded weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from halfbyte.errors import ModelError, WeightError, nearest
from halfbyte.formats.safetensors_io import INDEX, TensorInfo, read_header, weight_files
from halfbyte.log import logger

TASKS: dict[str, Mapping[str, str]] = {
    "causal-lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "sequence-classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
CONFIG_BYTES = 1 << 20
MAX_LAYERS = 1000
# keys with which a config could choose code, another file, or a kernel to download
CODE_KEYS = frozenset({
    "auto_map", "custom_pipelines", "trust_remote_code", "transformers_weights", "fusion_config", "distributed_config", "kernel_config",
    "use_kernels", "attn_implementation", "experts_implementation", "adapter_path", "name_or_path",
})  # fmt: skip
SPECIAL_FLOATS = ("Infinity", "-Infinity", "NaN")


def read_config(folder: Path) -> dict[str, object]:
    """config.json of `folder` without the keys that are never honoured; raises ModelError."""
    path = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            "a model folder is needed here, and this one holds an adapter", code="E-MODEL-004", place=str(folder),
            found="adapter_config.json",
            remedy="name the base model as the model, and this folder as the adapter",
        )  # fmt: skip
    if not path.is_file():
        raise ModelError(
            "a model folder must hold config.json", code="E-MODEL-005", place=str(folder), found=_listing(folder),
            expected="config.json, model.safetensors, tokenizer.json", remedy="name the folder that holds config.json",
        )  # fmt: skip
    if path.stat().st_size > CONFIG_BYTES:
        raise _bad_config(path, f"{path.stat().st_size:,} bytes", f"at most {CONFIG_BYTES:,}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as fault:
        raise _bad_config(path, str(fault).splitlines()[0], "JSON") from fault
    if not isinstance(raw, dict):
        raise _bad_config(path, type(raw).__name__, "a JSON object")
    return _stripped(raw, folder.name)


def _stripped(raw: dict[str, object], where: str) -> dict[str, object]:
    """`raw` without private keys and CODE_KEYS, at every depth."""
    kept: dict[str, object] = {}
    for key, value in raw.items():
        if key.startswith("_") or key in CODE_KEYS:
            if key in CODE_KEYS:
                logger().info("%s: config key %s is not honoured", where, key)
            continue
        plain = _decoded(value)
        kept[key] = _stripped(plain, where) if isinstance(plain, dict) and key != "quantization_config" else plain
    return kept


def _decoded(value: object) -> object:
    """`value` with the numbers that transformers writes as {"__float__": "Infinity"}, which JSON has no word for."""
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    return float(value["__float__"]) if isinstance(value, dict) and value.get("__float__") in SPECIAL_FLOATS else value


def _bad_config(path: Path, found: str, expected: str) -> ModelError:
    return ModelError("config.json must be readable", code="E-MODEL-006", place=str(path), found=found, expected=expected)


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "an empty folder"


def check_architecture(raw: Mapping[str, object], folder: Path, task: str) -> str:
    """The model_type, once it is known to be one that transformers implements for `task`; raises ModelError."""
    place = f"{folder / 'config.json'}, key model_type"
    kind, mapping = raw.get("model_type"), TASKS[task]
    if not isinstance(kind, str) or kind not in mapping:
        raise ModelError(
            f"the architecture must be one that transformers implements for {task}", code="E-MODEL-007", place=place, found=repr(kind),
            expected=f"one of {len(mapping)} types: llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, granite, mixtral, gpt2 ...",
            remedy=_code_note(folder) or nearest(str(kind), mapping) or "choose a model that transformers implements",
        )  # fmt: skip
    named = raw.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    allowed = {name for name in (causal, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(kind)) if name}
    multimodal = (causal or "").endswith("ForConditionalGeneration")
    if (first is not None and first not in allowed) or multimodal:
        raise ModelError(
            "only text decoders can be trained here", code="E-MODEL-008", place=f"{folder / 'config.json'}, key architectures",
            found=str(first or causal), expected=f"a text model, such as {'LlamaForCausalLM' if multimodal or first == causal else causal}",
            remedy="encoders, vision and speech models are not served; choose a text model that writes",
        )  # fmt: skip
    return kind


def _code_note(folder: Path) -> str:
    """What to say of a folder that brings a model class of its own."""
    code = sorted(path.name for path in folder.glob("*.py"))
    return f"the folder's own code ({code[0]}) is never run; choose a model that transformers implements" if code else ""


def make_config(raw: Mapping[str, object], folder: Path) -> PretrainedConfig:
    """transformers' config object of the checked `raw`; raises ModelError naming the field that it refuses."""
    values = {key: value for key, value in raw.items() if key not in ("quantization_config", "architectures")}
    layers = values.get("num_hidden_layers", values.get("n_layer", 1))
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        raise _bad_value(folder, "num_hidden_layers", layers, f"1 to {MAX_LAYERS}")
    for kind in _rope_types(values):
        if kind not in ROPE_TYPES:
            raise _bad_value(folder, "rope_type", kind, ", ".join(sorted(ROPE_TYPES)))
    try:
        return CONFIG_MAPPING[str(values["model_type"])].from_dict(values)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as fault:
        raise ModelError(
            "config.json must describe a model that can be built", code="E-MODEL-010", place=str(folder / "config.json"),
            found=" ".join(str(fault).split())[:300] or type(fault).__name__, remedy="compare the file with the original model's",
        ) from fault  # fmt: skip


ROPE_TYPES = {"default", *ROPE_INIT_FUNCTIONS}


def _rope_types(values: Mapping[str, object]) -> list[object]:
    """Every rope_type named anywhere in the config, also by its old name."""
    found: list[object] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _rope_types(value)
            if key == "rope_scaling" and "rope_type" not in value and "type" in value:
                found.append(value["type"])
        elif key == "rope_type":
            found.append(value)
    return [kind for kind in found if kind is not None]


def _bad_value(folder: Path, key: str, found: object, expected: str) -> ModelError:
    return ModelError(
        "each value of config.json must be one that a model can have", code="E-MODEL-012", place=f"{folder / 'config.json'}, key {key}",
        found=repr(found), expected=expected, remedy="compare the file with the original model's",
    )  # fmt: skip


def check_weight_files(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder by name, from checked headers that agree with the index; raises WeightError."""
    found: dict[str, TensorInfo] = {}
    where: dict[str, str] = {}
    for path in weight_files(folder):
        for name, info in read_header(path).tensors.items():
            found[name], where[name] = info, path.name
    if (folder / INDEX).exists():
        promised = json.loads((folder / INDEX).read_text())["weight_map"]
        absent = [name for name, file in promised.items() if where.get(name) != file]
        if absent:
            raise WeightError(
                "every tensor of the index must be in the file it names", code="E-WEIGHT-050",
                place=f"{folder / INDEX}, tensor {absent[0]}",
                found=f"not in {promised[absent[0]]} ({len(absent)} such)", remedy="copy the shards and their index again, together",
            )  # fmt: skip
    return found


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def check_tokenizer_files(folder: Path) -> None:
    """A tokenizer must lie beside the weights and bring no code; raises ModelError."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            "a model folder must hold its tokenizer", code="E-MODEL-030", place=str(folder), found=_listing(folder),
            expected=", ".join(TOKENIZER_FILES[:2]), remedy="copy tokenizer.json and tokenizer_config.json from the original model",
        )  # fmt: skip


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, raw: Mapping[str, object], folder: Path) -> None:
    """Every id the tokenizer can give must have a row in the embedding; the padding token is settled.  Raises ModelError."""
    text = raw.get("text_config")
    rows = (text if isinstance(text, dict) else raw).get("vocab_size")
    ids = tokenizer.get_vocab().values()
    if not isinstance(rows, int) or (ids and max(ids) >= rows):
        raise ModelError(
            "every token needs a row in the embedding", code="E-MODEL-032", place=str(folder),
            found=f"highest token id {max(ids, default=0)}", expected=f"below vocab_size {rows} of config.json",
            remedy="tokenizer and weights belong to different models, or tokens were added to one only",
        )  # fmt: skip
    pad = raw.get("pad_token_id")
    if isinstance(pad, int) and not 0 <= pad < rows and pad != -1:
        raise ModelError(
            "the padding token must be a token", code="E-MODEL-033", place=f"{folder / 'config.json'}, key pad_token_id", found=str(pad),
            expected=f"0 to {rows - 1}", remedy="set it to the id of the end token",
        )  # fmt: skip
    if tokenizer.pad_token_id is None:
        named = tokenizer.convert_ids_to_tokens(pad) if isinstance(pad, int) and pad >= 0 else None
        tokenizer.pad_token = named or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "a tokenizer must know a token to pad with", code="E-MODEL-034", place=str(folder), found="neither pad_token nor eos_token",
            remedy="name one in tokenizer_config.json",
        )  # fmt: skip
