"""A PEFT adapter folder, written exactly and read strictly.

    adapter_config.json         41 keys (peft_config.py)
    adapter_model.safetensors   tensors under PEFT's names (peft_keys.py), metadata {"format": "pt"}
    README.md                   model card
    halfbyte.json               scaling per module, the digest of the base and, after init loftq, how the base was quantized: what PEFT's
                                config cannot say; other readers skip it

`save` writes beside the target, reads that back, compares every bit, and only then moves it into place, the config last: a folder without a
config is refused, so a crash leaves the old adapter or one that says it is incomplete, never half of each.
`read` refuses what PEFT lets through in silence: pickles, unknown keys, dead or empty adapters, NaN, ranks that disagree.

Does not know models: whether the names fit one is decided in lora/tensors.py.
Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.config.lora import LoraConfig
from halfbyte.config.quant import LoftqBase
from halfbyte.errors import AdapterError, HalfbyteError, StorageError
from halfbyte.formats.peft_config import CONFIG_NAME, TASKS, config_text, pattern_value, read_config, refused
from halfbyte.formats.peft_keys import Named, from_peft, to_peft
from halfbyte.formats.safetensors_io import load_tensors, sync
from halfbyte.formats.safetensors_io import save as save_tensors

WEIGHTS_NAME, CARD_NAME, OWN_NAME = "adapter_model.safetensors", "README.md", "halfbyte.json"
CLASSIFIER_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class PeftAdapter:
    """A checked adapter apart from any model.

    config       names of modules, their ranks and alphas are exact, whatever patterns the file had
    tensors      in this program's names (see lora/tensors.py)
    kinds        module -> linear, embedding, experts
    base_copies  whole base tables that PEFT stores beside an adapted embedding or head; must equal the base's own
    loftq        how init loftq quantized the base that this belongs to; None where it began otherwise
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    kinds: dict[str, str]
    base_copies: dict[str, Tensor]
    base_name: str | None
    base_digest: str | None
    task: str | None
    raw: dict[str, Any]
    loftq: LoftqBase | None = None


def save(
    folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig, *, kinds: Mapping[str, str], targets: tuple[str, ...],
    parameters: tuple[str, ...] = (), task: str | None = "causal-lm", base_name: str | None = None, revision: str | None = None,
    base_digest: str | None = None, notes: tuple[str, ...] = (), loftq: LoftqBase | None = None, allow_untrained: bool = False,
) -> Path:  # fmt: skip
    """Write an adapter (fields of lora.tensors.Collected) as a PEFT folder; returns the folder.

    Raises AdapterError when what was written does not read back as what was given (T65), StorageError when the disk refuses.
    `allow_untrained` permits an adapter that changes nothing, as it is before the first step.
    """
    foreign = to_peft(tensors, kinds)
    settings = config_text(
        config, kinds=kinds, targets=targets, parameters=parameters, task=task, base_name=base_name, revision=revision
    )  # fmt: skip
    own: dict[str, Any] = {"base_digest": base_digest, "format_version": 1, "scaling": {name: scale_in(config, name) for name in kinds}}
    if loftq is not None:
        own["loftq"] = loftq.model_dump(mode="json")
    with _staged(folder) as staging:
        save_tensors(staging / WEIGHTS_NAME, foreign, {"format": "pt"})
        for name, text in (
            (CARD_NAME, model_card(config, base_name, task, notes)), (OWN_NAME, json.dumps(own, indent=1, sort_keys=True) + "\n"),
                (CONFIG_NAME, settings),
        ):  # fmt: skip
            _write(staging / name, text)
        try:
            _verify(staging, tensors, allow_untrained)
        except HalfbyteError as fault:  # of the files beside the folder, which are gone by the time somebody reads this
            raise _not_saved(fault, staging, folder) from None
    return folder


def scale_in(config: LoraConfig, name: str) -> float:
    """The factor before B A of this module by config alone."""
    rank, alpha = config.ranks.get(name, config.rank), config.alphas.get(name, config.alpha)
    return alpha / (rank**0.5 if config.rslora else rank)


def _not_saved(fault: HalfbyteError, staging: Path, folder: Path) -> HalfbyteError:
    """The same fault, told of the folder that was asked for."""
    return type(fault)(
        fault.rule, code=fault.code, place=fault.place.replace(str(staging), str(folder)), found=fault.found, expected=fault.expected,
        remedy=fault.remedy, nothing_done="Nothing was saved.",
    )  # fmt: skip


def _verify(staging: Path, tensors: Mapping[str, Tensor], allow_untrained: bool) -> None:
    """Read what was just written and compare to the bit."""
    again = read(staging, allow_untrained=allow_untrained)
    wrong = [name for name in tensors if name not in again.tensors or not torch.equal(again.tensors[name], tensors[name])]
    wrong += [name for name in again.tensors if name not in tensors]
    if wrong:
        raise AdapterError(
            "what was written must read back as what was given", code="E-ADAPT-030", place=str(staging),
            found=f"{len(wrong)} of {len(tensors)} tensors differ: {', '.join(wrong[:3])}",
        )  # fmt: skip


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder to fill; its files move into `folder` when the block ends well, the config last, and vanish when it does not."""
    fresh = not folder.exists()
    own = f"{os.getpid()}.{secrets.token_hex(4)}.part"  # a killed process leaves its staging, and process numbers come again
    staging = folder.with_name(f".{folder.name}.{own}") if fresh else folder / f".adapter.{own}"
    try:
        staging.mkdir(parents=True)
        yield staging
        sync(staging)
        if fresh:
            os.rename(staging, folder)
            sync(folder.parent)
            return
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        sync(folder)
        for name in (WEIGHTS_NAME, CARD_NAME, OWN_NAME, CONFIG_NAME):
            os.replace(staging / name, folder / name)
        (folder / "adapter_model.bin").unlink(missing_ok=True)
        sync(folder)
    except OSError as failure:
        raise StorageError(
            "an adapter can be written", code="E-STORE-060", place=str(folder), found=str(failure),
            remedy="free space, or name another folder", nothing_done="Nothing was saved.",
        ) from failure  # fmt: skip
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def model_card(config: LoraConfig, base_name: str | None, task: str | None, notes: tuple[str, ...]) -> str:
    """README.md with the front matter that model hubs read."""
    lines = ["---"]
    if base_name:
        lines.append(f"base_model: {json.dumps(base_name)}")
    lines += [
        "library_name: peft",
        f"pipeline_tag: {'text-classification' if task == 'sequence-classification' else 'text-generation'}",
        "tags:",
    ]
    lines += [f"- {json.dumps(f'base_model:adapter:{base_name}')}"] if base_name else []
    lines += ["- lora", "- transformers", "---", "", "# Adapter", ""]
    kind = ("DoRA" if config.dora else "LoRA") + (" with rsLoRA scaling" if config.rslora else "")
    lines.append(f"A {kind} adapter of rank {config.rank}, alpha {config.alpha:g}.")
    return "\n".join([*lines, *notes]) + "\n"


def read(folder: Path, *, allow_untrained: bool = False) -> PeftAdapter:
    """The adapter of a folder.  AdapterError or WeightError says which file, key or tensor is not as it must be."""
    _require_files(folder)
    raw = read_config(folder)
    if raw["use_dora"] and raw["lora_bias"]:
        raise refused("E-ADAPT-047", "a DoRA update has no bias of its own", f"{folder}, key lora_bias", "true", "false")
    named = from_peft(load_tensors(folder / WEIGHTS_NAME), raw, folder)
    ranks = {name: pattern_value(raw["rank_pattern"], name, raw["r"]) for name in named.kinds}
    alphas = {name: float(pattern_value(raw["alpha_pattern"], name, raw["lora_alpha"])) for name in named.kinds}
    _require_ranks(named, ranks, folder)
    _require_finite(named, folder)
    if not allow_untrained:
        _require_alive(named, folder)
    digest, loftq = _own_facts(folder, ranks, alphas, raw["use_rslora"])
    config = LoraConfig(
        rank=raw["r"], alpha=raw["lora_alpha"], dropout=raw["lora_dropout"], targets=tuple(named.kinds), rslora=raw["use_rslora"],
        dora=raw["use_dora"], lora_bias=raw["lora_bias"],
        ranks={name: rank for name, rank in ranks.items() if rank != raw["r"]},
        alphas={name: alpha for name, alpha in alphas.items() if alpha != raw["lora_alpha"]},
        train_bias=raw["bias"], fully_trained=_whole_modules(named, raw, folder),
        dtype="bfloat16" if named.dtype == torch.bfloat16 else "float32",
    )  # fmt: skip
    if loftq is not None:
        config = config.model_copy(update={"init": "loftq", "loftq_iterations": loftq.iterations})
    task = next((ours for ours, theirs in TASKS.items() if theirs == raw["task_type"]), None)
    return PeftAdapter(config, named.tensors, named.kinds, named.base_copies, raw["base_model_name_or_path"], digest, task, raw, loftq)


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise refused("E-ADAPT-031", "an adapter is a folder", str(folder), "no such folder", f"{CONFIG_NAME} and {WEIGHTS_NAME} in it")
    names = sorted(entry.name for entry in folder.iterdir())
    if WEIGHTS_NAME not in names and any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names):
        pickled = next(name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl")))
        raise refused(
            "E-ADAPT-039", "pickled weights are never read, because reading them can run code", str(folder / pickled), pickled,
            WEIGHTS_NAME,
            "on a machine that trusts the file, load it with PEFT and save it again",
        )  # fmt: skip
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise refused(
                "E-ADAPT-040", "an adapter folder must be complete", str(folder), f"no {name}", f"{CONFIG_NAME} and {WEIGHTS_NAME}",
                "an interrupted save leaves such a folder: save again" if {CONFIG_NAME, WEIGHTS_NAME} & set(names)
                else "it holds no adapter, like the folder of a run of method full; name the folder of an adapter",
            )  # fmt: skip


def _require_ranks(named: Named, ranks: Mapping[str, int], folder: Path) -> None:
    """The ranks of the config are those of the tensors: (R, I) and (O, R); a multiple of R for fused experts."""
    for name, rank in ranks.items():
        found_a, found_b = named.tensors[f"{name}.lora_a"].shape[0], named.tensors[f"{name}.lora_b"].shape[1]
        fits = found_a % rank == 0 if named.kinds[name] == "experts" else found_a == rank
        if not fits or found_a != found_b:
            raise refused(
                "E-ADAPT-041", "the rank of the config must be the rank of the tensors", f"{folder}, module {name}",
                f"config says {rank}, lora_A has {found_a} rows, lora_B {found_b} columns", "one rank",
            )  # fmt: skip


def _require_finite(named: Named, folder: Path) -> None:
    for name, tensor in named.tensors.items():
        bad = int(tensor.numel() - torch.isfinite(tensor).sum())
        if bad:
            raise refused(
                "E-ADAPT-042", "an adapter file holds finite numbers only", f"{folder}, tensor {name}",
                f"{bad} of {tensor.numel()} values are NaN or infinite",
                "finite numbers", "use an earlier checkpoint",
            )  # fmt: skip


def _require_alive(named: Named, folder: Path) -> None:
    """At least one factor pair has a product, or something of the base was trained."""
    pairs = {name.rpartition(".")[0] for name in named.tensors if name.endswith((".lora_a", ".lora_b"))}
    others = [name for name in named.tensors if not name.endswith((".lora_a", ".lora_b"))]
    biases = [name for name in others if name.endswith(".lora_bias")]
    dead = [pair for pair in pairs if not (bool(named.tensors[f"{pair}.lora_a"].any()) and bool(named.tensors[f"{pair}.lora_b"].any()))]
    if len(dead) == len(pairs) and len(others) == len(biases) and not any(bool(named.tensors[name].any()) for name in biases):
        raise refused(
            "E-ADAPT-043", "an adapter must change something", str(folder),
            f"one factor is all zero in {len(dead)} of {len(pairs)} modules",
            "a trained adapter", "train before saving; where it is meant, hb.save_adapter and hb.load_adapter take allow_untrained=True",
        )  # fmt: skip


def _own_facts(folder: Path, ranks: Mapping[str, int], alphas: Mapping[str, float], rslora: bool) -> tuple[str | None, LoftqBase | None]:
    """Digest and LoftQ quantization of the base from halfbyte.json, after checking that the scaling noted there is the config's (T28)."""
    path = folder / OWN_NAME
    if not path.is_file():
        return None, None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        digest, scaling = facts["base_digest"], dict(facts["scaling"])
        loftq = LoftqBase.model_validate(facts["loftq"]) if "loftq" in facts else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise refused(
            "E-ADAPT-044", "halfbyte.json must be as it was written", str(path), f"{type(error).__name__}: {error}", "JSON"
        ) from None
    for name, rank in ranks.items():
        expected = alphas[name] / (rank**0.5 if rslora else rank)
        noted = scaling.get(name)
        if not isinstance(noted, (int, float)) or abs(noted - expected) > 1e-9 * abs(expected):
            raise refused(
                "E-ADAPT-045", "the scale of the config must be the scale the adapter was trained with", f"{folder}, module {name}",
                f"{expected:g} by r, lora_alpha and use_rslora", f"{noted} by {OWN_NAME}", "undo the edit of one of the two files",
            )  # fmt: skip
    return (digest if isinstance(digest, str) else None), loftq


def _whole_modules(named: Named, raw: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Modules trained whole.  Every name of modules_to_save has tensors, but for the heads PEFT lists for every classifier."""
    for entry in raw["modules_to_save"] or ():
        there = any(name.endswith(entry) for name in named.whole)
        if not there and not (raw["task_type"] == TASKS["sequence-classification"] and entry in CLASSIFIER_HEADS):
            raise refused(
                "E-ADAPT-046",
                "a module of modules_to_save must have tensors",
                f"{folder}, module {entry}",
                f"{len(named.whole)} others",
                entry,
            )
    return tuple(named.whole)
