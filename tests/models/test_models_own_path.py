"""When fused layers run as the originals do: hooks, parts that were exchanged or cast, a cache; and what the probe must not overlook."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from halfbyte.config.lora import LoraConfig
from halfbyte.errors import UnsupportedError
from halfbyte.log import logger
from halfbyte.lora.inject import inject
from halfbyte.models.announce import reads_boundaries
from halfbyte.models.decoder_layer import FusedLayer
from halfbyte.models.lazy_logits import LazyHead, LazyLogits, make_lazy
from halfbyte.models.packing_probe import require_separate
from halfbyte.models.structure import _inner, _kind, fuse
from halfbyte.optim.adamw import AdamW
from tests.models.test_models_decoder_layer import MODELS, adapted, batch, close, outcome, packed_weights, small

PARTS = ("self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm", "self_attn.q_norm")
KINDS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook")


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # attention gets its input by name, which torch does not look at
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_any_part_run_whenever_they_were_set(kind: str, part: str) -> None:
    """Before the layers are taken over: they are not, with the reason.  Afterwards: calls run as the original while the hook is there."""
    model = adapted("qwen3").train()
    late = copy.deepcopy(model)
    seen: list[str] = []
    getattr(model.model.layers[1].get_submodule(part), kind)(lambda *call: seen.append("early"))
    found = fuse(model)
    assert not found.layers and "hooks" in found.reason and part in found.reason
    assert fuse(late).layers == 3
    wanted = outcome(late, batch("packed"))
    assert not seen
    handle = getattr(late.model.layers[1].get_submodule(part), kind)(lambda *call: seen.append("late"))
    loss, _, gradients = outcome(late, batch("packed"))
    assert seen == ["late"]
    close(loss, wanted[0], 1e-5, "loss")
    for key, gradient in wanted[2].items():
        close(gradients[key], gradient, 1e-4, key)
    handle.remove()
    assert torch.equal(outcome(late, batch("packed"))[0], wanted[0]) and seen == ["late"]


def test_hooks_on_linear_layers_and_whole_layers_run_beside_own_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are called as modules, so nothing has to give way."""
    model = adapted("llama").train()
    seen: list[str] = []
    for name in ("self_attn.q_proj", "mlp.down_proj", "self_attn.o_proj.base", ""):
        model.model.layers[1].get_submodule(name).register_forward_hook(lambda *call, name=name: seen.append(name))
    assert fuse(model).layers == 3
    seen.clear()
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaAttention, "forward", lambda *call: pytest.fail("the original ran"))
    model(**batch("packed"))
    assert sorted(seen) == ["", "mlp.down_proj", "self_attn.o_proj.base", "self_attn.q_proj"]


def test_what_transformers_notes_outputs_with_is_no_hook_of_the_users() -> None:
    """It stays on the modules for good once somebody has asked for hidden states or attention weights."""
    model = adapted("llama").train()
    model.set_attn_implementation("eager")
    model(batch("plain")["input_ids"], output_attentions=True, output_hidden_states=True)
    assert model.model.layers[0].self_attn._forward_hooks
    assert fuse(model).layers == 3 and reads_boundaries(model)


def test_giving_way_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layer, the part and the cause."""
    said: list[str] = []
    monkeypatch.setattr(logger(), "warning", lambda text, *values: said.append(text % values))
    model = adapted("arcee").train()
    fuse(model)
    model.model.layers[2].self_attn.register_forward_hook(lambda *call: None)
    for _ in range(2):
        model(**batch("plain"))
    assert said == ["the decoder layers run as transformers' own: layers.2: self_attn has hooks or a forward of its own"]
    assert not reads_boundaries(model)


class _Doubled(nn.Module):
    """Somebody's wrapper around a norm that passes attributes on, as PEFT's do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.weight, self.variance_epsilon = base, base.weight, base.variance_epsilon

    def forward(self, x: Tensor) -> Any:
        return 2 * self.base(x)


def test_a_part_that_was_exchanged_afterwards_is_called() -> None:
    """Its numbers look as before, its forward is another."""
    model = adapted("llama").train()
    fused = copy.deepcopy(model)
    fuse(fused)
    for one in (model, fused):
        one.model.layers[1].input_layernorm = _Doubled(one.model.layers[1].input_layernorm)
    close(outcome(fused, batch("packed"))[0], outcome(model, batch("packed"))[0], 1e-5, "loss")


def test_norms_cast_to_float32_afterwards_act_as_the_originals() -> None:
    """As a preparation for few-bit training does it: what leaves a norm has another type then.  A whole model cast stays on own ops."""
    plain = packed_weights(small("llama", *MODELS["llama"]).to(torch.bfloat16))
    inject(plain, LoraConfig(rank=3), seed=1)
    plain.train()
    fused = copy.deepcopy(plain)
    assert fuse(fused).layers == 3
    for one in (plain, fused):
        for name, parameter in one.named_parameters():
            if "norm" in name or "lm_head" in name:
                parameter.data = parameter.data.float()
    assert not reads_boundaries(fused)
    wanted, found = outcome(plain, batch("packed")), outcome(fused, batch("packed"))
    assert torch.equal(found[0], wanted[0]) and all(torch.equal(found[2][key], wanted[2][key]) for key in wanted[2])
    for one in (plain, fused):
        one.model.embed_tokens.weight.data = one.model.embed_tokens.weight.data.float()
    assert reads_boundaries(fused)
    close(outcome(fused, batch("packed"))[0], outcome(plain, batch("packed"))[0], 1e-5, "loss")


def test_a_cache_that_is_asked_for_in_training_is_given() -> None:
    """Without being asked for there is none, as there is none to be read."""
    model = adapted("llama").train()
    fuse(model)
    ids = batch("plain")["input_ids"]
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 11
    assert model(ids).past_key_values is None


def test_classes_keep_their_names() -> None:
    """accelerate and FSDP look a layer's class up by its name; copies and pickles come back as the same class."""
    model = adapted("llama").train()
    before = [type(module).__name__ for module in model.modules()]
    fuse(model)
    make_lazy(model)
    assert [type(module).__name__ for module in model.modules()] == before
    kinds = {type(module) for module in model.modules() if type(module).__name__ in model._no_split_modules}
    assert len(kinds) == 1 and all(isinstance(layer, tuple(kinds)) for layer in model.model.layers)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 (bytes made here)
        assert [type(one) for one in twin.modules()] == [type(one) for one in model.modules()]
        assert isinstance(twin.model.layers[0], FusedLayer) and isinstance(twin.lm_head, LazyHead)
        assert torch.equal(twin(**batch("packed")).loss, model(**batch("packed")).loss)
        assert twin.model.layers[0].input_layernorm is not model.model.layers[0].input_layernorm


def test_layers_that_differ_in_their_window_alone_are_read_apart() -> None:
    """The window may stand in the config, by layer, and nowhere in the layer."""
    model = small("mistral", *MODELS["mistral-window"])
    for number, attention in enumerate(layer.self_attn for layer in model.model.layers):
        attention.config = copy.deepcopy(model.config)
        attention.config.sliding_window = 3 if number else None
        vars(attention).pop("sliding_window", None)
    kinds = [_kind(layer) for layer in model.model.layers]
    assert kinds[0] != kinds[1] == kinds[2]


@pytest.mark.parametrize("kind", ["parameter", "buffer", "module"])
def test_an_mlp_with_numbers_of_its_own_is_called_as_a_module(kind: str) -> None:
    """A scale of ones changes nothing until it learns: the probe cannot see it."""
    model = small("llama", *MODELS["llama"])
    for layer in model.model.layers:
        mlp = layer.mlp
        assert _inner(mlp) == ("gate_proj", "up_proj")
        if kind == "parameter":
            mlp.scale = nn.Parameter(torch.ones(32))
        elif kind == "buffer":
            mlp.register_buffer("scale", torch.ones(32))
        else:
            mlp.scale = nn.PReLU()
    found = fuse(model)
    assert (found.layers, found.gated) == (3, 0)


def test_a_cap_that_no_reading_knows_is_a_reason() -> None:
    """A cap of 50 moves small scores by less than the probe allows."""
    config = transformers.Gemma2Config(**{**MODELS["gemma2"][1], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
                                          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2})  # fmt: skip
    model = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    assert fuse(copy.deepcopy(model)).layers == 2
    for layer in model.model.layers:
        del layer.self_attn.attn_logit_softcapping
    found = fuse(model)
    assert not found.layers and "attn_logit_softcapping" in found.reason


@pytest.mark.parametrize("name", ["llama", "llama-bias"])
def test_logits_are_right_after_the_vocabulary_was_resized(name: str) -> None:
    """Own and tied heads, before and after; the head is another module or has other rows."""
    plain = adapted(name).train()
    lazy = copy.deepcopy(plain)
    make_lazy(lazy)
    for size in (120, 64):
        for one in (plain, lazy):
            torch.manual_seed(0)
            one.resize_token_embeddings(size, mean_resizing=False)
        inputs = {key: value % 64 if key == "input_ids" else value.clamp(max=63) for key, value in batch("plain").items()}
        logits, wanted = lazy(**inputs).logits, plain(**inputs).logits
        assert logits.shape == wanted.shape == (2, 11, size)
        close(logits + 0, wanted, 1e-5, "logits")
        make_lazy(lazy)
        close(lazy(**inputs).loss, plain(**inputs).loss, 1e-5, "loss")


def test_lazy_logits_are_those_of_the_head_that_made_them() -> None:
    """Another head, or another weight in it, later on: what was promised before is what is given."""
    model = adapted("llama").train()
    make_lazy(model)
    ids = batch("plain")["input_ids"]
    wanted = model(ids).logits + 0
    promised, promised_too = model(ids).logits, model(ids).logits
    model.lm_head.weight = nn.Parameter(torch.randn(96, 32))
    close(promised + 0, wanted, 1e-6, "logits")
    model.resize_token_embeddings(120, mean_resizing=False)
    close(promised_too + 0, wanted, 1e-6, "logits")
    assert isinstance(promised, LazyLogits)


def test_logits_of_weights_that_have_moved_are_refused() -> None:
    """In full fine-tuning a step changes the head in place: the logits from before it cannot be made any more."""
    model = small("llama", *MODELS["llama"]).train()
    make_lazy(model)
    for optimizer in (AdamW(model.parameters(), lr=1e-2), torch.optim.AdamW(model.parameters(), lr=1e-2)):
        early, late = model(**batch("plain")), model(**batch("plain"))
        wanted = early.logits + 0
        (early.loss + late.loss).backward()
        optimizer.step()
        assert torch.equal(early.logits + 0, wanted)
        with pytest.raises(UnsupportedError) as caught:
            late.logits + 0
        assert caught.value.code == "E-UNSUP-062"


def test_dropout_of_an_adapter_acts() -> None:
    """T32: own ops know none, so a layer with it is called as a module."""
    model = small("llama", *MODELS["llama"])
    inject(model, LoraConfig(rank=3, dropout=0.5), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.fill_(1.0)
    assert fuse(model).layers == 3
    ids = batch("plain")["input_ids"]
    model.eval()
    assert torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    model.train()
    assert not torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("whole", ["embed_tokens", "lm_head"])
def test_layers_are_taken_over_where_a_table_is_trained_whole(whole: str) -> None:
    model = small("llama", *MODELS["llama"])
    inject(model, LoraConfig(rank=3, alpha=5, fully_trained=(whole,)), seed=1)
    assert fuse(model).layers == 3
    require_separate(model)
