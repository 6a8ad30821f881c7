"""The state machine of several adapters: every sequence of operations ends where a model of it says, with the logits of a fresh load."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.adapters.folder import load_adapter, save_adapter
from halfbyte.adapters.store import AdapterStore
from halfbyte.config.lora import LoraConfig
from halfbyte.errors import AdapterError, TargetError
from halfbyte.lora.inject import inject
from halfbyte.lora.tensors import live_tensors
from halfbyte.quant.linear import QuantLinear
from halfbyte.surgery import replace

IDS = torch.tensor([[3, 17, 30, 9, 41]])
CONFIGS = {
    "a": LoraConfig(rank=2, alpha=4, targets=("q_proj",)), "ab": LoraConfig(rank=3, alpha=4, targets=("q_proj", "v_proj"), dora=True),
    "a.b": LoraConfig(rank=2, alpha=8, targets=("embed_tokens",)), "b": LoraConfig(rank=2, alpha=4, fully_trained=("lm_head",)),
}  # fmt: skip


def base() -> nn.Module:
    torch.manual_seed(2)
    return LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
                                        vocab_size=48, tie_word_embeddings=False)).eval()  # fmt: skip


def write(folder: Path, config: LoraConfig, seed: int) -> Tensor:
    """An adapter folder with random values; returns the logits a fresh load gives."""
    model = base()
    inject(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in live_tensors(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    save_adapter(model, folder)
    fresh = base()
    load_adapter(fresh, folder)
    return logits_of(fresh)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


class Model:
    """What a store should be, in a few lines: the oracle."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.active: str | None = None
        self.merged = False
        self.loaded: dict[str, int] = {}

    def allowed(self, operation: str, name: str | None) -> bool:
        known = name in self.names
        return {
            "add": not known, "reload": known and not self.merged, "remove": known and name != self.active,
            "activate": (known or name is None) and not self.merged, "merge": self.active is not None and not self.merged,
            "unmerge": self.merged,
        }[operation]  # fmt: skip

    def apply(self, operation: str, name: str | None, version: int) -> None:
        if operation == "add":
            self.names.append(str(name))
        if operation in ("add", "reload"):
            self.loaded[str(name)] = version
        if operation == "remove":
            self.names.remove(str(name))
        if operation == "activate":
            self.active = name
        if operation in ("merge", "unmerge"):
            self.merged = operation == "merge"


@pytest.mark.parametrize("seed", [0, 1])
def test_500_random_operations_against_a_model(seed: int, tmp_path: Path) -> None:
    """T67: after each of 500 operations (250 per seed) state and logits are the oracle's; refused ones change nothing.  T66: a, ab, a.b."""
    chance = random.Random(seed)
    fresh = {(name, version): write(tmp_path / f"{name}_{version}", config, 7 * version + place)
             for place, (name, config) in enumerate(CONFIGS.items()) for version in (0, 1)}  # fmt: skip
    versions = dict.fromkeys(CONFIGS, 0)
    store, oracle, plain = AdapterStore(base()), Model(), logits_of(base())
    refused = 0
    for step in range(250):
        operation = chance.choice(("add", "reload", "remove", "activate", "activate", "merge", "unmerge"))
        name = chance.choice([*CONFIGS, None]) if operation == "activate" else chance.choice(list(CONFIGS))
        if name is not None and chance.random() < 0.3:
            versions[name] ^= 1  # the folder changes on disk; nobody may notice before a reload
        link = tmp_path / str(name)
        link.unlink(missing_ok=True)
        if name is not None:
            link.symlink_to(tmp_path / f"{name}_{versions[name]}")
        arguments = {"add": (name, link), "merge": (), "unmerge": ()}.get(operation, (name,))
        place = f"seed {seed}, step {step}: {operation} {name}"
        if oracle.allowed(operation, name):
            getattr(store, operation)(*arguments)
            oracle.apply(operation, name, versions.get(str(name), 0))
        else:
            refused += 1
            with pytest.raises(AdapterError):
                getattr(store, operation)(*arguments)
        assert (list(store.names), store.active, store.merged) == (oracle.names, oracle.active, oracle.merged), place
        expected = plain if oracle.active is None else fresh[oracle.active, oracle.loaded[oracle.active]]
        found = logits_of(store.model)
        assert torch.equal(found, expected) or (oracle.merged and torch.allclose(found, expected, atol=1e-5)), place
    assert refused > 20


def test_the_base_comes_back_to_the_bit(tmp_path: Path) -> None:
    """T67: activate and eject leave every tensor of the base as it was."""
    model = base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    store = AdapterStore(model)
    for name, config in CONFIGS.items():
        write(tmp_path / name, config, 3)
        store.add(name, tmp_path / name)
        store.activate(name)
        store.merge()
        store.unmerge()
    store.activate(None)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_that_does_not_fit_leaves_the_former_one_acting(tmp_path: Path) -> None:
    """T67: a failed switch or reload is no switch."""
    expected = write(tmp_path / "good", CONFIGS["a"], 1)
    store = AdapterStore(base())
    store.add("good", tmp_path / "good")
    store.activate("good")
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
                                         vocab_size=48))  # fmt: skip
    inject(model, LoraConfig(rank=2, alpha=4))
    save_adapter(model, tmp_path / "other", allow_untrained=True)
    with pytest.raises(AdapterError):
        store.add("other", tmp_path / "other")
    assert store.active == "good"
    assert torch.equal(logits_of(store.model), expected)


def test_an_adapter_that_cannot_act_leaves_the_former_one_acting(tmp_path: Path) -> None:
    """Also where it is the base that refuses: a packed head cannot be trained whole."""
    for name in ("a", "b"):
        write(tmp_path / name, CONFIGS[name], 1)
    write(tmp_path / "again", CONFIGS["b"], 2)
    model = base()
    replace(model, "lm_head", QuantLinear.from_linear(model.get_submodule("lm_head"), "nf4", 64, True, "lm_head"))
    store = AdapterStore(model)
    for name in ("a", "b"):
        store.add(name, tmp_path / name)
    store.activate("a")
    expected = logits_of(model)
    with pytest.raises(TargetError, match="E-TARGET-004"):
        store.activate("b")
    assert store.active == "a"
    assert torch.equal(logits_of(model), expected)
    shutil.copytree(tmp_path / "again", tmp_path / "a", dirs_exist_ok=True)
    with pytest.raises(TargetError, match="E-TARGET-004"):
        store.reload("a")
    assert store.active == "a"
    assert torch.equal(logits_of(model), expected)
