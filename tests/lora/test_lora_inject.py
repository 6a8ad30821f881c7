"""What is wrapped, what trains, how it begins, and that a model comes back as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft_oracle import IDS, gpt2, llama, mixtral, off, peft_load, quantized, qwen2, save_peft, untrained_peft, with_peft
from torch import Tensor, nn

from halfbyte.adapters.folder import load_adapter, save_adapter, task_of
from halfbyte.config.lora import LoraConfig
from halfbyte.config.quant import QuantConfig
from halfbyte.errors import AdapterError, HalfbyteError, TargetError, UnsupportedError
from halfbyte.lora.inject import config_of, eject, inject, total_parameters, updates
from halfbyte.lora.layer import LoraLinear
from halfbyte.lora.targets import condensed, matches, resolve
from halfbyte.lora.tensors import adapter_tensors, collected, live_tensors, load_adapter_tensors
from halfbyte.quant.dense import dense_weight
from halfbyte.quant.experts import QuantExperts, is_experts
from halfbyte.quant.linear import QuantLinear
from halfbyte.surgery import modules_of, replace


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def classifier() -> nn.Module:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    return LlamaForSequenceClassification(llama().config).eval()


# --- which modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2, qwen2, classifier])
def test_all_linear_means_what_peft_means(make: object) -> None:
    """T46, T56: every linear layer but the head; the fresh head of a classifier is trained whole, as PEFT does."""
    model = make()  # type: ignore[operator]
    task = "SEQ_CLS" if make is classifier else "CAUSAL_LM"
    theirs = untrained_peft(make(), target_modules="all-linear", task=task, fan_in_fan_out=make is gpt2)  # type: ignore[operator]
    expected = [name.removeprefix("base_model.model.") for name, module in theirs.named_modules() if hasattr(module, "lora_A")]
    done = inject(model, LoraConfig(rank=8, alpha=8))
    assert sorted(done.names) == sorted(expected)
    trainable, total = theirs.get_nb_trainable_parameters()
    assert (done.trainable_params, done.total_params) == (trainable, total)
    assert config_of(model).fully_trained == (("score",) if make is classifier else ())


def test_all_linear_reaches_the_experts_and_not_the_router() -> None:
    """T56: fused experts are linear layers that lost their modules; a router is left alone."""
    names = inject(mixtral(), LoraConfig(rank=2)).names
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert len(names) == 2 * 6


@pytest.mark.parametrize("pattern,name,expected", [
    ("q_proj", "a.q_proj", True), ("q_proj", "q_proj", True), ("q_proj", "a.my_q_proj", False), ("proj", "a.q_proj", False),
    ("classifier", "classifier2", False), ("classifier", "x.classifier", True), (r".*\.[qk]_proj", "a.k_proj", True), (r"[qk]_proj",
        "a.k_proj", False),
])  # fmt: skip
def test_names_are_matched_whole(pattern: str, name: str, expected: bool) -> None:
    """T46, T66: exact names or whole endings, never a substring."""
    assert matches(pattern, name) is expected


def test_condensed_names_mean_exactly_the_chosen() -> None:
    names = ["a.0.q", "a.1.q", "a.0.xq", "a.0.k", "a.1.k"]
    assert condensed(["a.0.q", "a.1.q"], names) == ["q"]
    assert condensed(["a.1.q"], names) == ["a.1.q"]
    assert condensed(["a.0.q", "a.1.q", "a.1.k"], names) == ["a.0.q", "a.1.k", "a.1.q"]


@pytest.mark.parametrize("settings,code,said", [
    ({"targets": ("q_porj",)}, "E-TARGET-001", "did you mean q_proj"), ({"targets": ("q_proj", "nothing")}, "E-TARGET-001", "nothing"),
    ({"targets": ("mlp",)}, "E-TARGET-002", "model.layers.0.mlp"), ({"targets": ("input_layernorm",)}, "E-TARGET-002", "linear layer"),
    ({"targets": ("q_proj",), "exclude": ("q_proj",)}, "E-TARGET-003", "none of 2 left"), ({"layers": (7,)}, "E-TARGET-003", "none of 14"),
    ({"exclude": ("q_prj",)}, "E-TARGET-001", "q_prj"), ({"fully_trained": ("lm_haed",)}, "E-TARGET-001", "did you mean lm_head"),
    ({"targets": r"q_proj("}, "E-TARGET-005", "q_proj("),
])  # fmt: skip
def test_a_target_that_matches_nothing_is_an_error(settings: dict[str, object], code: str, said: str) -> None:
    model = llama()
    before = logits_of(model)
    with pytest.raises(HalfbyteError) as caught:
        inject(model, LoraConfig(rank=2, **settings))
    assert caught.value.code == code
    assert said in str(caught.value)
    assert torch.equal(logits_of(model), before)


def test_layers_and_exclude_choose() -> None:
    assert resolve(llama(), LoraConfig(layers=(1,), targets=("q_proj", "k_proj"),
        exclude=("k_proj",))) == ["model.layers.1.self_attn.q_proj"]


# --- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make,config", [
    (llama, LoraConfig(rank=2)), (gpt2, LoraConfig(rank=2, train_bias="all")), (llama, LoraConfig(rank=2, dora=True, lora_bias=False)),
    (lambda: quantized(llama()), LoraConfig(rank=2)), (mixtral, LoraConfig(rank=2, targets=("all-linear", "gate_up_proj", "down_proj"))),
    (llama, LoraConfig(rank=2, init="pissa", fully_trained=("norm",), targets=("v_proj", "up_proj"))),
])  # fmt: skip
def test_every_trained_tensor_moves_and_nothing_else(make: object, config: LoraConfig) -> None:
    """T34: after two steps all factors have changed; the base has not, to the bit."""
    model = make()  # type: ignore[operator]
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject(model, config)
    own = live_tensors(model)
    before = {name: tensor.detach().clone() for name, tensor in own.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert [name for name, tensor in own.items() if isinstance(tensor, nn.Parameter) and tensor.grad is None] == []
        optimizer.step()
    still = [name for name, tensor in own.items() if torch.equal(tensor, before[name]) and ".start_" not in name]
    assert still == []
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(t) for t in own.values() if isinstance(t, nn.Parameter)}
    eject(model)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 3)])
def test_any_leading_shape_is_served(leading: tuple[int, ...], dora: bool) -> None:
    """Like nn.Linear: one vector, none, or any number of them."""
    layer = LoraLinear(nn.Linear(4, 6), LoraConfig(rank=2, alpha=2, dora=dora))
    nn.init.normal_(layer.lora_a), nn.init.normal_(layer.lora_b), layer.start_magnitude()
    x = torch.randn(*leading, 4)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ layer.delta_weight().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_float32_whatever_the_base(dtype: torch.dtype) -> None:
    """T37, T38: trained parameters never follow a 16-bit base; a small step on them is not rounded away."""
    model = llama().to(dtype)
    inject(model, LoraConfig(rank=2, fully_trained=("norm",)))
    own = live_tensors(model)
    assert {tensor.dtype for tensor in own.values()} == {torch.float32}
    weight = own["model.norm.weight"]
    with torch.no_grad():
        before = weight.clone()
        weight -= 2e-5
    assert not torch.equal(weight, before)
    assert inject_dtype(LoraConfig(rank=2, dtype="bfloat16")) == {torch.bfloat16}


def inject_dtype(config: LoraConfig) -> set[torch.dtype]:
    model = llama().bfloat16()
    inject(model, config)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {tensor.dtype for tensor in live_tensors(model).values()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("base", ["float32", "float16", "bfloat16", "nf4", "nf4 of bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
def test_compute_type_is_never_read_from_a_packed_weight(biased: bool, base: str, autocast: bool) -> None:
    """T39: the answer keeps the base's type and its values over all kinds of base, with and without autocast."""
    model = llama()
    model = model.to(getattr(torch, base.rpartition(" ")[2] if base != "nf4" else "float32"))
    model = quantized(model) if base.startswith("nf4") else model
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = logits_of(model)
        inject(model, LoraConfig(rank=2, lora_bias=biased))
        after = logits_of(model)
        assert after.dtype == before.dtype
        assert torch.equal(after, before)
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(bool(torch.isfinite(tensor.grad).all()) for tensor in live_tensors(model).values())


def test_dropout_acts_in_training_only() -> None:
    """T31, T32: eval is bitwise repeatable with dropout 0.9; training is not."""
    model = llama()
    inject(model, LoraConfig(rank=4, dropout=0.9))
    with torch.no_grad():
        for tensor in live_tensors(model).values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    assert torch.equal(logits_of(model), logits_of(model))
    model.train()
    assert not torch.equal(logits_of(model), logits_of(model))


# --- how it begins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa"])
@pytest.mark.parametrize("make", [llama, gpt2, lambda: quantized(llama())])
@pytest.mark.parametrize("dora", [False, True])
def test_the_first_forward_equals_the_base(init: str, make: object, dora: bool) -> None:
    model = make()  # type: ignore[operator]
    before = logits_of(model)
    inject(model, LoraConfig(rank=4, alpha=3, init=init, dora=dora))  # type: ignore[arg-type]
    assert off(logits_of(model), before) < 2e-6


def test_starts_have_the_published_spread() -> None:
    model = llama(hidden_size=256, num_hidden_layers=1)
    inject(model, LoraConfig(rank=64, targets=("q_proj", "embed_tokens")))
    own = live_tensors(model)
    drawn = own["model.layers.0.self_attn.q_proj.lora_a"].detach()
    assert float(drawn.abs().max()) <= 1 / 16
    assert float(drawn.std()) == pytest.approx(1 / 16 / 3**0.5, rel=0.02)
    assert not own["model.embed_tokens.lora_a"].any()
    assert float(own["model.embed_tokens.lora_b"].detach().std()) == pytest.approx(1, rel=0.02)
    eject(model)
    inject(model, LoraConfig(rank=64, targets=("q_proj",), init="gaussian"))
    assert float(live_tensors(model)["model.layers.0.self_attn.q_proj.lora_a"].detach().std()) == pytest.approx(1 / 64, rel=0.02)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_equals_peft(rslora: bool) -> None:
    """The trained product starts at PEFT's, and what is left of the base is PEFT's residual."""
    theirs = untrained_peft(llama(), r=4, lora_alpha=6, use_rslora=rslora, target_modules=["q_proj"], init_lora_weights="pissa")
    model = llama()
    inject(model, LoraConfig(rank=4, alpha=6, rslora=rslora, targets=("q_proj",), init="pissa"))
    ours = updates(model)["model.layers.0.self_attn.q_proj"]
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    residual = dense_weight(ours.frozen_base) - ours.scaling * ours.start_b @ ours.start_a
    assert off(residual, layer.base_layer.weight) < 1e-5
    assert off(ours.scaling * ours.lora_b @ ours.lora_a, layer.get_delta_weight("default")) < 1e-5


def test_loftq_is_nearer_to_the_dense_model_than_plain_quantization(tmp_path: Path) -> None:
    dense = llama()
    weight = dense.get_submodule("model.layers.0.mlp.up_proj").weight.detach().clone()
    plain = dense_weight(QuantLinear.from_linear(dense.get_submodule("model.layers.0.mlp.up_proj"), "nf4", 64, True, ""))
    errors = [off(plain, weight)]
    for rounds in (1, 5):
        model = llama()
        inject(model, LoraConfig(rank=16, alpha=24, init="loftq", loftq_iterations=rounds), quant=QuantConfig(format="nf4"))
        layer = updates(model)["model.layers.0.mlp.up_proj"]
        assert isinstance(layer.frozen_base, QuantLinear)
        errors.append(off(dense_weight(layer.frozen_base) + layer.delta_weight(), weight))
    assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2]
    save_adapter(model, tmp_path / "adapter")
    assert "LoftQ" in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(UnsupportedError, match="E-UNSUP-045"):
        inject(quantized(llama()), LoraConfig(rank=2, init="loftq"))


def test_the_start_depends_on_the_seed_alone() -> None:
    """T46: processes with different hash seeds start from identical factors; another seed gives others."""
    script = (
        "import sys, hashlib, torch; from torch import nn; from halfbyte.config.lora import LoraConfig;"
        "from halfbyte.lora.inject import eject, inject; from halfbyte.lora.tensors import adapter_tensors;"
        "line = lambda: nn.Linear(6, 6);"
        "m = nn.ModuleDict({'v_proj': line(), 'a': line(), 'q_proj': line(), 'embed_tokens': nn.Embedding(5, 6)});"
        "digest = lambda: hashlib.sha256(b''.join(n.encode() + t.numpy().tobytes() for n, t in adapter_tensors(m).items())).hexdigest();"
        "c = LoraConfig(rank=2, targets=('q_proj', 'embed_tokens', 'v_proj', 'a'));"
        "inject(m, c, seed=0); print(digest()); eject(m); inject(m, c, seed=5); print(digest())"
    )
    found = []
    for hash_seed in ("1", "2"):
        env = dict(os.environ, PYTHONHASHSEED=hash_seed, PYTHONPATH=str(Path(__file__).parents[2]))
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        found.append(done.stdout.split())
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


# --- collecting and loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change,said", [
    (lambda held: {f"other.{name}": tensor for name, tensor in held.items()}, "0 of 28 tensors match"),
    (lambda held: dict(list(held.items())[1:]), "27 of 28 tensors match; 1 missing"),
    (lambda held: held | {"x.lora_a": torch.ones(1)}, "1 not in the model: x.lora_a"),
    (lambda held: {name: tensor[:1] for name, tensor in held.items()}, "E-ADAPT-011"),
    (lambda held: {name: tensor * float("nan") for name, tensor in held.items()}, "E-ADAPT-012"),
])  # fmt: skip
def test_loading_is_strict_and_leaves_the_model_alone(change: object, said: str) -> None:
    """T65: counts and names of what does not agree."""
    model = llama()
    inject(model, LoraConfig(rank=2))
    before = adapter_tensors(model)
    with pytest.raises(AdapterError) as caught:
        load_adapter_tensors(model, change(dict(before)))  # type: ignore[operator]
    assert said in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(model).items())


def test_one_adapter_at_a_time() -> None:
    model = llama()
    inject(model, LoraConfig(rank=2))
    with pytest.raises(AdapterError, match="E-ADAPT-004"):
        inject(model, LoraConfig(rank=2))
    with pytest.raises(AdapterError, match="E-ADAPT-003"):
        config_of(llama())


def test_refused_combinations() -> None:
    with pytest.raises(UnsupportedError, match="E-UNSUP-042"):
        inject(mixtral(), LoraConfig(rank=2, dropout=0.1, targets=("experts.down_proj",)))
    with pytest.raises(UnsupportedError, match="E-UNSUP-040"):
        inject(llama(), LoraConfig(rank=2, init="pissa", targets=("embed_tokens",)))
    with pytest.raises(AdapterError, match="E-ADAPT-002"):
        inject(llama(), LoraConfig(rank=65, init="pissa", targets=("q_proj",)))
    with pytest.raises(TargetError, match="E-TARGET-004"):
        inject(quantized(llama()), LoraConfig(rank=2, targets=("q_proj",), fully_trained=("up_proj",)))


@pytest.mark.parametrize("make,config,code", [
    (llama, LoraConfig(rank=48, init="pissa", fully_trained=("lm_head",)), "E-ADAPT-002"),
    (llama, LoraConfig(rank=48, init="loftq"), "E-ADAPT-002"),  # by then q_proj has exchanged its base
    (llama, LoraConfig(rank=2, init="calibrated"), "E-UNSUP-049"),
    (mixtral, LoraConfig(rank=2, dropout=0.1), "E-UNSUP-042"),
    (lambda: quantized(llama()), LoraConfig(rank=2, targets=("q_proj",), fully_trained=("norm", "up_proj")), "E-TARGET-004"),
])  # fmt: skip
def test_what_cannot_begin_leaves_the_model_as_it_was(make: object, config: LoraConfig, code: str) -> None:
    """Each module is the one that stood there, what trained trains, and a corrected call goes through."""
    model = make()  # type: ignore[operator]
    modules = dict(model.named_modules())
    asking = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(HalfbyteError) as caught:
        inject(model, config)
    assert caught.value.code == code
    after = dict(model.named_modules())
    assert list(after) == list(modules)
    assert all(after[name] is modules[name] for name in modules)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == asking
    assert inject(model, LoraConfig(rank=2)).names


def test_an_adapter_that_cannot_be_put_in_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """The base that init loftq makes for it goes too."""
    for init, whole in (("default", ("lm_head",)), ("loftq", ("norm",))):
        trained = llama()
        inject(trained, LoraConfig(rank=2, init=init, fully_trained=whole))  # type: ignore[arg-type]
        save_adapter(trained, tmp_path / init, allow_untrained=True)
    packed = llama()
    replace(packed, "lm_head", QuantLinear.from_linear(packed.lm_head, "nf4", 64, True, "lm_head"))
    wider = llama()
    wider.model.norm = nn.LayerNorm(64)
    for model, name, code in ((packed, "default", "E-TARGET-004"), (wider, "loftq", "E-ADAPT-010")):
        modules = list(model.modules())
        asking = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises(HalfbyteError) as caught:
            load_adapter(model, tmp_path / name, allow_untrained=True)
        assert caught.value.code == code
        assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
        assert [parameter.requires_grad for parameter in model.parameters()] == asking


@pytest.mark.parametrize("damage,code", [
    (lambda: llama(num_hidden_layers=1), "E-ADAPT-063"), (lambda: llama(hidden_size=32), "E-ADAPT-011"), (gpt2, "E-ADAPT-063"),
    (lambda: llama(vocab_size=80), "E-ADAPT-011"),
])  # fmt: skip
def test_an_adapter_of_another_base_is_refused_and_nothing_stays(damage: object, code: str, tmp_path: Path) -> None:
    """T64, T65: other depth, width, architecture or vocabulary."""
    model = llama()
    inject(model, LoraConfig(rank=2, fully_trained=("lm_head",)))
    save_adapter(model, tmp_path / "adapter", allow_untrained=True)
    other = damage()  # type: ignore[operator]
    before = logits_of(other)
    with pytest.raises(AdapterError) as caught:
        load_adapter(other, tmp_path / "adapter")
    assert caught.value.code == code
    assert torch.equal(logits_of(other), before)
    assert not updates(other)


def test_digest_of_the_base_is_compared(tmp_path: Path) -> None:
    model = llama()
    inject(model, LoraConfig(rank=2))
    save_adapter(model, tmp_path / "adapter", base_digest="12ab" * 16, base_name="llama-a", allow_untrained=True)
    with pytest.raises(AdapterError, match="trained on llama-a"):
        load_adapter(llama(), tmp_path / "adapter", base_digest="99cd" * 16, allow_untrained=True)
    load_adapter(llama(), tmp_path / "adapter", base_digest="99cd" * 16, allow_other_base=True, allow_untrained=True)
    load_adapter(llama(), tmp_path / "adapter", base_digest="12ab" * 16, allow_untrained=True)


def test_stored_base_tables_must_be_the_models_own(tmp_path: Path) -> None:
    """T64: PEFT writes the whole table beside an adapted embedding; another table is another base."""
    save_peft(with_peft(llama(), r=2, target_modules=["embed_tokens"]), tmp_path)
    load_adapter(llama(), tmp_path)
    other = llama()
    with torch.no_grad():
        other.get_input_embeddings().weight[3] += 1
    with pytest.raises(AdapterError, match="E-ADAPT-064"):
        load_adapter(other, tmp_path)


def test_classifiers_go_both_ways_with_peft(tmp_path: Path) -> None:
    model = classifier()
    inject(model, LoraConfig(rank=2, alpha=4))
    with torch.no_grad():
        for tensor in live_tensors(model).values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    assert task_of(model) == "sequence-classification"
    expected = logits_of(model)
    save_adapter(model, tmp_path / "ours")
    assert off(logits_of(peft_load(classifier(), tmp_path / "ours")), expected) < 1e-5
    assert off(logits_of(classifier()), expected) > 1e-3
    theirs = with_peft(classifier(), task="SEQ_CLS", r=2, lora_alpha=8, target_modules="all-linear")
    save_peft(theirs, tmp_path / "theirs")
    again = classifier()
    load_adapter(again, tmp_path / "theirs")
    assert off(logits_of(again), logits_of(theirs)) < 1e-5


def test_a_deep_copy_keeps_its_adapter() -> None:
    import copy

    model = llama()
    inject(model, LoraConfig(rank=2, ranks={"q_proj": 3}))
    twin = copy.deepcopy(model)
    assert config_of(twin) == config_of(model)
    assert collected(twin).config.ranks == {f"model.layers.{n}.self_attn.q_proj": 3 for n in (0, 1)}


@pytest.mark.parametrize("make", [llama, mixtral])
def test_packed_weights_count_as_what_they_stand_for(make: object) -> None:
    dense, packed = make(), quantized(make())  # type: ignore[operator]
    for name, module in modules_of(packed, lambda _, module: is_experts(module)):
        replace(packed, name, QuantExperts.from_experts(module, name=name))
    assert total_parameters(packed) == total_parameters(dense) == sum(parameter.numel() for parameter in dense.parameters())
