"""A whole small model folder (random Llama, own tokenizer, chat template) and the real command line, for tests that go the whole road."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfbyte.quickstart import task

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROOT = Path(__file__).resolve().parents[2]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def make_tokenizer() -> object:
    """A byte-level BPE of 400 tokens, trained on the tour's rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    train, _ = task.make(train_rows=400)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([f"{row.request}\n{row.answer}" for row in train] + ["system user assistant"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as transformers saves it: a random Llama of 0.2 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer),  # type: ignore[arg-type]
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,  # type: ignore[attr-defined]
        pad_token_id=tokenizer.pad_token_id,  # type: ignore[attr-defined]
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows of the tour's task in the `messages` shape."""
    train, _ = task.make(train_rows=48)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row.messages()) + "\n" for row in train))
    return path


@pytest.fixture(scope="session")
def cli() -> Cli:
    """The real command line in a process of its own: cli("train", ..., text="piped input", check=False)."""

    def run(*words: object, text: str | None = None, check: bool = True, **variables: str) -> "subprocess.CompletedProcess[str]":
        environment = dict(os.environ, OMP_NUM_THREADS="1", NO_COLOR="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT), **variables)
        command = [sys.executable, "-m", "halfbyte", *map(str, words)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, timeout=300)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run
