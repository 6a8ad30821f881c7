"""Quantize while loading, through transformers' public registry of quantizers.

    file -> one tensor at a time -> [fusion of experts] -> QuantizeArriving.convert -> packed bytes + scales on the module

Before the weights arrive, every layer to be quantized is replaced on the meta device by an empty QuantLinear or QuantExperts.
What waits there for a dense weight says that it is of the layer's own dtype: transformers may cast a tensor to the dtype of what waits
for it before it is packed (5.17 to 5.22 do), and cast to bytes every weight below one is zero.
Which layers (T56): matrices inside the backbone.  Left as they are, whatever the user adds: output and classification heads,
routers, embeddings, and layers whose owner reads their raw weight.  A user's list is added to these, never put in their place.

Sources: https://huggingface.co/docs/transformers/main/en/quantization/contribute (the registry).
"""

import inspect
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte import host, surgery
from halfbyte.config.patterns import skips
from halfbyte.errors import HalfbyteError, ModelError, WeightError, nearest
from halfbyte.formats import bnb4bit
from halfbyte.quant import blockwise
from halfbyte.quant.codebooks import CODEBOOKS
from halfbyte.quant.dense import is_conv1d, is_linear_like, shape_of
from halfbyte.quant.experts import QuantExperts, is_experts
from halfbyte.quant.linear import STATE_BUFFERS, QuantLinear
from halfbyte.quant.quant_state import QuantState

METHOD = "halfbyte"
KEPT_PAGES = 64 << 20  # bytes of weights that are packed before their pages are given back
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_ROUTER_WORDS = frozenset({"router", "gate", "gating", "shared_expert_gate", "shared_experts_gate"})


class Report:
    """What happened inside one load; a copy of a config shares it, for transformers copies configs on the way in.

    fault       the first error of a conversion; transformers would turn it into text
    quantized   names of the layers that are packed
    written     names of the weights that got their packed values
    transposed  those that keep (in, out) in the file
    renaming    transformers' conversions between the names and layouts of the file and those of the model, for writing it back
    files       the mapped files the weights come from
    """

    def __init__(self) -> None:
        self.files: list[Path] = []
        self._read = 0
        self.fault: HalfbyteError | None = None
        self.quantized: list[str] = []
        self.written: set[str] = set()
        self.transposed: set[str] = set()
        self.renaming: list[WeightTransform] = []

    def __deepcopy__(self, memo: object) -> "Report":
        return self

    def packed(self, weight: torch.Tensor) -> None:
        """Note a weight that will not be read again; from time to time the pages read so far go back to the system."""
        self._read += weight.nbytes
        if self._read >= KEPT_PAGES:
            host.drop_mapped_pages(self.files)
            self._read = 0


@register_quantization_config(METHOD)
class LoadConfig(QuantizationConfigMixin):
    """What transformers carries to the quantizer; `stored` names the layers that the folder already holds packed."""

    def __init__(
        self, format: str = "nf4", blocksize: int = 64, double_quant: bool = True, skip: Sequence[str] = (), quantize_head: bool = False,
        stored: Sequence[str] = (), report: Report | None = None, **ignored: object,
    ) -> None:  # fmt: skip
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format, self.blocksize, self.double_quant = format, blocksize, double_quant
        self.skip, self.quantize_head, self.stored = list(skip), quantize_head, list(stored)
        self.report = report or Report()

    def to_dict(self) -> dict[str, object]:
        """What goes into a config.json."""
        return {
            "quant_method": METHOD, "format": self.format, "blocksize": self.blocksize, "double_quant": self.double_quant,
            "skip": list(self.skip), "quantize_head": self.quantize_head,
        }  # fmt: skip

    def carried(self) -> dict[str, object]:
        """The form in which a config object takes it along, as if read from config.json."""
        return {**self.to_dict(), "stored": self.stored, "report": self.report}


class QuantizeArriving(ConversionOps):
    """One arriving tensor -> the buffers of the module that waits for it."""

    def __init__(self, config: LoadConfig) -> None:
        self.config = config

    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **ignored: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
        made: dict[str, torch.Tensor] = {}
        assert model is not None
        for name, arrived in input_dict.items():
            tensor = arrived[0] if isinstance(arrived, list) else arrived
            assert isinstance(tensor, torch.Tensor)
            try:
                made.update(_packed(model, name, tensor, self.config))
                self.config.report.written.add(name)
                self.config.report.packed(tensor)
            except HalfbyteError as fault:
                self.config.report.fault = self.config.report.fault or fault
                raise
        return made


def _packed(model: nn.Module, name: str, tensor: torch.Tensor, config: LoadConfig) -> dict[str, torch.Tensor]:
    prefix = name.rpartition(".")[0]
    module = model.get_submodule(prefix)
    if not tensor.is_floating_point():
        raise WeightError(
            "a weight that is to be packed must arrive as real numbers", code="E-WEIGHT-056", place=f"tensor {name}",
            found=str(tensor.dtype).removeprefix("torch."), expected="a floating-point dtype",
            remedy="the file holds whole numbers, or this version of transformers cast them; load without quantization: --quant none",
        )  # fmt: skip
    if isinstance(module, QuantExperts):
        return _packed_experts(module, prefix, name.rpartition(".")[2], tensor)
    assert isinstance(module, QuantLinear)
    wanted = (module.out_features, module.in_features)
    if prefix in config.report.transposed:
        tensor = tensor.T  # Conv1D keeps (in, out)
    if tuple(tensor.shape) != wanted:
        raise wrong_shape(name, tuple(tensor.shape), wanted)
    stored, state = blockwise.quantize(tensor.to(module.dtype), config.format, config.blocksize, config.double_quant, name)
    return _filled(module, prefix, stored, state)


def _packed_experts(module: QuantExperts, prefix: str, last: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    count, rows, columns = module.shapes[last]
    wanted = (count, columns, rows) if module.is_transposed else (count, rows, columns)
    if tuple(tensor.shape) != wanted:
        raise wrong_shape(f"{prefix}.{last}", tuple(tensor.shape), wanted)
    made = module.parts(last, tensor.to(module.dtype), f"{prefix}.{last}")
    if module.format != "int8":
        made["codebook"] = CODEBOOKS[module.format].clone()
    if module.double_quant:
        made["nested_codebook"] = CODEBOOKS["dynamic-signed"].clone()
    return {f"{prefix}.{key}": value for key, value in made.items()}


def _filled(module: QuantLinear, prefix: str, stored: torch.Tensor, state: QuantState) -> dict[str, torch.Tensor]:
    """The buffers of `module` by full name; the module's own description is made that of `state`."""
    module.format, module.blocksize, module.dtype = state.format, state.blocksize, state.dtype
    made = QuantLinear(stored, state)
    return {f"{prefix}.{key}": value for key, value in made.named_buffers(recurse=False)}


class ReadPacked(ConversionOps):
    """The tensors in which bitsandbytes keeps one weight -> the buffers of the QuantLinear that waits for it."""

    def __init__(self, quantizer: "Quantizer") -> None:
        self.hf_quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: nn.Module | None = None, full_layer_name: str = "", **ignored: object
    ) -> dict[str, torch.Tensor]:
        assert model is not None
        config = self.hf_quantizer.quantization_config
        tensors: dict[str, torch.Tensor] = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        prefix, _, last = full_layer_name.rpartition(".")
        module = model.get_submodule(prefix)
        try:
            if not isinstance(module, QuantLinear):
                (arrived,) = tensors.values()
                return {full_layer_name: arrived.to(getattr(module, last).dtype)}
            named = {f"{prefix}.{key}": value for key, value in tensors.items()}
            stored, state = bnb4bit.from_named_tensors(full_layer_name, named, dtype=module.dtype)
            if state.shape != (module.out_features, module.in_features):
                raise wrong_shape(full_layer_name, state.shape, (module.out_features, module.in_features))
            config.report.written.add(full_layer_name)
            return _filled(module, prefix, stored, state)
        except HalfbyteError as fault:
            config.report.fault = config.report.fault or fault
            raise


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Puts the empty layers in place and says which arriving tensors are packed."""

    requires_calibration = False
    quantization_config: LoadConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **ignored: object) -> nn.Module:
        config = self.quantization_config
        names = _stored_layers(model, config.stored) if config.stored else layers_to_quantize(model, config.skip, config.quantize_head)
        for name in names:
            old = model.get_submodule(name)
            if is_conv1d(old):
                config.report.transposed.add(name)
            made = _empty(old, config)
            surgery.replace(model, name, made if config.stored else awaiting_values(made))
        config.report.quantized = names
        return model

    def _process_model_after_weight_loading(self, model: Any, **ignored: object) -> Any:
        """A packed model saves its buffers as they are (Trainer's checkpoints); models/save.py turns names back with `renaming`."""
        used = [one for one in model._weight_conversions if not any(isinstance(op, ReadPacked) for op in getattr(one, "operations", ()))]
        self.quantization_config.report.renaming = used
        model._weight_conversions = []  # the loader's own record on this instance
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **ignored: object) -> bool:
        module, last = get_module_from_name(model, param_name)
        if isinstance(module, QuantExperts):
            return last in module._buffers
        return isinstance(module, QuantLinear) and last in STATE_BUFFERS

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        module, last = get_module_from_name(model, param_name)
        waits = isinstance(module, (QuantLinear, QuantExperts)) and last in _dense_names(module)
        return 1.0 if waits else float(param.element_size())  # a packed element is a byte, whatever waits for it

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeArriving(self.quantization_config)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """For a folder that is already packed: collect all tensors of one weight under its name."""
        if not self.pre_quantized:
            return []
        parts = [name.removeprefix("x.") for name in bnb4bit.names_of("x.weight")]
        return [WeightConverter([*parts[1:], parts[0]], "weight", [ReadPacked(self)])]

    def is_serializable(self, *ignored: object, **also_ignored: object) -> bool:
        """Trainer's checkpoints hold the packed buffers under the names of the modules; models/save.py writes the shared format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed weights train; transformers.Trainer asks."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """transformers.Trainer refuses a quantized model without PEFT's adapters unless this is true; ours it does not know."""
        return True


def _empty(old: nn.Module, config: LoadConfig) -> nn.Module:
    """The packed layer without values that waits in the place of `old`."""
    if is_experts(old):
        return QuantExperts(old, config.format, config.blocksize, config.double_quant, device="meta")
    rows, columns = shape_of(old)
    return QuantLinear.empty(
        columns, rows, bias=getattr(old, "bias", None) is not None, format=config.format, blocksize=config.blocksize,
        double_quant=config.double_quant, dtype=old.get_parameter("weight").dtype, device="meta",
    )  # fmt: skip


def _dense_names(module: QuantLinear | QuantExperts) -> list[str]:
    """The buffers under whose names dense weights arrive."""
    return list(module.shapes) if isinstance(module, QuantExperts) else ["weight"]


def awaiting_values(module: nn.Module) -> nn.Module:
    """`module`, an empty packed layer, with the layer's own dtype where a dense weight will arrive; loading puts the bytes there."""
    assert isinstance(module, (QuantLinear, QuantExperts))
    for name in _dense_names(module):
        module.register_buffer(name, module.get_buffer(name).to(module.dtype))
    return module


# -- which layers -------------------------------------------------------------------------------------------------------


def layers_to_quantize(model: nn.Module, skip: Sequence[str] = (), quantize_head: bool = False) -> list[str]:
    """Names of the layers and fused experts to pack, in definition order; raises ModelError where a pattern of `skip` matches nothing."""
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear or is_conv1d(module) or is_experts(module)}
    left = {name: reason for name, module in found.items() if (reason := reason_to_leave(model, name, module, quantize_head))}
    for pattern in skip:
        named = [name for name in found if skips(pattern, name)]
        if not named:
            raise ModelError(
                "each pattern of quant.skip must match a layer", code="E-MODEL-041", place="quant.skip", found=repr(pattern),
                expected="a layer name, a part of one between dots, or a pattern with *",
                remedy=nearest(pattern, {name.rpartition(".")[2] for name in found}),
            )  # fmt: skip
        left.update(dict.fromkeys(named, "asked for"))
    return [name for name in found if name not in left]


def reason_to_leave(model: nn.Module, name: str, module: nn.Module, quantize_head: bool = False) -> str:
    """Why a linear layer must stay as it is; empty when it may be packed."""
    if module is model.get_output_embeddings():  # type: ignore[operator]
        if not quantize_head:
            return "output head"
        return "tied to the embedding" if model.config.get_text_config().tie_word_embeddings else ""  # type: ignore[union-attr, operator]
    if not name.startswith(f"{model.base_model_prefix}."):
        return "classification head"
    if is_experts(module):
        return ""
    if _is_router(model, name, module):
        return "router"
    parent, _, last = name.rpartition(".")
    if _reads_weight(type(model.get_submodule(parent)), last):  # type: ignore[arg-type]
        return "raw weight is read by its owner"
    return ""


def _is_router(model: nn.Module, name: str, module: nn.Module) -> bool:
    """A layer of a mixture-of-experts model whose output chooses experts: by its name, or by its width beside experts."""
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    counts = {getattr(text, key, None) for key in _EXPERT_COUNTS} - {None, 0, 1}
    if not counts:
        return False
    if _ROUTER_WORDS & set(name.split(".")):
        return True
    beside = {child for child, _ in model.get_submodule(name.rpartition(".")[0]).named_children()}
    return shape_of(module)[0] in counts and "experts" in beside


@cache
def _reads_weight(owner: type, child: str) -> bool:
    """The owner's source uses self.<child>.weight, so the layer's forward is not all that is asked of it."""
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):
        return False
    return re.search(rf"self\.{re.escape(child)}\.weight\b(?!\.(?:dtype|device))", source) is not None


def _stored_layers(model: nn.Module, stored: Sequence[str]) -> list[str]:
    """The model's names of the layers that a packed folder names `stored`, with or without the backbone's prefix."""
    linear = [name for name, module in model.named_modules() if is_linear_like(module)]
    by_tail = {name.removeprefix(f"{model.base_model_prefix}."): name for name in linear}
    found = {by_tail.get(name.removeprefix(f"{model.base_model_prefix}."), "") for name in stored}
    lost = [name for name in stored if by_tail.get(name.removeprefix(f"{model.base_model_prefix}.")) is None]
    if lost:
        raise WeightError(
            "every packed tensor must belong to a layer of the model", code="E-WEIGHT-051", place=f"tensor {lost[0]}.weight",
            found=f"{len(lost)} without a layer", remedy="compare config.json with the original model's",
        )  # fmt: skip
    return [name for name in linear if name in found]


def wrong_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> WeightError:
    """The error for a tensor that does not fit its layer."""
    return WeightError(
        "a tensor must have the shape that config.json asks for", code="E-WEIGHT-052", place=f"tensor {name}", found=str(found),
        expected=str(expected), remedy="weights and config.json belong to different models, or one was edited",
    )  # fmt: skip
