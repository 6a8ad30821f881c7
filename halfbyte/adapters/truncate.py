"""An adapter folder in, an adapter folder of smaller rank out; the mathematics is in lora/truncate.py.

    halfbyte.adapters.truncate.open_folder(folder) -> Whole: what the folder holds, with its spectra
    Whole.cut(rank)          every module to at most `rank`
    Whole.cut(rank, joint=True)  the parameters of `rank` everywhere, given to the modules that lose most without them

The new folder is a PEFT adapter; ranks that differ stand in its rank_pattern and alpha_pattern.  Where no rank is reduced its tensors are
those of the old folder to the bit.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from halfbyte import env
from halfbyte.config.lora import LoraConfig
from halfbyte.errors import AdapterError, StorageError
from halfbyte.formats import peft
from halfbyte.lora import truncate
from halfbyte.lora.truncate import Spectrum


@dataclass(frozen=True)
class Cut:
    """An adapter of smaller rank, in memory: tensors and config as formats.peft reads them, ranks of all modules, share of squared norm
    left out over all modules together (0 to 1)."""

    tensors: dict[str, Tensor]
    config: LoraConfig
    ranks: dict[str, int]
    left_out: float

    @property
    def parameters(self) -> int:
        """Numbers in the factors of all modules."""
        return sum(tensor.numel() for name, tensor in self.tensors.items() if name.endswith((".lora_a", ".lora_b")))


@dataclass(frozen=True)
class Whole:
    """A checked adapter folder."""

    folder: Path
    adapter: peft.PeftAdapter

    @cached_property
    def spectra(self) -> dict[str, Spectrum]:
        """module -> Spectrum, in the order of the file."""
        return truncate.spectra(self.adapter.tensors, self.adapter.config, self.adapter.kinds)

    @property
    def ranks(self) -> dict[str, int]:
        """module -> rank as trained."""
        config = self.adapter.config
        return {name: config.ranks.get(name, config.rank) for name in self.adapter.kinds}

    def cut(self, rank: int, *, joint: bool = False) -> Cut:
        """The adapter with at most `rank` a module, or with the parameters of that rank over all modules.  Raises AdapterError."""
        if rank < 1:
            raise AdapterError("an adapter is truncated to a rank of at least 1", code="E-ADAPT-093", place=str(self.folder),
                               found=str(rank), expected="1 or more", nothing_done="Nothing was truncated.")  # fmt: skip
        own = self.ranks
        wanted = truncate.joint_ranks(self.spectra, rank) if joint and rank < max(own.values()) else dict.fromkeys(own, rank)
        reduces = any(wanted[name] < own[name] for name in own)
        tensors, config = truncate.truncated(
            self.adapter.tensors, self.adapter.config, self.adapter.kinds, wanted, self.spectra if reduces else None
        )  # fmt: skip
        ranks = {name: config.ranks.get(name, config.rank) for name in own}
        return Cut(tensors, config, ranks, self._left_out(ranks) if reduces else 0.0)

    def _left_out(self, ranks: dict[str, int]) -> float:
        total = sum(float(part.values.square().sum()) for part in self.spectra.values())
        lost = sum(float(part.values[ranks[name]:].square().sum()) for name, part in self.spectra.items())
        return lost / total if total else 0.0

    def require_new(self, out: Path) -> None:
        """Raise StorageError for a folder with something in it."""
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise StorageError("a truncated adapter needs a folder of its own", code="E-STORE-083", place=str(out),
                               found="something is there", expected="a new or an empty folder", remedy="name another folder",
                               nothing_done="Nothing was written.")  # fmt: skip

    def write(self, cut: Cut, out: Path) -> Path:
        """Write a cut as a PEFT folder; returns it.  Raises StorageError for a folder with something in it."""
        self.require_new(out)
        adapter, raw = self.adapter, self.adapter.raw
        kinds = {name: "conv1d" if kind == "linear" and raw["fan_in_fan_out"] else kind for name, kind in adapter.kinds.items()}
        targets = raw["target_modules"]
        named = tuple(targets) if isinstance(targets, list) else tuple(name for name, kind in kinds.items() if kind != "experts")
        return peft.save(
            out, cut.tensors, cut.config, kinds=kinds, targets=named, parameters=tuple(raw["target_parameters"] or ()),
            task=adapter.task, base_name=adapter.base_name, revision=raw["revision"], base_digest=adapter.base_digest, loftq=adapter.loftq,
            notes=(f"Truncated from an adapter of rank {adapter.config.rank}.",),
        )  # fmt: skip


def open_folder(folder: Path | str) -> Whole:
    """The adapter in a folder, or in a run's folder.  Raises AdapterError."""
    path = env.at_home(folder)
    inner = path / "adapter"
    path = inner if (inner / "adapter_config.json").is_file() else path
    return Whole(path, peft.read(path))
