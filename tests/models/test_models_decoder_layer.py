"""The fused decoder layers against the original ones, architecture by architecture: logits, loss and every gradient.

The oracle is transformers' own model with the same weights and halfbyte's adapters on its modules.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from halfbyte.config.lora import LoraConfig
from halfbyte.data.batches import collate
from halfbyte.data.tokenize import Example
from halfbyte.kernels.gated_mlp import block
from halfbyte.lora.inject import inject
from halfbyte.models.decoder_layer import FusedLayer
from halfbyte.models.heads import head_of
from halfbyte.models.lazy_logits import LazyLogits, make_lazy
from halfbyte.models.recompute import use_policy
from halfbyte.models.structure import decoder_layers, fuse
from halfbyte.models.token_loss import token_loss_sum
from halfbyte.quant.linear import QuantLinear
from halfbyte.surgery import replace

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 3}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {}),
    "phi3-partial": ("Phi3", {"partial_rotary_factor": 0.5}),
    "granite": ("Granite", {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 3}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "exaone4": ("Exaone4", {"sliding_window": 3, "sliding_window_pattern": 2}),
    "seed_oss": ("SeedOss", {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    "ministral": ("Ministral", {"sliding_window": 3, "head_dim": 8}),
    "arcee": ("Arcee", {}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
}
WITHOUT_GATED_MLP = {"arcee", "qwen3_moe", "mixtral"}
ORIGINAL = {"cohere": "Cohere", "starcoder2": "Starcoder2", "gpt_neox": "GPTNeoX", "stablelm": "StableLm"}


def small(name: str, prefix: str, changes: dict[str, Any]) -> Any:
    """A small model with random weights; norms and biases are moved off their start, so that they matter."""
    kind = "Gemma3Text" if prefix == "Gemma3" else prefix
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    attention = "eager" if prefix == "Gemma2" else "sdpa"  # its cap is nowhere else
    model = getattr(transformers, f"{prefix}ForCausalLM")._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.std() < 0.1:
                parameter.mul_(4)
    return model


def adapted(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model with adapters whose B is not zero."""
    model = small(name, *MODELS[name]).to(dtype)
    inject(model, LoraConfig(rank=3, alpha=5), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def batch(case: str) -> dict[str, Tensor]:
    """Two rows: plain, packed (positions restart), or padded on the right and on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 96, (2, 11), generator=generator)
    labels = ids.clone()
    labels[:, :2] = -100
    made = {"input_ids": ids, "labels": labels}
    if case == "packed":
        made["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    if case == "padded":
        mask = torch.ones(2, 11, dtype=torch.int64)
        mask[0, 8:], mask[1, :3] = 0, 0
        labels[mask == 0] = -100
        labels[1, 3] = -100  # would be predicted from padding
        made["attention_mask"] = mask
    return made


def outcome(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, logits at positions with a label, gradient of every trained parameter)."""
    model.zero_grad()
    out = model(**inputs, use_cache=False)
    out.loss.backward()
    seen = (inputs["labels"] != -100)
    logits = (out.logits.made() if isinstance(out.logits, LazyLogits) else out.logits)[seen]
    return out.loss.detach(), logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found: Tensor, wanted: Tensor, share: float, what: str) -> None:
    """Within `share` of the largest expected value."""
    assert (found - wanted).abs().max() <= share * wanted.abs().max().clamp_min(1e-6), what


@pytest.mark.parametrize("case", ["plain", "packed", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_fused_and_plain_agree(name: str, case: str) -> None:
    """Logits, loss and every gradient in float32."""
    plain = adapted(name).train()
    fused = copy.deepcopy(plain)
    found = fuse(fused)
    assert found.layers == 3, found.reason
    assert (found.gated == 3) == (name not in WITHOUT_GATED_MLP)
    make_lazy(fused)
    inputs = batch(case)
    loss, logits, gradients = outcome(plain, inputs)
    own_loss, own_logits, own_gradients = outcome(fused, inputs)
    close(own_loss, loss, 1e-5, "loss")
    close(own_logits, logits, 2e-5, "logits")
    assert own_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        close(own_gradients[key], gradient, 1e-4, key)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_fused_in_bfloat16_is_as_close_to_float32_as_the_plain_one(name: str) -> None:
    """Fewer roundings, so not further from the exact gradients than twice the original's own distance."""
    exact = outcome(adapted(name).train(), batch("packed"))
    plain = adapted(name, torch.bfloat16).train()
    fused = copy.deepcopy(plain)
    assert fuse(fused).layers == 3
    make_lazy(fused)
    far, near = outcome(plain, batch("packed")), outcome(fused, batch("packed"))
    distance = lambda found: sum(float((found[2][key].float() - exact[2][key]).square().sum()) for key in exact[2]) ** 0.5  # noqa: E731
    assert distance(near) <= 2 * distance(far)


@pytest.mark.parametrize("kind", ORIGINAL)
def test_a_structure_that_does_not_fit_keeps_its_layers_and_says_why(kind: str) -> None:
    """Parallel blocks, LayerNorm, interleaved rotation."""
    model = small(kind, ORIGINAL[kind], {})
    before = list(map(type, model.modules()))
    found = fuse(model)
    assert found.layers == 0 and found.reason
    assert list(map(type, model.modules())) == before
    assert not model.base_model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["Ernie4_5", "Helium", "Glm4"])
def test_an_interleaved_rotation_is_told_apart_in_bfloat16(kind: str) -> None:
    """Also with weights as small as a new model's, where attention hardly moves the residual stream."""
    config = getattr(transformers, f"{kind}Config")(**SIZES, head_dim=8)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, dtype=torch.bfloat16)
    assert fuse(model).layers == 0


def test_a_new_model_in_bfloat16_is_known_layer_by_layer() -> None:
    """Layers with and without rotation, in a model where both give nearly the same."""
    config = transformers.SmolLM3Config(**SIZES, no_rope_layer_interval=2)
    torch.manual_seed(0)
    model: Any = transformers.SmolLM3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    assert fuse(model).layers == 3
    assert [layer.plan.rotary for layer in decoder_layers(model).values()] == [True, False, True]  # type: ignore[union-attr]


def test_a_window_counts_only_where_the_architecture_has_one() -> None:
    """config.json of a model that was converted from Mistral keeps the key; Llama does not look at it."""
    model = small("llama", "Llama", {"sliding_window": 3})
    ids = batch("plain")["input_ids"]
    wanted = model(ids, use_cache=False).logits
    assert fuse(model).layers == 3
    close(model(ids, use_cache=False).logits, wanted, 2e-5, "logits")


def test_layers_without_attention_among_others_keep_the_model_as_it_is() -> None:
    """They would be handed a mask that only own layers read."""
    sizes = {**SIZES, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
    config = transformers.Qwen3NextConfig(**sizes, head_dim=8, linear_value_head_dim=8, num_experts=2, moe_intermediate_size=8)
    found = fuse(transformers.Qwen3NextForCausalLM._from_config(config))
    assert not found.layers and "no self_attn" in found.reason


def test_a_forward_that_somebody_put_on_an_instance_is_kept() -> None:
    """As accelerate does; before and after the layers are taken over."""
    model = small("llama", *MODELS["llama"])
    changed = copy.deepcopy(model)
    changed.model.layers[1].mlp.forward = lambda x: x
    found = fuse(changed)
    assert not found.layers and "forward" in found.reason
    ids = batch("plain")["input_ids"]
    assert fuse(model).layers == 3
    before = model(ids, use_cache=False).logits
    model.model.layers[1].mlp.down_proj.forward = lambda x: x.new_zeros(*x.shape[:-1], 32)
    assert not torch.allclose(model(ids, use_cache=False).logits, before)


def packed_weights(model: Any) -> Any:
    """The same model with NF4 layers."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            replace(model, name, QuantLinear.from_linear(module))
    return model


def test_fused_on_packed_weights_and_with_parts_of_other_kinds() -> None:
    """NF4 bases; one layer without adapter, one with DoRA beside plain ones through module calls."""
    plain = packed_weights(small("llama", *MODELS["llama"]))
    inject(plain, LoraConfig(rank=3, exclude=("layers.0.self_attn.k_proj",), dora=True, layers=(0, 2)), seed=1)
    plain.train()
    fused = copy.deepcopy(plain)
    assert fuse(fused).layers == 3
    for found, wanted in zip(outcome(fused, batch("packed"))[2].items(), outcome(plain, batch("packed"))[2].items()):
        assert found[0] == wanted[0]
        close(found[1], wanted[1], 1e-4, wanted[0])


def test_full_fine_tuning_agrees() -> None:
    """Every weight trains: norms, embeddings, biases, dense layers."""
    plain = small("llama-bias", *MODELS["llama-bias"]).train()
    fused = copy.deepcopy(plain)
    assert fuse(fused).layers == 3
    make_lazy(fused)
    wanted, found = outcome(plain, batch("packed"))[2], outcome(fused, batch("packed"))[2]
    assert wanted.keys() == found.keys()
    for key in wanted:
        close(found[key], wanted[key], 1e-4, key)


@pytest.mark.parametrize("policy", ["recompute_mlp", "recompute", "offload"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_policies_give_the_same_bits(name: str, policy: str) -> None:
    """What is computed again is computed the same way, and the last product of an MLP is not computed again."""
    model = adapted(name).train()
    fuse(model)
    kept = outcome(model, batch("packed"))
    use_policy(model, policy)
    again = outcome(model, batch("packed"))
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(kept[2][key], again[2][key]) for key in kept[2])


def test_generation_and_hidden_states_are_the_originals() -> None:
    """A cache, and outputs recorded by class, go the inherited way."""
    model = adapted("llama").eval()
    fused = copy.deepcopy(model)
    fuse(fused)
    ids = batch("plain")["input_ids"]
    assert torch.equal(fused.generate(ids, max_new_tokens=5, do_sample=False), model.generate(ids, max_new_tokens=5, do_sample=False))
    assert len(fused(ids, output_hidden_states=True).hidden_states) == 4
    assert all(isinstance(layer, FusedLayer) for layer in decoder_layers(fused).values())


def test_attention_weights_are_there_where_the_config_asks_for_them() -> None:
    """Own ops have none, so such a call goes the inherited way."""
    model = small("llama", *MODELS["llama"]).train()
    model.set_attn_implementation("eager")
    fuse(model)
    model.config.output_attentions = True
    assert len(model(batch("plain")["input_ids"]).attentions) == 3


def test_a_model_on_own_layers_can_be_sent_to_another_process() -> None:
    """Classes made at run time are made again there."""
    model = adapted("llama").train()
    fuse(model)
    make_lazy(model)
    sent = pickle.loads(pickle.dumps(model))  # noqa: S301 (bytes made here)
    assert [type(one) for one in sent.modules()] == [type(one) for one in model.modules()]
    assert torch.equal(sent(**batch("packed")).loss, model(**batch("packed")).loss)


def test_a_second_derivative_is_refused() -> None:
    """It would have been zero without a word."""
    model = adapted("llama").train()
    fuse(model)
    states = model.get_input_embeddings()(batch("plain")["input_ids"]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs_embeds=states).logits.square().sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_checkpointing_of_transformers_works_and_gives_the_same_gradients() -> None:
    """The switch that Trainer and TRL use; a second forward before the backward does not disturb the first."""
    model = adapted("llama").train()
    fuse(model)
    wanted = outcome(model, batch("packed"))[2]
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the older name
    enable({"use_reentrant": False})
    model.zero_grad()
    loss = model(**batch("packed"), use_cache=False).loss
    model(**batch("plain"), use_cache=False)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, wanted[name], 1e-5, name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "use",
    [lambda z: z.argmax(-1), lambda z: z.float().log_softmax(-1), lambda z: z[:, -1], lambda z: z + 1, lambda z: torch.cat([z, z])],
)
def test_logits_are_there_for_whoever_looks(use: Callable[[Tensor], Tensor]) -> None:
    """Lazy logits answer as the logits would, gradient included."""
    model = adapted("gemma2").train()
    wanted = use(model(**batch("plain")).logits)
    fuse(model)
    make_lazy(model)
    logits = model(**batch("plain")).logits
    assert isinstance(logits, LazyLogits) and logits.shape == (2, 11, 96)
    found = use(logits)
    assert not isinstance(found, LazyLogits)
    close(found.float(), wanted.float(), 1e-4, "logits")


def test_label_smoothing_is_not_lost() -> None:
    """A loss the fused one does not know is computed from real logits."""
    model = adapted("llama").train()
    ids = batch("plain")["input_ids"]
    wanted = nn.functional.cross_entropy(model(ids).logits.view(-1, 96), ids.view(-1), label_smoothing=0.1)
    make_lazy(model)
    close(nn.functional.cross_entropy(model(ids).logits.view(-1, 96), ids.view(-1), label_smoothing=0.1), wanted, 1e-5, "loss")


class _Doubled(torch.autograd.Function):
    """Somebody's own function of logits, with a gradient that only it knows."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits * 2

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return upstream[0] * -3


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradients_reach_the_model_through_foreign_functions(name: str) -> None:
    """A function of another library gets the logits past every way to notice; its gradient goes on all the same."""
    model = adapted(name).train()
    model.lm_head.weight.requires_grad_(True)
    fused = copy.deepcopy(model)
    make_lazy(fused)
    for one in (model, fused):
        _Doubled.apply(one(**batch("plain")).logits).square().sum().backward()
    for (key, found), (_, wanted) in zip(fused.named_parameters(), model.named_parameters(), strict=True):
        if wanted.requires_grad:
            close(found.grad, wanted.grad, 1e-4, key)  # type: ignore[arg-type]


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_written_into_logits_stays_there(quiet: bool) -> None:
    """In place, through a view, inside no_grad; the gradient is that of what is there then."""
    model = adapted("llama").train()
    lazy = copy.deepcopy(model)
    make_lazy(lazy)
    for one in (model, lazy):
        logits = one(input_ids=batch("plain")["input_ids"]).logits
        with torch.set_grad_enabled(not quiet):
            logits.view(-1, 96)[:, 5] = -1e4
            logits[:, 3][:, 7] = 9.0
            logits.mul_(0.5)
        assert (logits[:, 3, 7] == 4.5).all()
        assert (logits[..., 5] == -5e3).all()
        logits[..., :10].logsumexp(-1).sum().backward()
    for (key, found), (_, wanted) in zip(lazy.named_parameters(), model.named_parameters(), strict=True):
        if wanted.requires_grad:
            close(found.grad, wanted.grad, 1e-4, key)  # type: ignore[arg-type]


def test_asking_for_sizes_makes_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are known before."""
    model = adapted("llama").train()
    make_lazy(model)
    logits = model(input_ids=batch("plain")["input_ids"]).logits
    monkeypatch.setattr(LazyLogits, "made", lambda self: pytest.fail("logits were made"))
    assert (logits.size(-1), logits.dim(), logits.numel(), len(logits)) == (96, 3, 2 * 11 * 96, 2)
    assert logits.requires_grad and logits.grad_fn is not None


def test_tiles_of_the_mlp_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go through the MLP in tiles where its inner part is not kept; the last tile is smaller."""
    model = adapted("phi3").train()
    fuse(model)
    kept = outcome(model, batch("packed"))[2]
    use_policy(model, "recompute_mlp")
    monkeypatch.setattr(block, "TILE", 5)
    for key, gradient in outcome(model, batch("packed"))[2].items():
        close(gradient, kept[key], 1e-5, key)


def test_the_loss_of_transformers_makes_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the forward to the loss nobody asks for them."""
    model = adapted("gemma2").train()
    make_lazy(model)
    monkeypatch.setattr(LazyLogits, "made", lambda self: pytest.fail("logits were made"))
    model(**batch("padded")).loss.backward()


def test_padding_is_not_computed() -> None:
    """The loss of a padded batch comes from its real tokens alone, and equals the original's."""
    model = adapted("qwen3").train()
    items = [Example([5, 6, 7, 8, 9, 10], [-100, -100, 7, 8, 9, 10], 0), Example([11, 12, 13], [-100, 12, 13], 1)]
    padded = collate(items, pad_id=0)
    wanted, count = token_loss_sum(model, head_of(model), padded)
    fuse(model)
    seen: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[0] * inputs[0].shape[1]))
    found, same = token_loss_sum(model, head_of(model), padded)
    assert seen[-1] == 64 and count == same  # nine real tokens, filled up to a shape that comes again
    close(found, wanted, 1e-5, "loss")
