"""Small model folders for the tests of this unit: random weights, a tokenizer made in the test, nothing fetched."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from halfbyte.models.source import Source

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """257 + 3 tokens: pad 0, bos 1, end 2, then one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: number + 3 for number, letter in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT, model_max_length=512
    )


def llama_config(**settings: Any) -> Any:
    """A Llama of width 64 with two layers."""
    from transformers import LlamaConfig

    values = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320, "max_position_embeddings": 512, "tie_word_embeddings": False, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaConfig(**values | settings)


def mixtral_config(**settings: Any) -> Any:
    """A Mixtral of width 64, two layers, four experts."""
    from transformers import MixtralConfig

    values = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return MixtralConfig(**values | settings)


def gpt2_config(**settings: Any) -> Any:
    """A GPT-2 of width 64 with two layers."""
    from transformers import GPT2Config

    values = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2Config(**values | settings)


CONFIGS = {"llama": llama_config, "mixtral": mixtral_config, "gpt2": gpt2_config}


def make_model(kind: str = "llama", **settings: Any) -> PreTrainedModel:
    """A random language model of `kind`; the norms and biases are random too, so that nothing hides behind ones and zeros."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**settings)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def write_folder(folder: Path, kind: str = "llama", *, shard: str = "5GB", **settings: Any) -> Source:
    """A whole model folder: weights, config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(kind, **settings).save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return Source("folder", folder, str(folder), "0")
