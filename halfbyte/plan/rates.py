"""Rates of this machine, measured once with the program's own ops and kept in the cache folder; reading them needs no torch.

    <cache>/rates/<machine>.json     one file for a machine (processor, cores, versions of what computes), one entry for a type and widths

A rate depends on the shapes: a narrow layer and few tokens reach less than a wide one and many.  So an entry
holds curves over the number of tokens (`Curve`), measured at one model's widths, and a plan of another model takes the entry whose
widths are nearest and says so.  Where nothing was measured there is no time; for a card of PEAKS a lower bound stands in its place.

Measuring is plan/calibration.py.  Source of PEAKS, operations per second in bfloat16 without sparsity: the makers' data sheets, as in
https://github.com/pytorch/torchtitan/blob/main/torchtitan/tools/utils.py and https://github.com/karpathy/nanochat/pull/147
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from halfbyte import env, host
from halfbyte.errors import EnvironmentFault, StorageError
from halfbyte.shape import ModelShape
from halfbyte.units import percent_text

VERSION = 2
MOST_THREADS = 1024  # what train.threads takes
LONGEST_SECONDS = 600.0
IDLE = 0.8  # share of the processor time that a program is given; less, and others compute here
MADE_BY = ("halfbyte", "torch", "numba")
LARGEST_LAYER = 64_000_000
"""Parameters of a layer from which on wider ones are measured at half their widths: the rate of products no longer grows."""
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100 40GB": 312e12, "A100 80GB": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12,
    "A40": 149.7e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12, "MI300X": 1307.4e12,
}  # fmt: skip


@dataclass(frozen=True)
class Widths:
    """The sizes of a layer that decide how fast it is: width, those of queries and keys, inner width, and of one head."""

    hidden: int
    queries: int
    keys: int
    inner: int
    head_dim: int

    @property
    def params(self) -> int:
        """Elements of the layer's matrices."""
        return self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.inner)

    def distance(self, other: "Widths") -> float:
        """How unlike two layers are: logarithms of the ratios of their widths."""
        return sum(abs(math.log(mine / theirs)) for mine, theirs in zip(asdict(self).values(), asdict(other).values()))


def widths_of(shape: ModelShape) -> Widths:
    """The widths to measure for a model: its own, halved until a layer has at most LARGEST_LAYER parameters."""
    sizes = shape.sizes
    used = sizes.get("experts_per_token", 0)
    hidden, queries, keys = sizes["hidden"], sizes["queries"], sizes["keys"]
    inner, head_dim = used * sizes["expert"] if used else sizes["inner"], sizes["head_dim"]
    heads, groups = queries // head_dim, keys // head_dim
    while Widths(hidden, heads * head_dim, groups * head_dim, inner, head_dim).params > LARGEST_LAYER and hidden > 2 * head_dim:
        hidden, inner, groups = -(-hidden // 128) * 64, -(-inner // 128) * 64, max(1, groups // 2)
        heads = max(groups, heads // 2 // groups * groups)
    return Widths(hidden, heads * head_dim, groups * head_dim, inner, head_dim)


@dataclass(frozen=True)
class Curve:
    """A rate at several sizes; between them it runs straight over the logarithm of the size, beyond them it stays."""

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """The rate at a size.

        >>> Curve(((100, 1.0), (10_000, 3.0))).at(1000), Curve(((100, 1.0), (10_000, 3.0))).at(1)
        (2.0, 1.0)
        """
        before = (self.points[0], *(point for point in self.points if point[0] <= size))[-1]
        after = (*(point for point in self.points if point[0] > size), self.points[-1])[0]
        if before[0] >= after[0] or size <= before[0]:
            return before[1]
        share = math.log(size / before[0]) / math.log(after[0] / before[0])
        return before[1] + share * (after[1] - before[1])


@dataclass(frozen=True)
class Rates:
    """What one type reaches on one machine at one model's widths; per second.

    layer       operations of matrices and adapters of rank RANK in a layer with frozen weights, over the tokens at once
    trained     the same where the weights are trained too
    adapter     operations of what adapters of a higher rank add
    attention   operations in attention, over the tokens of a sample
    head        operations of the output layer and the loss, over the labelled tokens
    unpack      elements of packed matrices read back
    update      parameters updated: float32, int8, and a bfloat16 parameter with its float32 master
    """

    device: str
    date: str
    dtype: str
    threads: int
    widths: Widths
    layer: Curve
    trained: Curve
    adapter: float
    attention: Curve
    head: Curve
    unpack: float
    update: Mapping[str, float]


UPDATES = ("float32", "int8", "master")


def machine() -> dict[str, Any]:
    """What the rates of this machine depend on."""
    name, instructions = host.processor()
    versions = {package: metadata.version(package) for package in MADE_BY}
    return {"processor": name, "instructions": list(instructions), "cores": host.usable_cores(), "versions": versions}


def rates_path() -> Path:
    """The file of this machine."""
    key = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return env.cache_dir() / "rates" / f"{key}.json"


def read_all(path: Path | None = None) -> list[Rates]:
    """All entries of this machine; none where it was not calibrated.  Raises EnvironmentFault for a file that cannot be used."""
    path = rates_path() if path is None else path
    if not path.is_file():
        return []
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as fault:
        raise _unusable(path, str(fault)[:120]) from None
    if not isinstance(values, dict) or values.get("version") != VERSION or not isinstance(values.get("entries"), list):
        raise _unusable(path, f"version {values.get('version') if isinstance(values, dict) else None}, this program reads {VERSION}")
    return [_entry(path, one) for one in values["entries"]]


def threads_of(asked: int | str = "auto") -> int:
    """Threads that train.threads stands for: auto is what OMP_NUM_THREADS asks for, as far as the setting goes, else one for each core."""
    return asked if isinstance(asked, int) else min(env.omp_threads() or host.usable_cores(), MOST_THREADS)


def nearest_rates(shape: ModelShape, dtype: str, found: list[Rates], threads: int) -> Rates | None:
    """The entry for this type and number of threads whose widths are nearest to the model's; None where none was measured."""
    wanted = widths_of(shape)
    serve = [one for one in found if (one.dtype, one.threads) == (dtype, threads)]
    return min(serve, key=lambda one: one.widths.distance(wanted), default=None)


def keep(rates: Rates, path: Path | None = None) -> Path:
    """Put an entry into this machine's file, in the place of one for the same type, threads and widths.  Raises StorageError."""
    path = rates_path() if path is None else path
    others = [one for one in read_all(path) if (one.dtype, one.threads, one.widths) != (rates.dtype, rates.threads, rates.widths)]
    body = {"version": VERSION, "machine": machine(), "entries": [_plain(one) for one in [*others, rates]]}
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as fault:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise StorageError(
            "the cache folder must be writable to keep the rates of this machine", code="E-STORE-401", place=str(path),
            found=fault.strerror or str(fault),
            remedy="free some space, or name another folder with HALFBYTE_CACHE", nothing_done="Nothing was kept.",
        ) from fault  # fmt: skip
    return path


def is_busy() -> bool:
    """Whether others compute here now, so that what is measured would not be what this machine can."""
    return host.processor_share() < IDLE


def require_idle() -> None:
    """Raise EnvironmentFault on a busy machine: its rates would be kept, and later plans would quote them."""
    share = host.processor_share()
    if share < IDLE:
        raise EnvironmentFault(
            "a machine is measured while it is idle", code="E-ENV-403", place="--calibrate",
            found=f"{percent_text(share)} of the time of {host.usable_cores()} cores, others take the rest",
            expected=f"at least {percent_text(IDLE)}",
            remedy="repeat it once the machine is idle, or leave --calibrate out; a later measurement takes the place of an earlier one",
            nothing_done="Nothing was measured.",
        )  # fmt: skip


def measure(shape: ModelShape, dtype: str, threads: int) -> float:
    """Measure this machine with so many threads at a model's widths, in a process of its own and keep the rates; the seconds it took.

    Raises EnvironmentFault where the process fails.
    """
    asked = {"widths": asdict(widths_of(shape)), "vocab": shape.vocab, "hidden": shape.hidden, "dtype": dtype, "threads": threads}
    command = [sys.executable, "-m", "halfbyte.plan.calibration", json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(
            "measuring this machine must end", code="E-ENV-402", place="python -m halfbyte.plan.calibration",
            found=f"still at work after {LONGEST_SECONDS:.0f} s", remedy="repeat it while the machine is idle",
            nothing_done="Nothing was kept.",
        ) from None  # fmt: skip
    if done.returncode != 0:
        raise EnvironmentFault(
            "measuring this machine must end", code="E-ENV-402", place="python -m halfbyte.plan.calibration",
            found=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200],
            remedy="run `halfbyte doctor`, which tells what serves here", nothing_done="Nothing was kept.",
        )  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def _plain(rates: Rates) -> dict[str, Any]:
    return {
        name: [list(point) for point in value["points"]] if isinstance(value, dict) and "points" in value else value
        for name, value in asdict(rates).items()
    }


def _entry(path: Path, values: Any) -> Rates:
    """One entry, every number looked at: rates are positive and finite."""
    if not isinstance(values, dict):
        raise _unusable(path, "an entry that is not an object")
    read: dict[str, Any] = {}
    for field in fields(Rates):
        value = values.get(field.name)
        made = _READERS[field.name](value)
        if made is None:
            raise _unusable(path, f"{field.name}: {str(value)[:40]}")
        read[field.name] = made
    return Rates(**read)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) < 200 else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else None


def _rate(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 1.0 <= value < 1e18
    return float(value) if good else None


def _curve(value: Any) -> Curve | None:
    if not isinstance(value, list) or not 0 < len(value) < 50:
        return None
    points = [point if isinstance(point, list) and len(point) == 2 else [None, None] for point in value]
    read = [(_rate(size), _rate(rate)) for size, rate in points]
    sizes = [size for size, rate in read if size is not None and rate is not None]
    return Curve(tuple(read)) if len(sizes) == len(read) and sizes == sorted(set(sizes)) else None  # type: ignore[arg-type]


def _widths(value: Any) -> Widths | None:
    names = [field.name for field in fields(Widths)]
    good = isinstance(value, dict) and set(value) == set(names) and all(_count(value[name]) for name in names)
    return Widths(**value) if good else None


def _updates(value: Any) -> dict[str, float] | None:
    good = isinstance(value, dict) and set(value) == set(UPDATES) and all(_rate(value[name]) for name in UPDATES)
    return {name: float(value[name]) for name in UPDATES} if good else None


_READERS = {
    "device": _text, "date": _text, "dtype": _text, "threads": _count, "widths": _widths, "layer": _curve, "trained": _curve,
    "adapter": _rate, "attention": _curve, "head": _curve, "unpack": _rate, "update": _updates,
}  # fmt: skip


def _unusable(path: Path, found: str) -> EnvironmentFault:
    return EnvironmentFault(
        "the measured rates of this machine must be readable", code="E-ENV-401", place=str(path), found=found,
        remedy="remove the file; the next measurement writes a new one", nothing_done="Nothing was planned.",
    )  # fmt: skip
