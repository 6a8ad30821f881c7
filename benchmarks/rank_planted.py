"""Models whose right rank is known: the teacher is the base plus an update of rank k in every linear layer, the student learns its logits.

The base is a random Llama of six layers; embeddings and head are scaled so that its answers are neither flat nor certain.  The update's
singular values are equal, its norm 2 to 5 % of the weight's.  The loss is the student's cross-entropy with the teacher's probabilities,
at every token; that of the teacher itself is no rank's to lower.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from halfbyte.config.lora import LoraConfig
from halfbyte.config.optim import OptimConfig
from halfbyte.data.batches import Batch
from halfbyte.studies.rank_problem import Problem

LAYERS, WIDTH, HEADS, VOCABULARY = 6, 128, 4, 512
ROWS, TOKENS, HELD_OUT = 16, 24, 12
OPTIM = OptimConfig(clip_norm=None, final_lr_share=0.0, betas=(0.9, 0.99))


def base_model(seed: int, layers: int = LAYERS, width: int = WIDTH) -> Any:
    """The base, the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        vocab_size=VOCABULARY, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=width**-0.5,
    )).eval()  # fmt: skip
    model.model.embed_tokens.weight.data.mul_(width**0.5 * 0.5)
    return model.requires_grad_(False)


@torch.no_grad()
def plant(model: nn.Module, rank: int, share: float, seed: int) -> None:
    """Add an update of this rank to every linear layer but the head."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = module.weight
            left = torch.linalg.qr(torch.randn(weight.shape[0], rank, generator=generator))[0]
            right = torch.linalg.qr(torch.randn(weight.shape[1], rank, generator=generator))[0]
            weight.add_(left @ right.T * (share * weight.norm() / rank**0.5))


def batch_of(generator: torch.Generator, rows: int) -> Batch:
    """Random tokens; every one but the first is predicted."""
    ids = torch.randint(3, VOCABULARY, (rows, TOKENS), generator=generator)
    labels = ids.clone()
    labels[:, 0] = -100
    return Batch(ids, labels, None, None, None, list(range(rows)))


def planted(rank: int, draw: int, *, layers: int = LAYERS, width: int = WIDTH, held_out: int = HELD_OUT) -> Problem:
    """One case: everything is a function of the arguments."""
    seed = 1000 * rank + draw
    share = random.Random(seed).uniform(0.02, 0.05)
    student, teacher = (base_model(seed, layers, width) for _ in range(2))
    plant(teacher, rank, share, seed)
    lora = LoraConfig(rank=8, alpha=32)

    def loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        with torch.no_grad():
            wanted = log_softmax(teacher(batch.input_ids).logits[:, :-1], -1)
        found = log_softmax(model(batch.input_ids).logits[:, :-1], -1)
        return -(wanted.exp() * found).sum(), wanted.shape[0] * wanted.shape[1]

    def windows() -> Iterator[list[Batch]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield [batch_of(generator, ROWS)]

    unseen = torch.Generator().manual_seed(seed + 1)
    return Problem(student, lora, windows, [batch_of(unseen, ROWS) for _ in range(held_out)], loss_sum, OPTIM)
