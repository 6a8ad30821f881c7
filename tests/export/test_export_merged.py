"""Merging a bare adapter folder: rounded once, what must stay exact stays so, and a base that is packed is told from an original one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import halfbyte as hb
from halfbyte import host
from halfbyte.errors import AdapterError, ModelError
from halfbyte.export import merged
from halfbyte.lora.inject import updates
from halfbyte.lora.layer import LoraLinear
from halfbyte.models.load import load_model
from tests.models.small_models import byte_tokenizer, write_folder
from tests.models.test_models_cast import glm


def adapter(base: Path, place: Path, **settings: object) -> dict[str, Tensor]:
    """An adapter of rank 2 with random factors in `place`; module name -> delta."""
    model = load_model(str(base), dtype="float32")
    hb.inject(model, **{"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"], **settings})
    generator = torch.Generator().manual_seed(1)
    found = {name: layer for name, layer in updates(model).items() if isinstance(layer, LoraLinear)}
    for layer in found.values():
        layer.lora_b.data.normal_(std=0.05, generator=generator)
    hb.save_adapter(model, place, base=str(base))
    return {name: layer.delta_weight().detach() for name, layer in found.items()}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_are_rounded_once_to_the_type_that_is_written(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that computes in bfloat16 rounds none of them to it on the way."""
    monkeypatch.setattr(host, "native_bf16", lambda: "amx_bf16")
    write_folder(tmp_path / "base")
    deltas = adapter(tmp_path / "base", tmp_path / "adapter")
    hb.merge(tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    kind = getattr(torch, dtype)
    for name, tensor in before.items():
        assert after[name].dtype == kind
        expected = tensor + deltas.get(name.removesuffix(".weight"), torch.zeros(()))
        torch.testing.assert_close(after[name].float(), expected, rtol=torch.finfo(kind).eps, atol=1e-7)


def test_what_transformers_keeps_in_float32_is_written_so(tmp_path: Path) -> None:
    before = glm(tmp_path / "base").state_dict()
    byte_tokenizer().save_pretrained(tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "adapter")
    hb.merge(tmp_path / "adapter", tmp_path / "merged", dtype="bfloat16")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    exact = [name for name in after if name.endswith("e_score_correction_bias")]
    assert exact and all(torch.equal(after[name], before[name]) for name in exact)
    assert {value.dtype for name, value in after.items() if name not in exact} == {torch.bfloat16}


def test_a_packed_base_has_no_original_weights(tmp_path: Path) -> None:
    write_folder(tmp_path / "base")
    hb.quantize(tmp_path / "base", tmp_path / "packed")
    adapter(tmp_path / "packed", tmp_path / "adapter")
    with pytest.raises(AdapterError, match="already in nf4") as caught:
        hb.merge(tmp_path / "adapter", tmp_path / "merged", onto="original")
    assert caught.value.code == "E-ADAPT-085" and not (tmp_path / "merged").exists()
    done = hb.merge(tmp_path / "adapter", tmp_path / "merged")
    assert done.storage == "nf4" and done.dequantized == 10 and "the nf4 weights were written out as they are, also" in done.text()
    assert "were written out as they are; nothing was" in replace(done, dequantized=0).text()
    assert "also those of 1 layer without" in replace(done, dequantized=1).text()


def test_what_has_no_adapter_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is not there, and a model by itself."""
    write_folder(tmp_path / "base")
    monkeypatch.setattr(merged, "open_model", lambda *ignored, **too: pytest.fail("loaded"))
    with pytest.raises(AdapterError, match="E-ADAPT-081"):
        hb.merge(tmp_path / "base", tmp_path / "merged")
    with pytest.raises(ModelError, match=r"E-MODEL-014(.*\n)+.*did you mean .*/base\?"):
        hb.merge(tmp_path / "bsae", tmp_path / "merged")


def test_the_base_that_loftq_quantized_is_not_the_original_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "adapter", init="loftq")
    assert hb.merge(tmp_path / "adapter", tmp_path / "merged").storage == "nf4"
    with pytest.raises(AdapterError, match="loftq"):
        hb.merge(tmp_path / "adapter", tmp_path / "original", onto="original")
