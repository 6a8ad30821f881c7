"""What is written: plain transformers loads it with equal numbers, tied tensors stand once, end tokens and template come along."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.config.lora import LoraConfig
from halfbyte.config.quant import QuantConfig
from halfbyte.errors import ModelError, StorageError
from halfbyte.lora.inject import inject
from halfbyte.models.generate import stop_ids
from halfbyte.models.load import load_model, load_tokenizer
from halfbyte.models.save import save_dense, save_quantized
from halfbyte.models.source import Source
from halfbyte.quant.linear import QuantLinear
from tests.models.small_models import CONFIGS, byte_tokenizer, make_model, write_folder

IDS = torch.arange(24)[None] * 11 % 320


def names_in(folder: Path) -> list[str]:
    return sorted(name for path in folder.glob("*.safetensors") for name in safe_open(path, "pt").keys())  # noqa: SIM118


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_dense_folder_has_the_names_and_numbers_it_came_with(kind: str, tmp_path: Path) -> None:
    """Fused experts are written apart again; logits of plain transformers are bitwise equal."""
    source = write_folder(tmp_path / "in", kind)
    model = load_model(source, dtype="float32")
    save_dense(model, load_tokenizer(source), tmp_path / "out")
    assert names_in(tmp_path / "out") == names_in(tmp_path / "in")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(IDS).logits, model(IDS).logits) and again.dtype == torch.float32
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_tied_tensors_are_written_once_and_untied_ones_twice(tmp_path: Path) -> None:
    """# T62 # T63  A head that left its embedding survives the reload; one that shares it is not written beside it."""
    source = write_folder(tmp_path / "in", tie_word_embeddings=True)
    model, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
    save_dense(model, tokenizer, tmp_path / "tied")
    assert "lm_head.weight" not in names_in(tmp_path / "tied")
    assert load_model(Source("folder", tmp_path / "tied", "", ""), dtype="float32")(IDS).logits.equal(model(IDS).logits)

    model.config.tie_word_embeddings = False  # same storage still: an adapter was merged into neither yet
    save_dense(model, tokenizer, tmp_path / "shared")
    assert "lm_head.weight" in names_in(tmp_path / "shared")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    save_dense(model, tokenizer, tmp_path / "untied")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_padded_vocabulary_keeps_every_row(tmp_path: Path) -> None:
    """# T64  259 tokens on 320 rows: nothing shrinks, the rows are bitwise those of before."""
    source = write_folder(tmp_path / "in")
    model, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
    tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    save_dense(model, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.get_input_embeddings().weight.shape[0] == 320
    assert torch.equal(again.get_input_embeddings().weight, make_model().get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<two>") == len(byte_tokenizer()) + 1


@pytest.mark.parametrize("packed", [False, True])
def test_end_tokens_and_template_come_along(packed: bool, tmp_path: Path) -> None:
    """# T69  Plain transformers renders the same ids and stops at the same tokens, also those only the tokenizer knew."""
    source = write_folder(tmp_path / "in")
    model = load_model(source, dtype="float32", quant=QuantConfig(format="nf4") if packed else None)
    tokenizer = load_tokenizer(source)
    model.generation_config.eos_token_id = [7]
    (save_quantized if packed else save_dense)(model, tokenizer, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == stop_ids(model, tokenizer) == [2, 7] and settings["pad_token_id"] == 0
    chat = [{"role": "user", "content": "Hi \\boxed{1} \"x\""}]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.chat_template == tokenizer.chat_template
    assert theirs.apply_chat_template(chat, add_generation_prompt=True) == tokenizer.apply_chat_template(chat, add_generation_prompt=True)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_bitsandbytes_reads_a_packed_folder_to_the_bit(kind: str, format: str, tmp_path: Path) -> None:
    """transformers + bitsandbytes dequantize our file to our bits; what is dense here is dense there; we read it back equally."""
    bnb = pytest.importorskip("bitsandbytes")
    source = write_folder(tmp_path / "in", kind)
    ours = load_model(source, dtype="float32", quant=QuantConfig(format=format))
    save_quantized(ours, load_tokenizer(source), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    layers = {name: module for name, module in theirs.named_modules() if isinstance(module, kinds)}
    assert sorted(layers) == sorted(name for name, module in ours.named_modules() if isinstance(module, QuantLinear))
    for name, module in layers.items():
        mine = ours.get_submodule(name)
        if format == "int8":
            assert torch.equal(module.weight.data, mine.weight) and torch.equal(module.weight.SCB, mine.absmax)
        else:
            assert torch.equal(bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state), mine.dequantize())
    again = load_model(Source("folder", tmp_path / "out", "", ""), dtype="float32")
    assert torch.allclose(again(IDS).logits, ours(IDS).logits, rtol=1e-5, atol=1e-6)
    if format != "int8":  # bitsandbytes multiplies int8 with rounded activations
        assert torch.allclose(theirs(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A packed model densely, a dense one packed, an adapted one at all, and over other people's files."""
    source = write_folder(tmp_path / "in")
    tokenizer, dense = load_tokenizer(source), load_model(source, dtype="float32")
    packed = load_model(source, dtype="float32", quant=QuantConfig(format="nf4"))
    with pytest.raises(ModelError, match="E-MODEL-050"):
        save_dense(packed, tokenizer, tmp_path / "out")
    with pytest.raises(ModelError, match="E-MODEL-051"):
        save_quantized(dense, tokenizer, tmp_path / "out")
    inject(dense, LoraConfig(rank=2))
    with pytest.raises(ModelError, match="E-MODEL-052"):
        save_dense(dense, tokenizer, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(StorageError, match="E-STORE-050"):
        save_dense(load_model(source, dtype="float32"), tokenizer, tmp_path / "mine")
    assert not (tmp_path / "out").exists() and [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_second_save_replaces_the_folder_whole(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    model, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
    save_dense(model, tokenizer, tmp_path / "out")
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    save_dense(model, tokenizer, tmp_path / "out")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight, model.lm_head.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
