"""Small models, and PEFT beside ours on the same base: logits and every adapter gradient."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from halfbyte.adapters.folder import load_adapter
from halfbyte.formats.peft_config import DEFAULTS
from halfbyte.formats.peft_keys import from_peft
from halfbyte.lora.tensors import live_tensors
from halfbyte.quant.dense import is_linear_like
from halfbyte.quant.linear import QuantLinear
from halfbyte.surgery import modules_of, replace

IDS = torch.tensor([[3, 17, 30, 9, 41, 5, 7, 60], [8, 2, 2, 50, 33, 12, 19, 1]])


def llama(**overrides: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "vocab_size": 64, "tie_word_embeddings": False, "pad_token_id": 0}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=64, bos_token_id=0, eos_token_id=0,
                                       resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
                                         vocab_size=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    return MixtralForCausalLM(MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                                            num_key_value_heads=2, vocab_size=64, num_local_experts=4,
                                                num_experts_per_tok=2)).eval()  # fmt: skip


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(1)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
                                              num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=64, num_experts=6,
                                              num_experts_per_tok=2, decoder_sparse_step=1, bos_token_id=0,
                                                  eos_token_id=0)).eval()  # fmt: skip


def quantized(model: nn.Module, format: str = "nf4") -> nn.Module:
    """Every linear layer but the head packed."""
    for name, module in modules_of(model, lambda name, module: is_linear_like(module) and name != "lm_head"):
        replace(model, name, QuantLinear.from_linear(module, format, 64, True, name))
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """A dense model with exactly the weights that the packed one acts with."""
    from halfbyte.quant.dense import dense_weight, with_weight

    for name, module in modules_of(model, lambda _, module: isinstance(module, QuantLinear)):
        replace(model, name, with_weight(module, dense_weight(module), module.bias))
    return model


def untrained_peft(model: nn.Module, *, task: str | None = "CAUSAL_LM", **settings: Any) -> peft.PeftModel:
    """PEFT around the model, as it begins."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(task_type=task, **settings)).eval()


def with_peft(model: nn.Module, *, seed: int = 5, task: str | None = "CAUSAL_LM", **settings: Any) -> peft.PeftModel:
    """PEFT around the model, with random values in everything it trains."""
    wrapped = untrained_peft(model, task=task, **settings)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            with torch.no_grad():
                parameter.copy_(parameter.abs() * 0.9 + noise.abs() if "magnitude" in name else parameter + noise)
    return wrapped


def save_peft(wrapped: peft.PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(str(folder))
    return folder


def peft_load(model: nn.Module, folder: Path) -> nn.Module:
    """A fresh PEFT model from a folder; any complaint of PEFT about the tensors is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected|mismatch).*")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def gradients(model: nn.Module, wanted: Callable[[nn.Module], dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, name -> gradient) for a loss that is no symmetric function of the logits."""
    logits = model(input_ids=IDS).logits
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (torch.log_softmax(logits.float(), -1) * weights).sum().backward()
    return logits.detach(), wanted(model)


def peft_gradients(wrapped: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Our name -> PEFT's gradient."""
    raw = {**DEFAULTS, **json.loads((folder / "adapter_config.json").read_text())}
    foreign = {}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            key = name.replace(".default.weight", "") if "lora_magnitude_vector" in name else name.replace(".modules_to_save.default", "")
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            foreign[key.replace(".default", "")] = grad
    return from_peft(foreign, raw, folder).tensors


def our_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.grad for name, tensor in live_tensors(model).items()}  # type: ignore[misc]


def off(found: Tensor, expected: Tensor) -> float:
    """Relative distance by norm; the expected zero asks for zero."""
    found, expected = found.detach(), expected.detach()
    distance = float((found.double() - expected.double()).norm())
    return distance / float(expected.double().norm()) if bool(expected.any()) else distance


def compare_with_peft(base: Callable[[], nn.Module], folder: Path, ours: Callable[[], nn.Module] | None = None,
    **settings: Any) -> dict[str, float]:
    """name -> relative distance of logits and every gradient, after loading PEFT's folder into our model in a fresh object."""
    wrapped = with_peft(base(), **settings)
    save_peft(wrapped, folder)
    wrapped.train()  # no dropout here; in eval mode bitsandbytes' CPU kernel leaves float32
    model = (ours or base)()
    load_adapter(model, folder)
    expected_logits, expected = gradients(wrapped, lambda model: peft_gradients(model, folder))
    logits, found = gradients(model, our_gradients)
    assert set(found) == set(expected)
    assert any(bool(grad.any()) for grad in expected.values())
    return {"logits": off(logits, expected_logits), **{name: off(found[name], expected[name]) for name in expected}}
