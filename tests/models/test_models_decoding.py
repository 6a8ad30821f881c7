"""Decoding a token on own ops against transformers' own step, architecture by architecture; and when the prepared list must not be used."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from halfbyte.config.lora import LoraConfig
from halfbyte.kernels import instructions
from halfbyte.lora.inject import eject, inject
from halfbyte.models import decode_step
from halfbyte.models.decode_step import LIST, LayerStep
from halfbyte.models.lazy_logits import make_lazy
from halfbyte.models.structure import decoder_layers, fuse
from halfbyte.quant.linear import QuantLinear
from halfbyte.surgery import replace
from tests.models.test_models_decoder_layer import MODELS, small

WIDE = {"hidden_size": 64, "intermediate_size": 128}
LISTED = {
    "llama", "llama-bias", "mistral", "mistral-window", "qwen2", "qwen2-window", "qwen3", "phi3", "phi3-partial", "smollm3", "seed_oss",
    "ministral", "gemma",
}  # fmt: skip
needs_pairs = pytest.mark.skipif(not instructions.short_products(), reason="the processor has no products of bfloat16 pairs")


def model_of(name: str, dtype: torch.dtype, adapters: bool = False) -> Any:
    """A small model with packed linear layers, in evaluation."""
    kind, changes = MODELS[name]
    heads = {"head_dim": 16} if "head_dim" in changes else {}  # four of them are as wide as the list wants
    model = small(name, kind, {**changes, **WIDE, **heads}).to(dtype)
    for layer in decoder_layers(model).values():
        for place, module in list(layer.named_modules()):
            if type(module) is nn.Linear and module.in_features % 64 == 0:
                replace(layer, place, QuantLinear.from_linear(module))
    if adapters:
        inject(model, LoraConfig(rank=3, alpha=5), seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def decoded(model: Any, rows: int = 1, steps: int = 5, mask: bool = False, cut: bool = True) -> Tensor:
    """Logits of `steps` single tokens behind a prompt of 6: (rows, steps, V); `cut`: the cache drops what lies before a window."""
    ids = torch.randint(3, 96, (rows, 6 + steps), generator=torch.Generator().manual_seed(4))
    cache = DynamicCache(config=model.config) if cut else DynamicCache()
    model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
    made = []
    for step in range(6, 6 + steps):
        seen = {"attention_mask": torch.ones(rows, step + 1, dtype=torch.int64)} if mask else {}
        made.append(model(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True, **seen).logits[:, -1])
    return torch.stack(made, 1)


def lists(model: Any) -> list[Any]:
    """What each layer has prepared."""
    return [layer.__dict__.get(LIST, "never asked") for layer in decoder_layers(model).values()]


def near(found: Tensor, wanted: Tensor, share: float) -> None:
    assert (found.float() - wanted.float()).norm() <= share * wanted.float().norm()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_in_float32_a_step_is_transformers_step(name: str, rows: int) -> None:
    """The ordinary way: own ops behind the cache, windows shorter than the prompt included.  # T40"""
    plain = model_of(name, torch.float32, adapters=True)
    fused = copy.deepcopy(plain)
    assert fuse(fused).layers == 3
    for cut in (True, False):
        near(decoded(fused, rows, cut=cut), decoded(plain, rows, cut=cut), 2e-5)
    assert all(one in (None, "never asked") for one in lists(fused))


@needs_pairs
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_a_step_is_transformers_step(name: str, adapters: bool) -> None:
    """The prepared list where the model is one for it, no further from float32 than the plain model in bfloat16 is."""
    plain = model_of(name, torch.bfloat16, adapters)
    fused = copy.deepcopy(plain)
    assert fuse(fused).layers == 3
    make_lazy(fused)
    exact = decoded(copy.deepcopy(plain).float())
    found, wanted = decoded(fused), decoded(plain)
    rounding = float((wanted.float() - exact).norm() / exact.norm())
    near(found, exact, max(1.5 * rounding, 0.01))
    made = [isinstance(one, LayerStep) for one in lists(fused)]
    assert all(made) if name in LISTED else not any(made)


@needs_pairs
def test_what_changes_between_two_steps_is_seen() -> None:
    """Adapters, norms and biases are read at each step, moved weights make another list: no stale answer after training goes on."""
    fused = model_of("llama-bias", torch.bfloat16, adapters=True)
    fuse(fused)
    decoded(fused)
    before = lists(fused)
    with torch.no_grad():
        for name, parameter in fused.named_parameters():
            if "lora_b" in name or "norm" in name or name.endswith("bias"):
                parameter.data.mul_(-1.5)  # without a new version
    plain = model_of("llama-bias", torch.bfloat16, adapters=True)
    plain.load_state_dict(fused.state_dict())
    near(decoded(fused), decoded(plain), 0.03)
    assert lists(fused) == before
    layer = fused.model.layers[1].mlp.down_proj.base
    layer.weight = layer.weight.flip(0).clone()
    plain.load_state_dict(fused.state_dict())
    near(decoded(fused), decoded(plain), 0.03)
    assert lists(fused)[1] is not before[1] and lists(fused)[0] is before[0]


@needs_pairs
def test_an_exchanged_part_makes_another_list() -> None:
    """# T67: an adapter that is put in or taken out after a token was decoded acts, or is gone, at the next; so does another norm."""
    fused = model_of("llama", torch.bfloat16)
    fuse(fused)
    bare = decoded(fused)
    adapted = inject(fused, LoraConfig(rank=3, alpha=5), seed=1)
    with torch.no_grad():
        for name in adapted.names:
            fused.get_submodule(name).lora_b.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.2)
    fused.requires_grad_(False).eval()
    plain = model_of("llama", torch.bfloat16, adapters=True)
    plain.load_state_dict(fused.state_dict())
    near(decoded(fused), decoded(plain), 0.03)
    assert (decoded(fused) - bare).norm() > 0.1 * bare.norm()
    eject(fused)
    assert decoded(fused).equal(bare)
    layer = fused.model.layers[0]
    replace(layer, "input_layernorm", copy.deepcopy(layer.input_layernorm))
    layer.input_layernorm.weight.data.mul_(-1.5)
    plain = model_of("llama", torch.bfloat16)
    plain.load_state_dict(fused.state_dict())
    near(decoded(fused), decoded(plain), 0.03)


@needs_pairs
def test_hooks_and_dropout_are_not_passed_over() -> None:
    fused = model_of("llama", torch.bfloat16, adapters=True)
    fuse(fused)
    decoded(fused)
    calls: list[int] = []
    handle = fused.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *call: calls.append(1))
    decoded(fused, steps=2)
    assert len(calls) == 3  # the prompt, and two steps
    handle.remove()
    decoded(fused, steps=2)
    assert len(calls) == 3
    fused.train()
    assert decode_step.prepared(fused.model.layers[0], torch.zeros(1, 64, dtype=torch.bfloat16), None, None) is None


@needs_pairs
def test_two_threads_decode_the_same_model() -> None:
    """A list has one set of buffers: who finds it in use goes the ordinary way."""
    fused = model_of("llama", torch.bfloat16)
    fuse(fused)
    wanted = decoded(fused, steps=12)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(decoded(fused, steps=12))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for one in found:
        near(one, wanted, 0.02)
    assert all(one.lock.acquire(blocking=False) for one in lists(fused))  # and every lock is free again


@needs_pairs
def test_a_failing_step_frees_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = model_of("llama", torch.bfloat16)
    fuse(fused)
    decoded(fused)
    ids, cache = torch.tensor([[5, 6]]), DynamicCache(config=fused.config)
    with torch.no_grad():
        fused(input_ids=ids, past_key_values=cache, use_cache=True)
        with monkeypatch.context() as context:
            context.setattr(DynamicCache, "update", lambda *a, **b: (_ for _ in ()).throw(MemoryError("no room")))
            with pytest.raises(MemoryError):
                fused(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    near(decoded(fused), decoded(model_of("llama", torch.bfloat16)), 0.03)
    assert isinstance(lists(fused)[0], LayerStep) and lists(fused)[0].lock.acquire(blocking=False)


def test_copies_and_masks() -> None:
    """A list is not copied or sent; a mask of ones is no mask, one with padding goes transformers' way."""
    fused = model_of("llama", torch.bfloat16)
    plain = copy.deepcopy(fused)
    fuse(fused)
    near(decoded(fused, mask=True), decoded(plain, mask=True), 0.03)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):  # noqa: S301  # what was written a moment ago
        assert all(one == "never asked" for one in lists(other))
        near(decoded(other), decoded(plain), 0.03)
    tokenized = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    answers = [model.generate(input_ids=tokenized, attention_mask=mask, max_new_tokens=4, do_sample=False) for model in (plain, fused)]
    assert torch.equal(*answers)
