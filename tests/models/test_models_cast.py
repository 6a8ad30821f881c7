"""A cast of a whole model leaves in float32 what transformers keeps there while it loads."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from halfbyte.models.cast import cast


def glm(place: Path) -> Glm4MoeForCausalLM:
    """A small mixture of experts whose router corrects the scores by odd numbers, written to `place`."""
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=128, head_dim=16,
        n_group=1, topk_group=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    made = Glm4MoeForCausalLM(config).eval()
    for name, tensor in made.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.rand(tensor.shape) + 1)
    made.save_pretrained(place)
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_what_transformers_loads_in_that_type(dtype: torch.dtype, tmp_path: Path) -> None:
    made = glm(tmp_path)
    expected = Glm4MoeForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    twin = copy.deepcopy(made)
    cast(made, dtype)
    found = made.state_dict()
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in expected.items()}
    assert {value.dtype for value in found.values()} == {dtype, torch.float32}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    cast(made, torch.float32)
    assert {value.dtype for value in made.state_dict().values()} == {torch.float32}
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in made.state_dict().items() if name.endswith("correction_bias"))
