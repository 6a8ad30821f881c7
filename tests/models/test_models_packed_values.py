"""A packed layer without its values stops the load, whatever lost them; a layer of zeros in the file is let through."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.config.quant import QuantConfig
from halfbyte.errors import WeightError
from halfbyte.models.load import load_model
from halfbyte.models.packed_values import packed_weights, require_values
from halfbyte.models.quantizer import LoadConfig, QuantizeArriving, Report, awaiting_values
from halfbyte.models.save import save_quantized
from halfbyte.quant.experts import QuantExperts
from halfbyte.quant.linear import QuantLinear
from tests.models.small_models import byte_tokenizer, make_model, write_folder

NAME = "model.layers.1.mlp.up_proj.weight"


def packed(folder: Path, format: str = "nf4", **settings: Any) -> Any:
    return load_model(str(folder), dtype="float32", quant=QuantConfig(format=format, **settings))


def with_zeros(folder: Path) -> Path:
    """The folder of a Llama of which one layer is zero."""
    write_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_values_lost_on_the_way_stop_the_load(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a loader does that casts to the dtype of the packed bytes and back."""
    right = QuantizeArriving.convert

    def losing(self: Any, input_dict: dict[str, Any], *places: Any, **named: Any) -> Any:
        for arrived in input_dict.values():
            (arrived[0] if isinstance(arrived, list) else arrived).zero_()
        return right(self, input_dict, *places, **named)

    write_folder(tmp_path)
    monkeypatch.setattr(QuantizeArriving, "convert", losing)
    with pytest.raises(WeightError, match="E-WEIGHT-058") as caught:
        packed(tmp_path, format)
    assert "tensor model.layers.0." in str(caught.value) and "every scale is zero" in str(caught.value)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_layer_of_zeros_in_the_file_loads(double_quant: bool, tmp_path: Path) -> None:
    """Dense and then packed."""
    model = packed(with_zeros(tmp_path / "dense"), double_quant=double_quant)
    assert not model.get_submodule(NAME.removesuffix(".weight")).dequantize().any()
    save_quantized(model, byte_tokenizer(), tmp_path / "packed")
    again = load_model(str(tmp_path / "packed"), dtype="float32")
    assert not again.get_submodule(NAME.removesuffix(".weight")).dequantize().any()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_weight_that_nobody_wrote_is_named(kind: str, tmp_path: Path) -> None:
    """Each in turn, one tensor of fused experts too."""
    write_folder(tmp_path, kind)
    model = packed(tmp_path)
    names = set(packed_weights(model))
    require_values(model, names, tmp_path)
    for name in sorted(names):
        with pytest.raises(WeightError, match=rf"E-WEIGHT-057.*\n.*tensor {name}\n"):
            require_values(model, names - {name}, tmp_path)


def test_zero_scales_of_experts_are_found(tmp_path: Path) -> None:
    """One expert of zeros is no fault; all of them are, since no single tensor of the file shows that it is meant."""
    write_folder(tmp_path, "mixtral")
    model = packed(tmp_path, double_quant=False)
    scales = model.get_submodule("model.layers.1.mlp.experts").down_proj_absmax
    scales[0].zero_()
    require_values(model, set(packed_weights(model)), tmp_path)
    scales.zero_()
    with pytest.raises(WeightError, match="E-WEIGHT-058"):
        require_values(model, set(packed_weights(model)), tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_bytes_that_arrive_in_the_place_of_numbers_are_refused(dtype: torch.dtype) -> None:
    """A weight cast to the dtype of its packed bytes is not all zero where it is above one, so its dtype is asked."""
    report, model = Report(), torch.nn.Module()
    model.add_module("layer", QuantLinear.empty(64, 8))
    arrived = torch.full((8, 64), 3, dtype=dtype)
    with pytest.raises(WeightError, match="E-WEIGHT-056"):
        QuantizeArriving(LoadConfig(report=report)).convert({"layer.weight": arrived}, model=model)
    assert not report.written and report.fault is not None


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_what_waits_for_a_dense_weight_has_its_dtype(format: str) -> None:
    """Some versions of transformers cast what arrives to the dtype of what waits."""
    linear = awaiting_values(QuantLinear.empty(64, 8, format=format, dtype=torch.bfloat16))
    assert linear.weight.dtype == torch.bfloat16 and linear.weight.is_meta
    stock = make_model("mixtral").model.layers[0].mlp.experts
    experts = awaiting_values(QuantExperts(stock, format))
    assert {experts.get_buffer(name).dtype for name in experts.shapes} == {torch.float32}
