"""Small tokenizers of the three kinds, made on the spot, and the chat templates in public use."""

import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "templates"
# (begin token, end token of the model, what closes an answer) as the models' own configs say
SPECIALS = {
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "llama3_1": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "llama3_2": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "qwen2_5": (None, "<|im_end|>", "<|im_end|>"),
    "qwen3": (None, "<|im_end|>", "<|im_end|>"),
    "gemma": ("<bos>", "<eos>", "<end_of_turn>"),
    "gemma3": ("<bos>", "<eos>", "<end_of_turn>"),
    "phi3": ("<s>", "<|endoftext|>", "<|end|>"),
    "deepseekv3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>", "<|im_end|>"),
}
MORE = ["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<|system|>", "<|user|>", "<|assistant|>",
        "<｜User｜>", "<｜Assistant｜>", "<pad>", "<unk>"]
ALL_SPECIALS = sorted({token for tokens in SPECIALS.values() for token in tokens if token} | set(MORE))


def source_of(name: str) -> str:
    """The text of a template."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def words(seed: int, count: int) -> list[str]:
    """Unique alphabetic words, none of them part of a template's own text; the same in every process."""
    chance = random.Random(seed)
    templates = "".join(source_of(name) for name in SPECIALS)
    made: dict[str, None] = {}
    while len(made) < count:
        word = "".join(chance.choices(string.ascii_letters, k=chance.randint(5, 9)))
        if word not in templates:
            made[word] = None
    return list(made)


def _corpus() -> list[str]:
    listed = words(1, 4000)
    texts = [" ".join(listed[at: at + 12]) + ".\n" for at in range(0, len(listed), 12)]
    marks = "user assistant system model tool think\n\n 0 1 2 3 4 5 6 7 8 9 , . ! ? é ü 漢字 🙂"
    return [*texts, *[source_of(name) for name in SPECIALS], marks]


def _bpe() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=ALL_SPECIALS, show_progress=False)
    made.train_from_iterator(_corpus(), trainer)
    return made


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=1200, special_tokens=ALL_SPECIALS, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(_corpus(), trainer)
    return made


def _wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(_corpus(), trainers.WordPieceTrainer(vocab_size=1500, special_tokens=ALL_SPECIALS, show_progress=False))
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {"bpe": _bpe, "unigram": _unigram, "wordpiece": _wordpiece}


def dressed(backend: Tokenizer, name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens and the template of a model."""
    begin, end, _ = SPECIALS[name]
    named: dict[str, Any] = {"eos_token": end, "pad_token": end, "unk_token": "<unk>"} | ({"bos_token": begin} if begin else {})
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    made.add_special_tokens({"additional_special_tokens": ALL_SPECIALS})
    made.chat_template = source_of(name)
    return made


@pytest.fixture(scope="session")
def backends() -> dict[str, Tokenizer]:
    """A small BPE, Unigram and WordPiece tokenizer."""
    return {kind: make() for kind, make in KINDS.items()}


@pytest.fixture(scope="session")
def chatml(backends: dict[str, Tokenizer]) -> PreTrainedTokenizerFast:
    """The small BPE tokenizer with Qwen2.5's template; its pad token is its end token."""
    return dressed(backends["bpe"], "qwen2_5")
