"""Truncation of an adapter: exact where the rank stays, nearest where it does not, the same scale for every reader."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from halfbyte.adapters.folder import load_adapter, save_adapter
from halfbyte.adapters.truncate import open_folder
from halfbyte.config.lora import LoraConfig
from halfbyte.errors import AdapterError, StorageError
from halfbyte.lora.inject import inject, updates
from halfbyte.lora.merge import merge
from halfbyte.lora.truncate import joint_ranks, shortened, spectrum, truncated
from halfbyte.surgery import trainable

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning", "ignore:.*fan_in_fan_out:UserWarning")
IDS = torch.arange(3, 23)[None]


def trained(tiny_llama, seed: int = 1, **settings: object):
    """A model whose adapter has values everywhere."""
    model = tiny_llama()
    inject(model, LoraConfig(**{"rank": 8, "alpha": 16.0, **settings}), seed=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def factors(out: int, size: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, size, generator=generator), torch.randn(out, rank, generator=generator)


@pytest.mark.parametrize(("out", "size", "rank"), [(40, 30, 7), (6, 50, 12), (50, 6, 12), (1, 9, 3), (8, 8, 8)])
def test_the_spectrum_is_numpys_of_the_whole_product(out: int, size: int, rank: int) -> None:
    lora_a, lora_b = factors(out, size, rank)
    whole = 2.5 * (lora_b.double() @ lora_a.double()).numpy()
    parts = spectrum(lora_a, lora_b, 2.5)
    expected = np.linalg.svd(whole, compute_uv=False)[: parts.values.numel()]
    assert parts.values.numel() == min(rank, out, size)
    np.testing.assert_allclose(parts.values.numpy(), expected, rtol=1e-10, atol=1e-10)
    again = (parts.left * parts.values) @ parts.right
    np.testing.assert_allclose(again.numpy(), whole, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_truncation_is_the_nearest_matrix_of_its_rank(rank: int) -> None:
    lora_a, lora_b = factors(20, 15, 7)
    whole = 0.5 * lora_b.double() @ lora_a.double()
    parts = spectrum(lora_a, lora_b, 0.5)
    short_a, short_b = shortened(parts, rank, 0.5, torch.float64)
    error = float((whole - 0.5 * short_b @ short_a).norm())
    u, s, vh = np.linalg.svd(whole.numpy(), full_matrices=False)
    nearest = np.linalg.norm(whole.numpy() - (u[:, :rank] * s[:rank]) @ vh[:rank])
    assert error == pytest.approx(nearest, rel=1e-9)
    assert error == pytest.approx(math.sqrt(parts.left_out(rank)) * float(whole.norm()), rel=1e-9)
    # and no other choice of singular directions, nor a random matrix of that rank fitted to it, comes nearer
    for chosen in itertools.combinations(range(7), rank):
        kept = list(chosen)
        assert np.linalg.norm(whole.numpy() - (u[:, kept] * s[kept]) @ vh[kept]) >= nearest - 1e-9
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(20, rank)))[0]
    assert np.linalg.norm(whole.numpy() - basis @ (basis.T @ whole.numpy())) > nearest


def test_joint_ranks_lose_least_for_their_parameters() -> None:
    sizes = {"a": (12, 8), "b": (12, 8), "c": (12, 8)}
    parts = {name: spectrum(*factors(*size, 4, seed), scaling) for seed, (name, size, scaling) in
             enumerate((n, s, f) for (n, s), f in zip(sizes.items(), (1.0, 0.2, 3.0)))}  # fmt: skip

    def lost(ranks: tuple[int, ...]) -> float:
        return sum(float(parts[name].values[rank:].square().sum()) for name, rank in zip(parts, ranks))

    best = min(lost(ranks) for ranks in itertools.product(range(1, 5), repeat=3) if sum(ranks) <= 6)
    found = joint_ranks(parts, 2)
    assert sum(found.values()) <= 6 and min(found.values()) >= 1
    assert lost(tuple(found.values())) == pytest.approx(best)
    assert found["c"] > found["b"]


VARIANTS = {"plain": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "lora_bias": {"lora_bias": True},
            "biases": {"train_bias": "lora_only", "targets": ("q_proj",)}, "head": {"targets": ("q_proj", "lm_head")},
            "whole": {"fully_trained": ("lm_head",)}, "pissa": {"init": "pissa"},
            "mixed": {"ranks": {"q_proj": 4}, "alphas": {"v_proj": 5.0}}, "embedding": {"targets": ("embed_tokens", "q_proj")}}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rank_that_is_not_reduced_changes_no_bit(variant: str, tiny_llama, tmp_path: Path) -> None:
    """# T29: ranks and alphas of modules stay."""
    model = trained(tiny_llama, **VARIANTS[variant])
    whole = open_folder(save_adapter(model, tmp_path / "old", base_name="tiny"))
    for joint in (False, True):
        out = tmp_path / f"new-{joint}"
        whole.write(whole.cut(max(whole.ranks.values()), joint=joint), out)
        assert (out / "adapter_model.safetensors").read_bytes() == (tmp_path / "old" / "adapter_model.safetensors").read_bytes()
        assert (out / "adapter_config.json").read_bytes() == (tmp_path / "old" / "adapter_config.json").read_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("joint", [False, True])
def test_a_truncated_adapter_acts_as_the_nearest_update(variant: str, joint: bool, tiny_llama, tmp_path: Path) -> None:
    """# T28, T29, T30: the scale stays, whatever the variant; the other trained parts stay.  PEFT reads the same."""
    from peft import PeftModel

    model = trained(tiny_llama, **VARIANTS[variant])
    whole = open_folder(save_adapter(model, tmp_path / "old", base_name="tiny"))
    cut = whole.cut(3, joint=joint)
    whole.write(cut, tmp_path / "new")
    short = tiny_llama()
    load_adapter(short, tmp_path / "new")
    for name, layer in updates(short).items():
        full = updates(model)[name].delta_weight().double()
        u, s, vh = torch.linalg.svd(full, full_matrices=False)
        rank = cut.ranks[name]
        nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert layer.rank == rank and layer.scaling == pytest.approx(updates(model)[name].scaling)
        torch.testing.assert_close(layer.delta_weight().double(), nearest, atol=2e-5, rtol=0)
    names = [name for name in whole.adapter.tensors if not name.endswith((".lora_a", ".lora_b"))]
    assert all(torch.equal(cut.tensors[name], whole.adapter.tensors[name]) for name in names)
    if variant in ("lora_bias", "embedding", "head"):  # PEFT warns, or wants the table beside
        return
    theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "new")).eval()
    with torch.no_grad():
        torch.testing.assert_close(short.eval()(IDS).logits, theirs(IDS).logits, atol=2e-5, rtol=0)


def test_uniform_truncation_of_ranks_that_differ(tiny_llama, tmp_path: Path) -> None:
    """# T29"""
    model = trained(tiny_llama, **VARIANTS["mixed"])
    whole = open_folder(save_adapter(model, tmp_path / "old", base_name="tiny"))
    cut = whole.cut(6)
    kept = {name for name, rank in cut.ranks.items() if rank == 4}
    assert kept and all(name.endswith("q_proj") for name in kept)
    assert {rank for name, rank in cut.ranks.items() if name not in kept} == {6}
    assert cut.parameters == sum(tensor.numel() for name, tensor in cut.tensors.items())
    old = whole.adapter.tensors
    assert all(torch.equal(cut.tensors[f"{name}.lora_{side}"], old[f"{name}.lora_{side}"]) for name in kept for side in "ab")
    merge(model)


def test_a_rank_above_the_size_of_a_layer(tiny_llama) -> None:
    lora_a, lora_b = factors(5, 30, 12)
    config = LoraConfig(rank=12, alpha=6.0)
    tensors, new = truncated({"m.lora_a": lora_a, "m.lora_b": lora_b}, config, {"m": "linear"}, {"m": 8})
    assert new.rank == 5 and new.alpha == pytest.approx(2.5)
    torch.testing.assert_close(0.5 * tensors["m.lora_b"] @ tensors["m.lora_a"], 0.5 * lora_b @ lora_a, atol=1e-5, rtol=0)


def test_an_empty_update_stays_empty() -> None:
    lora_a, _ = factors(6, 9, 4)
    tensors, _ = truncated({"m.lora_a": lora_a, "m.lora_b": torch.zeros(6, 4)}, LoraConfig(rank=4, alpha=4), {"m": "linear"}, {"m": 2})
    assert not tensors["m.lora_b"].any() and torch.isfinite(tensors["m.lora_a"]).all()
    assert spectrum(lora_a, torch.zeros(6, 4), 1.0).left_out(1) == 0.0


@pytest.mark.parametrize(
    ("change", "ranks", "code"),
    [({"init": "loftq"}, {"m": 1}, "E-ADAPT-091"), ({}, {"m": 0}, "E-ADAPT-092")],
)
def test_refusals(change: dict, ranks: dict, code: str) -> None:
    lora_a, lora_b = factors(6, 9, 4)
    with pytest.raises(AdapterError, match=code):
        truncated({"m.lora_a": lora_a, "m.lora_b": lora_b}, LoraConfig(rank=4, alpha=4, **change), {"m": "linear"}, ranks)


def test_fused_experts_are_refused_only_where_they_would_change() -> None:
    lora_a, lora_b = factors(6, 9, 4)
    tensors, config, kinds = {"m.lora_a": lora_a, "m.lora_b": lora_b}, LoraConfig(rank=4, alpha=4), {"m": "experts"}
    assert truncated(tensors, config, kinds, {"m": 4})[0]["m.lora_a"] is lora_a
    with pytest.raises(AdapterError, match="E-ADAPT-090"):
        truncated(tensors, config, kinds, {"m": 2})


def test_folders_are_checked(tiny_llama, tmp_path: Path) -> None:
    whole = open_folder(save_adapter(trained(tiny_llama), tmp_path / "old", base_name="tiny"))
    with pytest.raises(AdapterError, match="E-ADAPT-093"):
        whole.cut(0)
    with pytest.raises(StorageError, match="E-STORE-083"):
        whole.write(whole.cut(2), tmp_path / "old")
