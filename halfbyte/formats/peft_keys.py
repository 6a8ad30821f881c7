"""PEFT's tensor names <-> this program's.  P = "base_model.model." + module.

| ours | PEFT's |
|---|---|
| `<module>.lora_a`, `.lora_b`, `.lora_bias` | `P.lora_A.weight`, `P.lora_B.weight`, `P.lora_B.bias` |
| the same of an embedding | `P.lora_embedding_A`, `P.lora_embedding_B` |
| `<module>.magnitude` | `P.lora_magnitude_vector` |
| `<module>.<parameter>.lora_a` of fused experts | `P.lora_A.weight`; of two parameters the first nests: `P.base_layer.lora_A.weight` |
| `<module>.bias` of an adapted module | `P.base_layer.bias` |
| `<module>.weight`, `.bias` of any other | the same name after the prefix |

PEFT wraps fused parameters in the order the module defines them, so the first is the innermost; their own names are not in the keys.
A name that is none of these is an error.  Source: PEFT 0.21.2, peft/utils/save_and_load.py, peft/tuners/lora/layer.py (ParamWrapper)
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.formats.peft_config import refused

PREFIX = "base_model.model."
INNER = ".base_layer"
LINEAR = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "lora_bias": ".lora_B.bias", "magnitude": ".lora_magnitude_vector"}
EMBEDDING = {"lora_a": ".lora_embedding_A", "lora_b": ".lora_embedding_B", "magnitude": ".lora_magnitude_vector"}
# Fused expert weights in the order in which every module of transformers defines them.
EXPERT_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
MODULE_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass
class Named:
    """Tensors by our names; module -> kind; modules trained whole; base tables stored beside; type of the factors."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    whole: dict[str, None] = field(default_factory=dict)
    base_copies: dict[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


def to_peft(tensors: Mapping[str, Tensor], kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """name -> tensor as PEFT writes it; `kinds` names the adapted modules.  Tensors are not copied."""
    prefixes = {name: PREFIX + name for name in kinds}
    experts: dict[str, list[str]] = defaultdict(list)
    for name, kind in kinds.items():
        if kind == "experts":
            experts[name.rpartition(".")[0]].append(name)
    for module, owned in experts.items():
        inner_first = sorted(owned, key=lambda name: expert_rank(name.rpartition(".")[2]))
        for depth, name in enumerate(reversed(inner_first)):
            prefixes[name] = PREFIX + module + INNER * depth
    foreign: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        table = EMBEDDING if kinds.get(module) == "embedding" else LINEAR
        if module in kinds and part in table:
            foreign[prefixes[module] + table[part]] = tensor
        elif module in kinds:
            foreign[f"{prefixes[module]}{INNER}.{part}"] = tensor
        else:
            foreign[PREFIX + name] = tensor
    return foreign


def expert_rank(parameter: str) -> int:
    """Place of a fused parameter in definition order."""
    return EXPERT_ORDER.index(parameter) if parameter in EXPERT_ORDER else len(EXPERT_ORDER)


def from_peft(foreign: Mapping[str, Tensor], raw: Mapping[str, Any], folder: Path) -> Named:
    """Our names for all tensors of a file.  AdapterError for a name that is unknown, a pair that is torn, or no factor at all."""
    named = Named()
    fused: dict[str, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    suffixes = [(suffix, part, "linear") for part, suffix in LINEAR.items()] + [(suffix, part, "embedding") for part,
        suffix in EMBEDDING.items()]
    rest: dict[str, Tensor] = {}
    for key in sorted(foreign):
        name = own_name(key, folder)
        suffix, part, kind = next((entry for entry in suffixes if name.endswith(entry[0])), ("", "", ""))
        if not suffix:
            rest[name] = foreign[key]
            continue
        module = name.removesuffix(suffix)
        outer = module
        while outer.endswith(INNER):
            outer = outer.removesuffix(INNER)
        if fused_parameters(outer, raw):
            fused[outer][(len(module) - len(outer)) // len(INNER)][part] = foreign[key]
        else:
            named.tensors[f"{require_name(module, key, folder)}.{part}"] = foreign[key]
            # A magnitude alone does not tell an embedding from a linear layer.
            named.kinds[module] = named.kinds.get(module, kind) if part == "magnitude" else kind
    for module, levels in fused.items():
        name_experts(named, module, levels, fused_parameters(module, raw), folder)
    name_rest(named, rest, raw, folder)
    require_pairs(named, raw, len(foreign), folder)
    named.dtype = next(named.tensors[f"{module}.lora_a"].dtype for module in named.kinds)
    return named


def own_name(key: str, folder: Path) -> str:
    """The key without PEFT's prefix."""
    if "_orig_mod." in key:
        raise refused(
            "E-ADAPT-050", "tensor names must be those of the model, not of a compiled copy", f"{folder}, tensor {key}", "_orig_mod.",
            key.replace("_orig_mod.", ""), "save from the model that was given to torch.compile",
        )  # fmt: skip
    if not key.startswith(PREFIX):
        raise unknown_name(key, folder)
    return key.removeprefix(PREFIX)


def require_name(module: str, key: str, folder: Path) -> str:
    """The module name, if it is one."""
    if not MODULE_NAME.fullmatch(module) or module.endswith(INNER):
        raise unknown_name(key, folder)
    return module


def unknown_name(key: str, folder: Path) -> Exception:
    """The error for a tensor that no rule of the format explains."""
    return refused(
        "E-ADAPT-051", "every tensor of an adapter file must be one that the format knows", f"{folder}, tensor {key[:200]}",
        "an unknown name",
        PREFIX + "<module>.lora_A.weight and the like",
    )  # fmt: skip


def fused_parameters(module: str, raw: Mapping[str, Any]) -> list[str]:
    """Names of the targeted fused parameters of this module, in definition order; empty for any other module."""
    found = set()
    for target in raw["target_parameters"] or ():
        owner, _, parameter = target.rpartition(".")
        if parameter not in ("weight", "bias") and (owner == "" or module == owner or module.endswith("." + owner)):
            found.add(parameter)
    # An ending without an owner ("down_proj") also meets plain modules: those named like the parameter, and those targeted themselves.
    plain = module.rpartition(".")[2] in found or targeted_whole(module, raw)
    return [] if plain else sorted(found, key=lambda parameter: (expert_rank(parameter), parameter))


def targeted_whole(module: str, raw: Mapping[str, Any]) -> bool:
    """Whether the module itself is a target, by target_modules or by its weight in target_parameters (how PEFT adapts a router)."""
    named = raw["target_modules"] or ()
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None
    weights = [target.removesuffix(".weight") for target in raw["target_parameters"] or () if target.endswith(".weight")]
    return any(module == target or module.endswith("." + target) for target in [*named, *weights])


def name_experts(named: Named, module: str, levels: dict[int, dict[str, Tensor]], parameters: list[str], folder: Path) -> None:
    """Give the nested factors of one module the names of its parameters: the deepest is the first that is defined."""
    unordered = [name for name in parameters if name not in EXPERT_ORDER]
    if len(levels) != len(parameters) or sorted(levels) != list(range(len(levels))) or (unordered and len(parameters) > 1):
        raise refused(
            "E-ADAPT-052", "fused expert factors must nest one level per targeted parameter", f"{folder}, module {module}",
            f"{len(levels)} levels", f"{len(parameters)}: {', '.join(parameters)}",
        )  # fmt: skip
    for depth, parameter in enumerate(reversed(parameters)):
        named.kinds[f"{module}.{parameter}"] = "experts"
        named.tensors.update({f"{module}.{parameter}.{part}": tensor for part, tensor in levels[depth].items()})


def require_pairs(named: Named, raw: Mapping[str, Any], count: int, folder: Path) -> None:
    """Every adapted module has both factors, and exactly the other parts that the config announces."""
    if not named.kinds:
        raise refused(
            "E-ADAPT-053", "an adapter file must hold low-rank factors", str(folder), f"none among {count} tensors",
            PREFIX + "<module>.lora_A.weight", "an empty file comes from saving the wrong model or a sharded one",
        )  # fmt: skip
    for module, kind in named.kinds.items():
        parts = {"lora_a", "lora_b"} | ({"magnitude"} if raw["use_dora"] else set()) | ({"lora_bias"} if raw["lora_bias"] else set())
        found = {part for part in (*LINEAR, "lora_bias") if f"{module}.{part}" in named.tensors}
        if found != parts:
            raise refused(
                "E-ADAPT-054", "every adapted module must have the tensors its config announces", f"{folder}, module {module} ({kind})",
                ", ".join(sorted(found)), ", ".join(sorted(parts)),
            )  # fmt: skip
        wide = [part for part in ("lora_a", "lora_b") if named.tensors[f"{module}.{part}"].dim() != 2]
        if wide or not all(named.tensors[f"{module}.{part}"].is_floating_point() for part in found):
            raise refused("E-ADAPT-055", "low-rank factors are matrices of floating-point numbers", f"{folder}, module {module}",
                          str(tuple(named.tensors[f"{module}.lora_a"].shape)), "(rank, in) and (out, rank)")  # fmt: skip


def name_rest(named: Named, rest: Mapping[str, Tensor], raw: Mapping[str, Any], folder: Path) -> None:
    """Whole modules, base biases and the base tables that PEFT adds beside an adapted embedding or head."""
    saved = tuple(raw["modules_to_save"] or ())
    for name, tensor in rest.items():
        module, _, part = name.rpartition(".")
        base = module.removesuffix(INNER)
        # PEFT takes every module whose name merely ends in an entry: "norm" also means "input_layernorm".
        owner = next((owner for owner in owners(name) if owner.endswith(saved)), None)
        if module.endswith(INNER) and base in named.kinds and part == "weight":
            named.base_copies[f"{base}.weight"] = tensor
        elif owner is not None:
            named.whole[owner] = None
            named.tensors[name] = tensor
        elif part == "bias" and raw["bias"] != "none" and MODULE_NAME.fullmatch(base):
            named.tensors[f"{base}.bias"] = tensor
        else:
            raise unknown_name(PREFIX + name, folder)


def owners(name: str) -> list[str]:
    """All module names that a tensor name lies under, the outermost first.

    >>> owners("score.dense.weight")
    ['score', 'score.dense']
    """
    parts = name.split(".")[:-1]
    return [".".join(parts[: count + 1]) for count in range(len(parts))]
