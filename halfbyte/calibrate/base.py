"""A model and some rows -> a packed folder that is nearer to the model, and beside it the adapter that begins on the rest of the error.

    OUT/                    bitsandbytes' format, as any packed folder (models/save.py)
    OUT/calibration.json    quality of each layer (quality.py)
    OUT/start/              PEFT adapter: the low-rank start; lora.init=calibrated begins from it

Embeddings and the output head are left as they are.  Fused experts, and layers that no token reached, get plain scales, and the report
says so.  The dense model is in memory meanwhile, beside one group of moments (moments.py) and the packed result.
The folder appears whole or not at all.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import host
from halfbyte.adapters.folder import save_adapter
from halfbyte.calibrate.layer import CalibratedLayer, Update, bits_of, calibrate_layer
from halfbyte.calibrate.moments import CHECK_EVERY, MOMENTS_BYTES, collect
from halfbyte.calibrate.quality import LayerQuality, Quality
from halfbyte.config.lora import LoraConfig
from halfbyte.config.model import ModelConfig
from halfbyte.config.quant import QuantConfig
from halfbyte.errors import DataError, DoesNotFitError, ModelError, StorageError, UnsupportedError
from halfbyte.log import logger
from halfbyte.lora.inject import inject
from halfbyte.lora.targets import alpha_of, candidates, completed, rank_of, resolve
from halfbyte.lora.variants import scaling_of
from halfbyte.models.calibrated_base import START
from halfbyte.models.load import choose_dtype, load_model, load_tokenizer
from halfbyte.models.quantizer import layers_to_quantize
from halfbyte.models.save import move_in, save_quantized
from halfbyte.models.source import Source, folder_digest
from halfbyte.quant import blockwise
from halfbyte.quant.dense import dense_weight
from halfbyte.quant.experts import QuantExperts, is_experts
from halfbyte.quant.linear import QuantLinear
from halfbyte.shape import ModelShape
from halfbyte.surgery import replace
from halfbyte.units import bytes_text

REPORT = "calibration.json"
LEAST_ROWS, LEAST_TOKENS = CHECK_EVERY, 256
"""One row of so many checks what the others fit, so there must be as many; fewer tokens than this say nothing about a layer."""
MOST_TOKENS = 65_536
Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Calibration:
    """What a calibration is told: storage of the base, the adapter to begin (None: none), the model's own settings, the seed."""

    quant: QuantConfig
    lora: LoraConfig | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 0


def choose_rows(rows: Sequence[Sequence[int]], count: int, seed: int, place: str) -> list[Sequence[int]]:
    """At most `count` of the rows, drawn with the seed, together at most MOST_TOKENS tokens.  Raises DataError for too few."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[Sequence[int]] = []
    tokens = 0
    for number in order[:count]:
        if rows[number] and tokens + len(rows[number]) <= MOST_TOKENS:
            chosen.append(rows[number])
            tokens += len(rows[number])
    if len(chosen) < LEAST_ROWS or tokens < LEAST_TOKENS:
        raise DataError(
            "a base is calibrated on enough rows to tell which weights matter", code="E-DATA-099", place=place,
            found=f"{len(chosen)} rows with {tokens} tokens", expected=f"at least {LEAST_ROWS} rows and {LEAST_TOKENS} tokens",
            remedy="give more rows, or leave the calibration out", nothing_done="Nothing was written.",
        )  # fmt: skip
    return chosen


def calibrate(
    model: Any, rows: Sequence[Sequence[int]], quant: QuantConfig, lora: LoraConfig | None = None, *, seed: int = 0,
    bytes_at_once: int = MOMENTS_BYTES,
) -> tuple[Quality, dict[str, tuple[Tensor, Tensor]]]:  # fmt: skip
    """Pack the dense layers of `model` in place; (quality, name -> start factors) for the layers that `lora` adapts.

    rows  token ids; every CHECK_EVERY-th is kept for judging.  The model must carry no adapter.
    """
    names = layers_to_quantize(model, quant.skip, quant.quantize_head)
    backbone = f"{model.base_model_prefix}."
    linear = [name for name in names if not is_experts(model.get_submodule(name)) and name.startswith(backbone)]
    updates = {} if lora is None else updates_of(model, lora)
    made: dict[str, CalibratedLayer] = {}
    logger().info("calibrating %d layers on %d rows", len(linear), len(rows))
    for group in collect(model, linear, rows, bytes_at_once=bytes_at_once):
        for name, seen in group.items():
            made[name] = calibrate_layer(name, dense_weight(model.get_submodule(name)), seen, quant, updates.get(name), seed)
            if 10 * len(made) // len(linear) > 10 * (len(made) - 1) // len(linear):
                logger().info("calibrated %d of %d layers", len(made), len(linear))
    layers = [_put(model, name, made.get(name), quant, name in linear) for name in names]
    checking = sum(len(row) for row in rows[CHECK_EVERY - 1 :: CHECK_EVERY])
    quality = Quality(tuple(layers), len(rows), sum(map(len, rows)), checking, 0 if lora is None else lora.rank)
    return quality, {name: one.factors for name, one in made.items() if one.factors is not None}


def updates_of(model: nn.Module, lora: LoraConfig) -> dict[str, Update]:
    """name -> rank and scaling of the linear layers that `lora` adapts.  Raises TargetError where it matches nothing."""
    config, kinds = completed(model, lora), candidates(model)
    found = {}
    for name in resolve(model, config):
        if kinds[name] == "linear":
            rank = rank_of(config, name)
            found[name] = Update(rank, scaling_of(alpha_of(config, name), rank, config.rslora))
    return found


def _put(model: nn.Module, name: str, made: CalibratedLayer | None, quant: QuantConfig, in_backbone: bool) -> LayerQuality:
    """The packed layer in the place of the dense one; what was done."""
    old = model.get_submodule(name)
    options = (quant.format, quant.blocksize, quant.double_quant, name)
    if is_experts(old):
        packed = QuantExperts.from_experts(old, *options)
        replace(model, name, packed)
        weights = sum(own.numel() for own in old.parameters() if own.dim() == 3)
        bits = 8 * sum(own.nbytes for own in packed.buffers()) / weights
        return LayerQuality(name, "plain: fused experts", weights, bits)
    weight = dense_weight(old)
    if made is None:
        stored, state = blockwise.quantize(weight, *options)
        why = "plain: no token reached it" if in_backbone else "plain: outside the backbone"
        quality = LayerQuality(name, why, weight.numel(), bits_of(stored, state))
    else:
        stored, state, quality = made.packed, made.state, made.quality
    new = QuantLinear(stored, state)
    bias = getattr(old, "bias", None)
    new.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    replace(model, name, new)
    return quality


def write_base(source: Source, rows: Sequence[Sequence[int]], out: Path, how: Calibration, *, over: bool = True) -> Quality:
    """Calibrate the model of `source` and write the folder; `over` one that is there, or to a new place only.

    Raises DoesNotFitError, ModelError, NumericError, StorageError, TargetError.
    """
    settings = how.model
    require_room(settings, source.folder)
    require_writable(out)
    model = load_model(
        source, dtype=settings.dtype, quant=QuantConfig(format="none"), task=settings.task, labels=settings.labels,
        attention=settings.attention,
    )  # fmt: skip
    quality, factors = calibrate(model, rows, how.quant, how.lora, seed=how.seed)
    try:
        with _workplace(out) as temporary:
            made = save_quantized(model, load_tokenizer(source), Path(temporary) / "new")
            (made / REPORT).write_text(json.dumps(quality.as_dict(), indent=1) + "\n", encoding="utf-8")
            if how.lora is not None:
                _write_start(model, made, out, how, factors)
            move_in(made, out, Path(temporary) / "old", over=over)
    except OSError as fault:
        raise _unwritable(fault, out) from fault
    return quality


def require_room(model: ModelConfig, folder: Path) -> None:
    """Raise DoesNotFitError where the dense weights alone are more than what is free; calibrating holds them and their packed form."""
    try:
        shape = ModelShape.read(folder)
    except (ModelError, UnsupportedError):
        return  # a family whose size is not known: the plan says so
    dtype, _ = choose_dtype(model.dtype)
    needed, free = shape.total_params * dtype.itemsize, host.memory_bytes()[1]
    if needed > free:
        raise DoesNotFitError(
            "calibrating holds the dense weights in memory once", code="E-FIT-402", place=str(folder),
            found=f"{bytes_text(needed)} of weights in {str(dtype).removeprefix('torch.')} (estimate, the weights alone)",
            expected=f"at most {bytes_text(free)}, what is free", nothing_done="Nothing was loaded.",
            remedy="leave the calibration out (quant.calibrate=false), or run `halfbyte quantize --calibrate` on a larger machine"
            " and train from its folder",
        )  # fmt: skip


def require_writable(out: Path) -> None:
    """Calibrating takes long: whether its result can be written is tried first."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _workplace(out).cleanup()
    except OSError as fault:
        raise _unwritable(fault, out) from fault


def _workplace(out: Path) -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)


def unfinished(out: Path) -> list[Path]:
    """Folders in which a calibration for `out` is at work, or was when it was killed."""
    named = [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}-")]
    return sorted(path for path in named if path.is_dir() and not path.is_symlink())


def _unwritable(fault: OSError, out: Path) -> StorageError:
    return StorageError(
        "the calibrated folder must be writable and have room", code="E-STORE-055", place=str(out),
        found=f"{type(fault).__name__}: {fault.strerror or fault}", remedy="free some space, or name another folder",
        nothing_done="Nothing was written.",
    )  # fmt: skip


def _write_start(model: nn.Module, made: Path, out: Path, how: Calibration, factors: Factors) -> None:
    """The adapter that begins on the error; a layer without factors begins as usual.  It names the folder's later place."""
    assert how.lora is not None
    inject(model, how.lora.model_copy(update={"init": "calibrated"}), seed=how.seed, begun=factors)
    digest = folder_digest(made, (".safetensors",))
    save_adapter(model, made / START, base_name=str(out.absolute()), base_digest=digest, allow_untrained=True)
