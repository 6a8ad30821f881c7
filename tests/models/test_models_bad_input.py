"""Damaged, foreign and hostile model folders give one readable block each; the blocks are kept in tests/golden/bad_models.json.

Run `python -m tests.models.test_models_bad_input` to write the golden file anew, and read the difference.
"""

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.config.quant import QuantConfig
from halfbyte.errors import HalfbyteError
from halfbyte.models.load import load_model, load_tokenizer
from halfbyte.models.source import resolve
from tests.models.small_models import write_folder

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bad_models.json"
Case = Callable[[Path], None]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    """Register a case under its function's name; `make(folder)` spoils a good folder and does what must fail."""
    CASES[make.__name__] = make
    return make


def load(folder: Path) -> None:
    source = resolve(str(folder))
    load_model(source, dtype="float32")
    load_tokenizer(source)


def edit(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(keys)
    (folder / "config.json").write_text(json.dumps(config))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", {"format": "pt"})


@case
def nothing_at_the_path(folder: Path) -> None:
    resolve(str(folder / "absent"))


@case
def hub_id_without_permission(folder: Path) -> None:
    resolve("owner/some-model")


@case
def a_file_that_is_not_gguf(folder: Path) -> None:
    resolve(str(folder / "model.safetensors"))


@case
def gguf_cut_short(folder: Path) -> None:
    import gguf
    import numpy

    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", numpy.zeros((32, 64), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (folder / "m.gguf").read_bytes()
    (folder / "m.gguf").write_bytes(data[:-4000])
    resolve(str(folder / "m.gguf"))


@case
def gguf_of_49_bytes_with_huge_counts(folder: Path) -> None:
    (folder / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + b"\0" * 25)
    resolve(str(folder / "m.gguf"))


@case
def gguf_of_another_magic(folder: Path) -> None:
    (folder / "m.gguf").write_bytes(b"GGML" + b"\0" * 60)
    resolve(str(folder / "m.gguf"))


@case
def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    load(folder)


@case
def an_adapter_folder(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    load(folder)


@case
def config_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')
    load(folder)


@case
def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    load(folder)


@case
def config_is_deeply_nested(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    load(folder)


@case
def config_of_2_mb(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "x": "a" * (2 << 20)}))
    load(folder)


@case
def unknown_architecture(folder: Path) -> None:
    edit(folder, model_type="lama")
    load(folder)


@case
def architecture_with_own_code(folder: Path) -> None:
    edit(folder, model_type="my_model", auto_map={"AutoModelForCausalLM": "modeling.MyModel"})
    (folder / "modeling.py").write_text("raise SystemExit('the code of the folder ran')")
    load(folder)


@case
def an_encoder(folder: Path) -> None:
    edit(folder, model_type="bert", architectures=["BertForMaskedLM"])
    load(folder)


@case
def a_vision_model(folder: Path) -> None:
    edit(folder, model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"])
    load(folder)


@case
def quantized_by_gptq(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    load(folder)


@case
def quantized_block_without_method(folder: Path) -> None:
    edit(folder, quantization_config=[4])
    load(folder)


@case
def a_billion_layers(folder: Path) -> None:
    edit(folder, num_hidden_layers=10**9)
    load(folder)


@case
def unknown_rope_type(folder: Path) -> None:
    edit(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0})
    load(folder)


@case
def heads_do_not_divide_the_width(folder: Path) -> None:
    edit(folder, num_attention_heads=7, head_dim=None)
    load(folder)


@case
def wrong_head_dim(folder: Path) -> None:
    edit(folder, head_dim=32)
    load(folder)


@case
def wrong_width(folder: Path) -> None:
    edit(folder, intermediate_size=192)
    load(folder)


@case
def wrong_shape_while_quantizing(folder: Path) -> None:
    edit(folder, intermediate_size=192)
    load_model(resolve(str(folder)), dtype="float32", quant=QuantConfig(format="nf4"))


@case
def a_layer_too_many_in_config(folder: Path) -> None:
    edit(folder, num_hidden_layers=3)
    load(folder)


@case
def a_layer_too_few_in_config(folder: Path) -> None:
    edit(folder, num_hidden_layers=1)
    load(folder)


@case
def missing_tensor(folder: Path) -> None:
    tensors(folder, lambda found: found.pop("model.norm.weight"))  # type: ignore[arg-type, return-value]
    load(folder)


@case
def nan_in_a_dense_weight(folder: Path) -> None:
    def spoil(found: dict[str, torch.Tensor]) -> None:
        found["model.embed_tokens.weight"][3, :2] = float("nan")

    tensors(folder, spoil)
    load(folder)


@case
def infinity_in_a_weight_to_quantize(folder: Path) -> None:
    def spoil(found: dict[str, torch.Tensor]) -> None:
        found["model.layers.1.mlp.up_proj.weight"][5, 7] = float("inf")

    tensors(folder, spoil)
    load_model(resolve(str(folder)), dtype="float32", quant=QuantConfig(format="nf4"))


@case
def missing_shard(folder: Path) -> None:
    write_folder(folder, shard="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-00002-of-*.safetensors"))[0].unlink()
    load(folder)


@case
def index_names_a_tensor_that_is_not_there(folder: Path) -> None:
    write_folder(folder, shard="100KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model.safetensors").unlink()
    index["weight_map"]["model.ghost.weight"] = index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load(folder)


@case
def index_points_out_of_the_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    load(folder)


@case
def index_points_to_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    load(folder)


@case
def truncated_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    load(folder)


@case
def a_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    load(folder)


@case
def an_html_page(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<!DOCTYPE html><html>Not found</html>")
    load(folder)


@case
def pickled_weights_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    load(folder)


@case
def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    load(folder)


@case
def damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    load(folder)


@case
def tokenizer_that_is_half_there(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"merges":', '"merges": ["a b"], "other":'))
    load(folder)


@case
def tokenizer_with_own_code(folder: Path) -> None:
    (folder / "tokenizer.py").write_text("raise SystemExit('the code of the folder ran')")
    settings = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["tokenizer.MyTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    load(folder)


@case
def vocabulary_larger_than_the_embedding(folder: Path) -> None:
    write_folder(folder, vocab_size=200)
    load(folder)


@case
def pad_id_out_of_range(folder: Path) -> None:
    edit(folder, pad_token_id=100_000)
    load_tokenizer(resolve(str(folder)))


@case
def skip_pattern_without_a_match(folder: Path) -> None:
    load_model(resolve(str(folder)), quant=QuantConfig(format="nf4", skip=("gate",)))


@case
def another_format_for_a_packed_folder(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    load_model(resolve(str(folder)), quant=QuantConfig(format="nf4"))


def block_of(name: str, folder: Path) -> dict[str, object]:
    """What the case prints, the folder's own path left out."""
    write_folder(folder)
    with pytest.raises(HalfbyteError) as caught:
        CASES[name](folder)
    text = str(caught.value).replace(str(folder), "MODEL").replace(folder.name, "MODEL")
    text = re.sub(r"one of \d+ types", "one of N types", text)  # how many there are says the version of transformers
    return {"exit_code": caught.value.exit_code, "text": text}


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_bad_model_prints_its_block(name: str, tmp_path: Path) -> None:
    """Code, place, found, expected, remedy and exit code are those of the golden file."""
    assert block_of(name, tmp_path / "given") == json.loads(GOLDEN.read_text())[name]


def test_the_golden_file_has_no_other_cases() -> None:
    """A case that is removed leaves the golden file too; there are at least 25."""
    assert sorted(json.loads(GOLDEN.read_text())) == sorted(CASES)
    assert len(CASES) >= 25


def main() -> None:
    """Write the golden file."""
    blocks = {}
    for name in sorted(CASES):
        with tempfile.TemporaryDirectory() as folder:
            try:
                blocks[name] = block_of(name, Path(folder) / "given")
            except BaseException as fault:
                print("NOT A BLOCK:", name, type(fault).__name__, str(fault)[:600])
                continue
        print(f"--- {name}\n{blocks[name]['text']}")
    GOLDEN.write_text(json.dumps(blocks, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
