"""The calibrated base of a run, and the low-rank start that lies beside it, read for the adapter of the run.

A run with quant.calibrate=true makes its base in `<run>/base` and keeps it there; everything that opens the run uses that folder.
`<base>/start` is a PEFT adapter.  Its rank is a property of its numbers: another rank would be another start.  Its scaling is not: the
factors are stretched so that scaling * B A stays what it was, whatever lora.alpha and lora.rslora say.
"""

from pathlib import Path

from torch import Tensor, nn

from halfbyte.config.lora import LoraConfig
from halfbyte.errors import AdapterError, ModelError
from halfbyte.formats import peft
from halfbyte.lora.targets import alpha_of, completed, rank_of, resolve
from halfbyte.lora.variants import scaling_of

BASE, START = "base", "start"


def base_of_run(run: Path) -> Path:
    """The calibrated base of a run folder.  Raises ModelError when it is gone."""
    base = run / BASE
    if not (base / "config.json").is_file():
        raise ModelError(
            "a run with quant.calibrate=true needs the base that it made", code="E-MODEL-048", place=str(base), found="no model folder",
            expected="the folder base of the run, as it was when the run began",
            remedy="put it back; another calibration would be another base, so else begin a new run", nothing_done="Nothing was loaded.",
        )  # fmt: skip
    return base


def read_start(model: nn.Module, folder: Path, lora: LoraConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (A, B) for every layer that `lora` adapts.  Raises ModelError without a start, AdapterError where the two do not agree."""
    path = folder / START
    if not path.is_dir():
        raise ModelError(
            "init calibrated begins from the low-rank start beside a calibrated base", code="E-MODEL-047", place=str(folder),
            found=f"no folder {START} in it", expected=f"a folder that `halfbyte quantize --calibrate ROWS --start-rank {lora.rank}` wrote",
            remedy="set lora.init=default, or quant.calibrate=true to make such a base from the training rows",
            nothing_done="Nothing was trained.",
        )  # fmt: skip
    adapter = peft.read(path, allow_untrained=True)
    config = completed(model, lora)
    names = resolve(model, config)
    _require_same_layers(names, sorted(adapter.kinds), path)
    begun = {}
    for name in names:
        rank, had = rank_of(config, name), rank_of(adapter.config, name)
        if rank != had:
            raise AdapterError(
                "a start keeps its rank", code="E-ADAPT-006", place=f"{path}, module {name}", found=f"lora.rank {rank}",
                expected=f"rank {had}", remedy=f"set lora.rank={had}, or calibrate the base again with --start-rank {rank}",
                nothing_done="Nothing was trained.",
            )  # fmt: skip
        stretch = _scaling(adapter.config, name) / _scaling(config, name)
        begun[name] = (adapter.tensors[f"{name}.lora_a"] * stretch**0.5, adapter.tensors[f"{name}.lora_b"] * stretch**0.5)
    return begun


def _scaling(config: LoraConfig, name: str) -> float:
    return scaling_of(alpha_of(config, name), rank_of(config, name), config.rslora)


def _require_same_layers(names: list[str], begun: list[str], path: Path) -> None:
    """The layers that are adapted are those that the start was made for: without its part of the start a layer keeps its whole error."""
    lost, foreign = sorted(set(begun) - set(names)), sorted(set(names) - set(begun))
    if lost or foreign:
        parts = [f"{len(which)} {what}, e.g. {which[0]}" for which, what in
                 ((lost, "layers of the start that lora.targets leaves out"), (foreign, "targets without a start")) if which]  # fmt: skip
        raise AdapterError(
            "a start and lora.targets must name the same layers", code="E-ADAPT-007", place=str(path), found="; ".join(parts),
            remedy="leave lora.targets, lora.exclude and lora.layers as they were for the start, or set lora.init=default",
            nothing_done="Nothing was trained.",
        )  # fmt: skip
