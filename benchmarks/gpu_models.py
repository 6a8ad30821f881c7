"""Models of published shapes with random weights, packed layer by layer on the device, so that the dense model never exists.

    python -m benchmarks.gpu_models SHAPE FOLDER DEVICE      write one as a model folder

Weights are normal with standard deviation 0.02, norms are one; nothing is downloaded.  Speed and memory depend on shapes, not on values.
"""

import sys
from pathlib import Path
from typing import Any

LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
ROPE = {"rope_type": "default", "rope_theta": 500000.0}  # the scaling of Llama 3.1 changes values, not speed
LLAMA_3 = {**LLAMA_2, "vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8}


def llama(hidden: int, inner: int, layers: int, heads: int, **more: object) -> dict[str, Any]:
    """Settings of a LlamaConfig."""
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


SHAPES = {
    "8b": llama(4096, 14336, 32, 32, **LLAMA_3, rope_parameters=ROPE),  # Llama-3.1-8B
    "7b": llama(4096, 11008, 32, 32, **LLAMA_2),  # Llama-2-7B
    "65b": llama(8192, 22016, 80, 64, **LLAMA_2),  # Llama-65B
    "1b": llama(2048, 8192, 16, 32, **LLAMA_3, rope_parameters=ROPE),  # Llama-3.2-1B, but with a head of its own
    "tiny": llama(64, 160, 2, 4, **{**LLAMA_3, "vocab_size": 512, "num_key_value_heads": 2}),
}
SEED = 0


def packed_model(shape: str, device: str, *, layers: int | None = None, double_quant: bool = True) -> Any:
    """A LlamaForCausalLM in eval mode on the device, linears of the backbone in NF4, the rest bfloat16."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from halfbyte import surgery
    from halfbyte.quant.linear import QuantLinear

    config = LlamaConfig(**{**SHAPES[shape], **({"num_hidden_layers": layers} if layers else {})})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(SEED)

    def drawn(like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02, generator=generator)

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(drawn(module.weight), requires_grad=False)
            packed = QuantLinear.from_linear(dense, "nf4", double_quant=double_quant, name=name)
            packed.dtype = torch.bfloat16
            surgery.replace(model, name, packed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device) if parameter.dim() == 1 else drawn(parameter)
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    surgery.replace(model, "model.rotary_emb", LlamaRotaryEmbedding(config).to(device))
    return model.eval()


def tokenizer_for(vocabulary: int) -> Any:
    """A tokenizer of numbered words, as large as the model's vocabulary: a model folder must have one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, vocabulary)}}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def write_folder(folder: Path, shape: str, device: str) -> Path:
    """The packed model as a folder in bitsandbytes' format, which everybody loads; written once."""
    if not (folder / "config.json").exists():
        from halfbyte.models.save import save_quantized

        model = packed_model(shape, device)
        save_quantized(model, tokenizer_for(model.config.vocab_size), folder)
    return folder


if __name__ == "__main__":
    write_folder(Path(sys.argv[2]), sys.argv[1], sys.argv[3])
