"""A model of a few decoder layers with random weights and next to no vocabulary: what a calibration times in the place of a real model."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 64


def sample_model(*, hidden: int, inner: int, heads: int, groups: int, head_dim: int, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """Llama layers of these widths in training mode; heads share groups of keys and values."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        head_dim=head_dim, vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train()  # type: ignore[arg-type]  # transformers' wrapper hides the signature
