"""A checked GGUF file -> a folder of safetensors, config, tokenizer, chat template and generation config.

transformers reads the blocks and knows each architecture's names.  The model it returns carries a GGUF entry in its config and
refuses to be saved, so its tensors are put into a fresh model built from the config without that entry.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.errors import ModelError
from halfbyte.models.transformers_calls import plain_exceptions, quiet

STORED_DTYPE = torch.bfloat16  # why: models/source.py


def convert_gguf(gguf: Path, made: Path) -> None:
    """Write the model in `gguf` to the empty folder `made`; raises ModelError for what transformers cannot read."""
    options: dict[str, object] = {}
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is not None:  # newer versions would otherwise keep the blocks where a kernel for them is installed
        options["quantization_config"] = gguf_config(dequantize=True)
    try:
        with quiet(), plain_exceptions():
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError, ImportError) as fault:
        raise ModelError(
            "this GGUF file holds a model that cannot be converted", code="E-MODEL-021", place=gguf.name,
            found=f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}", remedy="use the model's safetensors folder instead",
        ) from fault  # fmt: skip
    config = type(model.config).from_dict({key: value for key, value in model.config.to_dict().items() if key != "quantization_config"})
    config.dtype = STORED_DTYPE
    with torch.device("meta"):
        fresh = type(model)(config)
    tensors = {name: tensor.to(STORED_DTYPE) if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    fresh.load_state_dict(tensors, assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    if tokenizer.model_max_length > 1 << 30:
        tokenizer.model_max_length = config.max_position_embeddings
    with quiet():
        fresh.save_pretrained(made)
        tokenizer.save_pretrained(made)
    _drop_tokens_without_rows(made / "tokenizer.json", config.vocab_size)


def _drop_tokens_without_rows(path: Path, rows: int) -> None:
    """transformers adds an end-of-text token of its own to some GGUF vocabularies; the model has no row for it."""
    held = json.loads(path.read_text(encoding="utf-8"))
    held["added_tokens"] = [token for token in held["added_tokens"] if token["id"] < rows]
    path.write_text(json.dumps(held, ensure_ascii=False, indent=2), encoding="utf-8")
