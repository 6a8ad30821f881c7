"""A Llama of given sizes with random weights and the starter's tokenizer, as a model folder."""

from pathlib import Path
from typing import Any

VOCABULARY = 49152  # the starter's


def folder_of(folder: Path, sizes: dict[str, Any] | None) -> str:
    """The folder, written where it is not there yet; without sizes the starter, by its name."""
    if sizes is None:
        return "starter"
    if not (folder / "tokenizer_config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from halfbyte.models.source import resolve

        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes))
        model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
        starter = resolve("starter").folder
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((starter / file).read_bytes())
    return str(folder)
