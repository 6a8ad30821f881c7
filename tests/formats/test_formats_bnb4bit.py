"""Files of quantized weights exchanged with bitsandbytes in both directions, and what is refused in them."""

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState as TheirState
from safetensors.torch import load_file, save_file

from halfbyte.errors import WeightError
from halfbyte.formats import bnb4bit, safetensors_io
from halfbyte.quant import blockwise
from halfbyte.quant.quant_state import Nested, QuantState
from tests.quant.quant_oracle import look_up, same_bits

NAME = "model.layers.0.self_attn.q_proj.weight"
SHAPES = ((48, 128), (1, 64), (33, 70), (7, 9), (64, 96))  # the last three cross rows
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CASES = [(format, double) for format in ("nf4", "fp4") for double in (False, True)]


def _file(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Through a real file, written by the safetensors library and read by ours."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return safetensors_io.load_tensors(path)


def _their_tensors(weight: torch.Tensor, format: str, double: bool, storage: torch.dtype = torch.uint8) -> dict[str, torch.Tensor]:
    packed, state = bnb.functional.quantize_4bit(weight, quant_type=format, compress_statistics=double, quant_storage=storage)
    return {NAME: packed} | {f"{NAME}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}


@pytest.mark.parametrize("format,double", CASES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bitsandbytes_loads_what_we_write(format: str, double: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    for shape in SHAPES:
        weight = torch.randn(shape).to(dtype)
        packed, state = blockwise.quantize(weight, format, 64, double)
        safetensors_io.save(tmp_path / "ours.safetensors", bnb4bit.to_named_tensors(NAME, packed, state))
        loaded = load_file(tmp_path / "ours.safetensors")
        parts = {name.removeprefix(f"{NAME}."): tensor for name, tensor in loaded.items() if name != NAME}
        theirs = bnb.nn.Params4bit.from_prequantized(loaded[NAME], dict(parts), device="cpu")
        read = theirs.quant_state
        assert (read.quant_type, read.blocksize, read.dtype, tuple(read.shape), read.nested) == (format, 64, dtype, shape, double)
        absmax = bnb.functional.dequantize_blockwise(read.absmax, read.state2) + read.offset if double else read.absmax
        ours = blockwise.dequantize(packed, state)
        assert same_bits(look_up(theirs.data.reshape(-1), absmax, read.code, 64, weight.numel(), dtype).view(shape), ours)
        if shape[1] % 64 == 0:
            assert same_bits(bnb.functional.dequantize_4bit(theirs.data, read).view(shape), ours)


@pytest.mark.parametrize("format,double", CASES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_we_load_what_bitsandbytes_writes(format: str, double: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """# T53: the offset comes back as the float32 it was."""
    for shape in SHAPES:
        weight = torch.randn(shape).to(dtype)
        tensors = _file(tmp_path / "theirs.safetensors", _their_tensors(weight, format, double))
        packed, state = bnb4bit.from_named_tensors(NAME, tensors)
        parts = {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items() if name != NAME}
        theirs = TheirState.from_dict(dict(parts), torch.device("cpu"))
        absmax = theirs.absmax
        if double:
            assert state.nested is not None and same_bits(state.nested.offset, theirs.offset)
            absmax = bnb.functional.dequantize_blockwise(absmax, theirs.state2) + theirs.offset
        assert (state.format, state.dtype, state.shape) == (format, dtype, shape)
        got = blockwise.dequantize(packed, state)
        assert same_bits(got, look_up(packed, absmax, theirs.code, 64, weight.numel(), dtype).view(shape))
        if shape[1] % 64 == 0:
            assert same_bits(got, bnb.functional.dequantize_4bit(tensors[NAME], theirs).view(shape))


@pytest.mark.parametrize("format,double", CASES)
def test_names_order_and_json_are_the_same_to_the_byte(format: str, double: bool) -> None:
    weight = torch.randn(48, 128).to(torch.bfloat16)
    theirs = _their_tensors(weight, format, double)
    packed, state = bnb4bit.from_named_tensors(NAME, theirs)
    ours = bnb4bit.to_named_tensors(NAME, packed, state)
    assert ours.keys() == theirs.keys() <= set(bnb4bit.names_of(NAME))
    for name, tensor in theirs.items():
        assert same_bits(ours[name], tensor), name


@pytest.mark.parametrize("storage", (torch.bfloat16, torch.float16, torch.float32))
def test_bytes_stored_as_floats_are_read_as_bytes(storage: torch.dtype, tmp_path: Path) -> None:
    """# T55: quant_storage: the same bytes under another dtype, NaN patterns among them; a cast would destroy them."""
    weight = torch.randn(64, 128)
    want = _their_tensors(weight, "nf4", True)
    tensors = _file(tmp_path / "a.safetensors", _their_tensors(weight, "nf4", True, storage))
    assert tensors[NAME].dtype == storage
    packed, state = bnb4bit.from_named_tensors(NAME, tensors)
    assert same_bits(packed, want[NAME].reshape(-1))
    assert same_bits(blockwise.dequantize(packed, state), blockwise.dequantize(*bnb4bit.from_named_tensors(NAME, want)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_eight_bits_both_ways(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.randn(24, 40).to(dtype)
    layer = bnb.nn.Linear8bitLt(40, 24, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)._quantize("cpu")
    theirs = {f"{NAME.removesuffix('weight')}{name}": tensor for name, tensor in layer.state_dict().items()}
    stored, state = bnb4bit.from_named_tensors(NAME, _file(tmp_path / "theirs.safetensors", theirs), dtype)
    ours = blockwise.quantize(weight, "int8")
    assert same_bits(stored, ours[0]) and same_bits(state.absmax, ours[1].absmax) and state.dtype == dtype
    written = bnb4bit.to_named_tensors(NAME, *ours)
    assert written.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert same_bits(written[name], tensor), name
    fresh = bnb.nn.Linear8bitLt(40, 24, bias=False, has_fp16_weights=False)
    fresh.weight = bnb.nn.Int8Params(written[NAME], requires_grad=False, has_fp16_weights=False)
    fresh.weight.SCB = torch.empty(24)
    fresh.load_state_dict({name.removeprefix(NAME.removesuffix("weight")): tensor for name, tensor in written.items()}, strict=False)
    dense = bnb.functional.int8_vectorwise_dequant(fresh.weight.data, fresh.weight.SCB)
    assert same_bits(dense, blockwise.dequantize(stored, state, torch.float32))


def test_what_is_missing_or_wrong_is_named() -> None:
    tensors = _their_tensors(torch.randn(48, 128), "nf4", True)
    key = f"{NAME}.{bnb4bit.STATE_KEY}nf4"

    def changed(**values: object) -> dict[str, torch.Tensor]:
        about = json.loads(bytes(tensors[key].tolist())) | values
        return tensors | {key: torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)}

    def without(name: str) -> dict[str, torch.Tensor]:
        return {other: tensor for other, tensor in tensors.items() if other != name}

    bad = [
        (without(NAME), NAME), (without(key), NAME), (without(f"{NAME}.absmax"), "absmax"), (without(f"{NAME}.quant_map"), "quant_map"),
        (without(f"{NAME}.nested_quant_map"), "nested_quant_map"), (tensors | {f"{NAME}.{bnb4bit.STATE_KEY}fp4": tensors[key]}, "2 of"),
        (tensors | {NAME: tensors[NAME][:-1]}, "packed bytes"), (tensors | {f"{NAME}.absmax": tensors[f"{NAME}.absmax"].float()}, "uint8"),
        (tensors | {f"{NAME}.nested_absmax": tensors[f"{NAME}.nested_absmax"] * torch.nan}, "NaN"),
        (tensors | {key: tensors[key][:-3]}, "JSON"), (tensors | {key: torch.zeros(70_000, dtype=torch.uint8)}, "JSON"),
        (changed(quant_type="fp4"), "quant_type"), (changed(blocksize=0), "blocksize"), (changed(blocksize=True), "blocksize"),
        (changed(dtype="complex64"), "dtype"), (changed(shape=[48, -128]), "shape"), (changed(shape=[2**40, 2]), "shape"),
        (changed(shape=[96, 128]), "packed bytes"), (changed(nested_offset="x"), "nested_offset"), (changed(shape="48"), "shape"),
        (changed(nested_blocksize=7), "nested_blocksize"), (changed(nested_blocksize=512), "nested_blocksize"),
        (changed(nested_blocksize=None), "nested_blocksize"), (changed(nested_dtype="float16"), "nested_dtype"),
    ]  # fmt: skip
    for broken, said in bad:
        with pytest.raises(WeightError) as caught:
            bnb4bit.from_named_tensors(NAME, broken)
        assert said in str(caught.value), (said, str(caught.value))
    eight = bnb4bit.to_named_tensors(NAME, *blockwise.quantize(torch.randn(4, 8), "int8"))
    stem = NAME.removesuffix("weight")
    for broken in (
        eight | {f"{stem}weight_format": torch.ones((), dtype=torch.uint8)}, eight | {f"{stem}SCB": torch.ones(3)},
        eight | {NAME: eight[NAME].float()},
    ):  # fmt: skip
        with pytest.raises(WeightError):
            bnb4bit.from_named_tensors(NAME, broken)


def test_the_caller_keeps_its_tensors() -> None:
    """Reading must not take entries out of the mapping it was given."""
    tensors = _their_tensors(torch.randn(4, 64), "nf4", True)
    before = dict(tensors)
    bnb4bit.from_named_tensors(NAME, tensors)
    assert tensors == before


@pytest.mark.parametrize("format", ("nf4", "fp4", "int8"))
def test_config_block_is_what_transformers_writes(format: str) -> None:
    from transformers import BitsAndBytesConfig

    four = format != "int8"
    kind = {"bnb_4bit_quant_type": format, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16} if four else {}
    theirs = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four, llm_int8_skip_modules=["lm_head"], **kind).to_dict()
    ours = bnb4bit.quantization_config_json(format, double_quant=four, skip=("lm_head",), compute_dtype=torch.bfloat16)
    assert ours.keys() == theirs.keys()
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert differing <= ({"bnb_4bit_compute_dtype"} if not four else set())  # of no meaning for 8 bits
    read = bnb4bit.read_quantization_config(theirs)
    assert (read.format, read.double_quant, read.skip) == (format, four, ("lm_head",))
    for wrong in ({"quant_method": "gptq"}, {"load_in_4bit": True, "load_in_8bit": True}, {"bnb_4bit_quant_storage": "int4"}):
        with pytest.raises(WeightError):
            bnb4bit.read_quantization_config(theirs | wrong)


def test_state_without_nested_has_no_nested_keys() -> None:
    state = QuantState("nf4", torch.zeros(16), torch.ones(1), 64, (1, 64), torch.float32, None)
    assert not any("nested" in name for name in bnb4bit.to_named_tensors(NAME, torch.zeros(32, dtype=torch.uint8), state))
    assert Nested(torch.ones(1), torch.ones(256), torch.zeros(())).blocksize == 256
