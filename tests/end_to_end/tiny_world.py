"""A small world on disk for tests of the whole road: a random Llama with a byte-level tokenizer and a ChatML template, and rows."""

import json
import random
from pathlib import Path

import torch

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROOMS, STATES = ("kitchen", "hall", "cellar", "garden"), ("on", "off")


def write_model(folder: Path, *, shards: bool = False) -> Path:
    """A Llama of two layers with random weights; with `shards` its weights lie in several files with an index."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*specials, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>",
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=260,
        max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int = 24, seed: int = 0) -> list[dict[str, str]]:
    """Short prompts with short answers."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        room, state = rng.choice(ROOMS), rng.choice(STATES)
        made.append({"prompt": f"{number}: lamp in the {room} {state}", "completion": f"{room} {state}"})
    return made


def write_rows(path: Path, made: list[dict[str, str]] | None = None) -> Path:
    """Rows as jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made or rows()), encoding="utf-8")
    return path
