"""A folder that is already packed keeps its storage, and a setting that says something else is refused, not ignored."""

import json
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.config import QuantConfig, load_config
from halfbyte.config.write import to_yaml
from halfbyte.errors import HalfbyteError, ModelError
from halfbyte.evaluate.opened import open_model
from halfbyte.export.quantized import quantize_to_folder
from halfbyte.models.load import load_model
from halfbyte.models.packed_folder import settled, storage_of
from halfbyte.quant.linear import QuantLinear
from halfbyte.train.from_config import prepare
from tests.models.small_models import write_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense, fp4 with blocks of 128 and plain scales, and int8."""
    folder = tmp_path_factory.mktemp("packed")
    write_folder(folder / "dense")
    quantize_to_folder(str(folder / "dense"), folder / "fp4", format="fp4", blocksize=128, double_quant=False)
    quantize_to_folder(str(folder / "dense"), folder / "int8", format="int8")
    return folder


def test_the_storage_is_read_from_the_folder(folders: Path) -> None:
    assert storage_of(folders / "dense") is None
    found = storage_of(folders / "fp4")
    assert found is not None and (found.format, found.blocksize, found.double_quant, found.quantize_head) == ("fp4", 128, False, False)
    rows = storage_of(folders / "int8")
    assert rows is not None and rows.format == "int8"


@pytest.mark.parametrize(
    ("folder", "asked", "named"),
    [
        ("fp4", {"format": "nf4"}, "quant.format=nf4"),
        ("fp4", {"format": "none"}, "quant.format=none"),
        ("fp4", {"blocksize": 64}, "quant.blocksize=64"),
        ("fp4", {"format": "fp4", "double_quant": True}, "quant.double_quant=true"),
        ("fp4", {"skip": ("q_proj",)}, "quant.skip=[q_proj]"),
        ("fp4", {"quantize_head": True}, "quant.quantize_head=true"),
        ("fp4", {"blocksize": 256, "skip": ("q_proj",)}, "quant.blocksize=256, quant.skip=[q_proj]"),
        ("int8", {"format": "nf4"}, "quant.format=nf4"),
        ("int8", {"blocksize": 128}, "quant.blocksize=128"),
    ],
)
def test_a_setting_the_folder_cannot_follow_is_refused(folders: Path, folder: str, asked: dict[str, object], named: str) -> None:
    """# T44"""
    with pytest.raises(ModelError) as caught:
        load_model(str(folders / folder), quant=QuantConfig.model_validate(asked))
    assert caught.value.code == "E-MODEL-042"
    text = caught.value.text()
    assert f"{folder}, asked for {named}" in text and "16-bit folder" in text and text.count("error ") == 1


@pytest.mark.parametrize("asked", [{}, {"format": "fp4"}, {"blocksize": 128, "double_quant": False, "skip": (), "quantize_head": False}])
def test_defaults_and_what_agrees_load(folders: Path, asked: dict[str, object]) -> None:
    model = load_model(str(folders / "fp4"), dtype="float32", quant=QuantConfig.model_validate(asked))
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert {(layer.format, layer.blocksize, layer.absmax2 is None) for layer in layers} == {("fp4", 128, True)}


def test_a_run_notes_the_storage_it_really_has_and_reads_it_again(folders: Path, tmp_path: Path) -> None:
    """Trained with the defaults on a packed folder: config.yaml says what the folder is, the run opens and goes on."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{number}+1=", "completion": f"{number + 1}"}) + "\n" for number in range(12)))
    settings = {"max_steps": 2, "threads": 1, "sample_prompts": 0, "eval_every_steps": None, "save_every_steps": 1}
    own = {"model": str(folders / "fp4"), "data": str(rows), "out": str(tmp_path / "run"), "train": settings, "model.dtype": "float32"}
    run = hb.train(**own, **{"lora.rank": 2})
    assert (run.config.quant.format, run.config.quant.blocksize, run.config.quant.double_quant) == ("fp4", 128, False)
    assert torch.isfinite(open_model(run.folder).model(input_ids=torch.arange(8)[None]).logits).all()
    again = hb.train(out=tmp_path / "run", resume=True, **{"train.max_steps": 3})
    assert again.summary["steps"] == 3


def test_int8_settings_can_be_written_and_read(folders: Path, tmp_path: Path) -> None:
    config = settled(load_config(None, [f"model={folders / 'int8'}", "data=rows.jsonl"]), folders / "int8")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "run.yaml").quant.format == "int8" == config.quant_format


@pytest.mark.parametrize("method", ["lora", "full"])
def test_methods_that_need_a_dense_base_refuse_a_packed_one(folders: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(HalfbyteError) as caught:
        hb.train(model=folders / "fp4", data=tmp_path / "rows.jsonl", method=method, out=tmp_path / "run")
    assert caught.value.code == "E-MODEL-044" and "method=qlora" in caught.value.text()


def test_a_head_that_is_the_embedding_cannot_be_quantized(folders: Path, tmp_path: Path) -> None:
    """The setting would do nothing; it is refused before the rows are looked at.  A head of its own may be, a classifier's is trained."""
    write_folder(tmp_path / "tied", tie_word_embeddings=True)
    settings = ["data=rows-that-are-not-there.jsonl", "quant.quantize_head=true", f"out={tmp_path / 'run'}"]
    config = load_config(None, [f"model={tmp_path / 'tied'}", *settings])
    with pytest.raises(ModelError, match="E-MODEL-049") as caught:
        prepare(config)
    assert "quant.quantize_head=true" in caught.value.found and str(tmp_path / "tied") in caught.value.place
    assert settled(load_config(None, [f"model={folders / 'dense'}", *settings]), folders / "dense").quant.quantize_head
    with pytest.raises(HalfbyteError, match="E-CONF-170"):
        load_config(None, [f"model={folders / 'dense'}", "model.task=sequence-classification", *settings])
