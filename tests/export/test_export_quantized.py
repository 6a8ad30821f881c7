"""What `quantize` says of its own work: the error of each weight beside the one in the files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import halfbyte as hb
from halfbyte.models.load import load_model
from halfbyte.quant.dense import dense_weight
from tests.models.small_models import write_folder


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_error_is_measured_against_the_weight_as_the_layer_uses_it(kind: str, tmp_path: Path) -> None:
    """GPT-2's files keep (in, out); a square weight, c_proj, would be compared with its mirror image."""
    write_folder(tmp_path / "base", kind)
    made = hb.quantize(tmp_path / "base", tmp_path / "packed")
    files, packed = load_file(tmp_path / "base" / "model.safetensors"), load_model(str(tmp_path / "packed"))
    assert made.layers == len(made.errors) == (14 if kind == "llama" else 8)
    for name, error in made.errors:
        weight = files[f"{name}.weight"].T if kind == "gpt2" else files[f"{name}.weight"]
        gap = dense_weight(packed.get_submodule(name), torch.float32) - weight
        assert error == pytest.approx(float(gap.norm() / weight.norm()), rel=1e-3) and 0.05 < error < 0.15
