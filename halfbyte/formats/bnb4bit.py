"""The tensors under which bitsandbytes keeps a quantized weight in safetensors, and our state from them.

For a layer's tensor `N.weight` of shape (out, in), n elements:

| tensor                                   | dtype   | shape           | when         |
|------------------------------------------|---------|-----------------|--------------|
| N.weight                                 | uint8 (or bf16, fp16, fp32: the same bytes) | (ceil(n/2), 1) | nf4, fp4 |
| N.weight.absmax                          | float32, uint8 if nested | (ceil(n/blocksize),) | nf4, fp4 |
| N.weight.quant_map                       | float32 | (16,)           | nf4, fp4     |
| N.weight.nested_absmax, nested_quant_map | float32 | (ceil(N/256),), (256,) | nested |
| N.weight.quant_state.bitsandbytes__nf4   | uint8   | JSON text       | nf4, fp4     |
| N.weight, N.SCB, N.weight_format         | int8, float32, uint8 | (out, in), (out,), () | int8 |

The bytes are the contract: they are written exactly and read exactly, whichever dtype they are stored as.
Source: https://huggingface.co/docs/bitsandbytes, read from bitsandbytes 0.50.2.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.errors import WeightError
from halfbyte.quant.quant_state import NESTED_BLOCKSIZE, Nested, QuantState

STATE_KEY = "quant_state.bitsandbytes__"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_JSON_LIMIT = 1 << 16
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY + "nf4", STATE_KEY + "fp4")


def names_of(name: str) -> list[str]:
    """Every name that may belong to the quantized tensor `name` ("...q_proj.weight"), the packed one first."""
    stem = name.rpartition(".")[0]
    return [name, *(f"{name}.{part}" for part in _PARTS), f"{stem}.SCB", f"{stem}.weight_format"]


def to_named_tensors(name: str, packed: Tensor, state: QuantState) -> dict[str, Tensor]:
    """The tensors of one weight; `name` is the dense tensor's name and ends in ".weight" for int8."""
    if state.format == "int8":
        stem = name.rpartition(".")[0]
        return {name: packed, f"{stem}.SCB": state.absmax, f"{stem}.weight_format": torch.zeros((), dtype=torch.uint8)}
    about: dict[str, object] = {
        "quant_type": state.format, "blocksize": state.blocksize, "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }  # fmt: skip
    found = {name: packed.reshape(-1, 1), f"{name}.absmax": state.absmax, f"{name}.quant_map": state.codebook}
    if state.nested is not None:
        about |= {"nested_blocksize": state.nested.blocksize, "nested_dtype": "float32", "nested_offset": state.nested.offset.item()}
        found |= {f"{name}.nested_absmax": state.nested.absmax2, f"{name}.nested_quant_map": state.nested.codebook}
    text = bytearray(json.dumps(about).encode())
    return found | {f"{name}.{STATE_KEY}{state.format}": torch.frombuffer(text, dtype=torch.uint8).clone()}


def from_named_tensors(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float16) -> tuple[Tensor, QuantState]:
    """(packed, state) of the weight `name`.

    `dtype` is what an int8 weight dequantizes to, which its file does not say.
    Raises WeightError, naming the tensor, where one is missing, of a wrong shape or dtype, or not finite.
    """
    if name not in tensors:
        raise _fault(name, "E-WEIGHT-010", "a quantized weight has its packed tensor", "no such tensor")
    stem = name.rpartition(".")[0]
    if f"{stem}.SCB" in tensors:
        return _rows(name, tensors[name], tensors[f"{stem}.SCB"], tensors.get(f"{stem}.weight_format"), dtype)
    about = _about(name, tensors)
    packed = tensors[name].contiguous().view(torch.uint8).reshape(-1)
    count = math.prod(about.shape)
    _require(name, packed, "packed bytes", torch.uint8, ((count + 1) // 2,))
    blocks, nested = -(-count // about.blocksize), None
    absmax = _part(name, tensors, "absmax", torch.uint8 if about.nested else torch.float32, (blocks,))
    codebook = _part(name, tensors, "quant_map", torch.float32, (16,))
    if about.nested:
        absmax2 = _part(name, tensors, "nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCKSIZE),))
        levels = _part(name, tensors, "nested_quant_map", torch.float32, (256,))
        nested = Nested(absmax2, levels, torch.tensor(about.offset, dtype=torch.float32, device=packed.device))
    return packed, QuantState(about.format, codebook, absmax, about.blocksize, about.shape, about.dtype, nested)


def blocksize_of(name: str, tensors: Mapping[str, Tensor]) -> int:
    """Weights that share one scale in the 4-bit weight `name`.  Raises WeightError as `from_named_tensors` does."""
    return _about(name, tensors).blocksize


@dataclass(frozen=True)
class _About:
    """The JSON part of a quantized weight."""

    format: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested: bool
    offset: float = 0.0


def _about(name: str, tensors: Mapping[str, Tensor]) -> _About:
    keys = [key for key in (f"{name}.{STATE_KEY}nf4", f"{name}.{STATE_KEY}fp4") if key in tensors]
    if len(keys) != 1:
        raise _fault(name, "E-WEIGHT-011", "a 4-bit weight has exactly one state, nf4 or fp4", f"{len(keys)} of them")
    raw = tensors[keys[0]]
    if raw.dtype != torch.uint8 or raw.dim() != 1 or raw.numel() > _JSON_LIMIT:
        raise _fault(keys[0], "E-WEIGHT-012", "a quantization state is JSON text in uint8", f"{raw.dtype} of shape {tuple(raw.shape)}")
    try:
        value = json.loads(bytes(raw.tolist()).decode())
    except ValueError as failure:
        raise _fault(keys[0], "E-WEIGHT-013", "a quantization state is readable JSON", str(failure)) from failure
    nested = f"{name}.nested_absmax" in tensors
    problem = _problem(value, keys[0].removeprefix(f"{name}.{STATE_KEY}"), nested)
    if problem:
        raise _fault(keys[0], "E-WEIGHT-014", "a quantization state names format, block size, dtype and shape", problem)
    return _About(
        value["quant_type"], value["blocksize"], DTYPES[value["dtype"]], tuple(value["shape"]), nested,
        value.get("nested_offset", 0.0),
    )  # fmt: skip


def _problem(value: object, format: str, nested: bool) -> str:
    """What is wrong with the JSON part; empty when nothing is."""
    if not isinstance(value, dict):
        return f"{type(value).__name__} instead of an object"
    sizes = value.get("shape")
    blocksize = value.get("blocksize")
    checks = {
        "quant_type": value.get("quant_type") == format,
        "dtype": value.get("dtype") in DTYPES,
        "shape": isinstance(sizes, list) and 1 <= len(sizes) <= 4 and all(type(size) is int and 0 < size < 2**31 for size in sizes),
        "blocksize": type(blocksize) is int and 2 <= blocksize <= 1 << 16 and blocksize % 2 == 0,
        "nested_blocksize": not nested or value.get("nested_blocksize") == NESTED_BLOCKSIZE,  # the only one that the kernels know
        "nested_dtype": not nested or value.get("nested_dtype") == "float32",
        "nested_offset": not nested or (isinstance(value.get("nested_offset"), float) and math.isfinite(value["nested_offset"])),
    }
    return ", ".join(f"{key} = {value.get(key)!r}" for key, right in checks.items() if not right)


def _part(name: str, tensors: Mapping[str, Tensor], part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    key = f"{name}.{part}"
    if key not in tensors:
        raise _fault(key, "E-WEIGHT-015", "every part of a quantized weight is there", "no such tensor")
    return _require(key, tensors[key], part, dtype, shape)


def _require(key: str, tensor: Tensor, part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise _fault(key, "E-WEIGHT-016", f"{part} has the size that the weight's shape asks for", found, f"{dtype} of shape {shape}")
    if dtype == torch.float32 and tensor.device.type != "meta" and not bool(torch.isfinite(tensor).all()):
        raise _fault(key, "E-WEIGHT-017", "scales and codebooks are finite", "NaN or infinity")
    return tensor


def _rows(name: str, stored: Tensor, scales: Tensor, layout: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, QuantState]:
    if stored.dim() != 2 or stored.dtype != torch.int8:
        raise _fault(name, "E-WEIGHT-018", "an 8-bit weight is int8 (out, in)", f"{stored.dtype} of shape {tuple(stored.shape)}")
    if layout is not None and int(layout) != 0:
        raise _fault(name, "E-WEIGHT-019", "an 8-bit weight is stored in rows", f"weight_format {int(layout)}", "0 (row)")
    scales = _require(f"{name.rpartition('.')[0]}.SCB", scales, "SCB", torch.float32, (stored.shape[0],))
    empty = torch.empty(0, dtype=torch.float32, device=stored.device)
    return stored, QuantState("int8", empty, scales, stored.shape[1], (stored.shape[0], stored.shape[1]), dtype)


def _fault(place: str, code: str, rule: str, found: str, expected: str = "") -> WeightError:
    return WeightError(rule, code=code, place=f"tensor {place}", found=found, expected=expected, remedy="write the file again")


@dataclass(frozen=True)
class QuantizationConfig:
    """What a model folder's config.json says about its quantization, in our words."""

    format: str
    double_quant: bool = False
    compute_dtype: torch.dtype | None = None
    storage_dtype: torch.dtype = torch.uint8
    skip: tuple[str, ...] = field(default=())


def quantization_config_json(
    format: str, *, double_quant: bool, compute_dtype: torch.dtype = torch.bfloat16, skip: tuple[str, ...] = ()
) -> dict[str, object]:
    """The `quantization_config` block of config.json that transformers and bitsandbytes read."""
    four = format != "int8"
    return {
        "_load_in_4bit": four, "_load_in_8bit": not four, "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": format if four else "fp4",
        "bnb_4bit_use_double_quant": four and double_quant,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": list(skip) or None,
        "llm_int8_threshold": 6.0, "load_in_4bit": four, "load_in_8bit": not four, "quant_method": "bitsandbytes",
    }  # fmt: skip


def read_quantization_config(block: Mapping[str, object]) -> QuantizationConfig:
    """The reverse of `quantization_config_json`.  Raises WeightError on another method or a setting that we do not know."""
    four, eight = bool(block.get("load_in_4bit")), bool(block.get("load_in_8bit"))
    kind = str(block.get("bnb_4bit_quant_type", "fp4")) if four else "int8"
    storage = str(block.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    compute = block.get("bnb_4bit_compute_dtype")
    named = None if compute is None else str(compute).removeprefix("torch.")
    known = {**DTYPES, "uint8": torch.uint8}
    checks = {
        "quant_method": block.get("quant_method") == "bitsandbytes", "load_in_4bit": four != eight,
        "bnb_4bit_quant_type": kind in ("nf4", "fp4", "int8"), "bnb_4bit_quant_storage": storage in known,
        "bnb_4bit_compute_dtype": named is None or named in DTYPES,
    }  # fmt: skip
    wrong = [key for key, right in checks.items() if not right]
    if wrong:
        raise WeightError(
            "a quantized model says in a known way how it was quantized", code="E-WEIGHT-020", place="config.json, quantization_config",
            found=", ".join(f"{key} = {block.get(key)!r}" for key in wrong), expected="bitsandbytes, 4 bit (nf4, fp4) or 8 bit",
        )
    skip = block.get("llm_int8_skip_modules") or ()
    names = tuple(str(name) for name in skip) if isinstance(skip, (list, tuple)) else ()
    compute_dtype = None if named is None else DTYPES[named]
    return QuantizationConfig(kind, bool(block.get("bnb_4bit_use_double_quant")), compute_dtype, known[storage], names)
