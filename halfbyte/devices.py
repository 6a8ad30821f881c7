"""What this machine computes with: processor and accelerators as PyTorch sees them; process-wide torch switches.

torch is imported inside the functions that need it.  What needs no torch is in host.py.
"""

import ctypes
import os
import platform
import sys
from dataclasses import asdict, dataclass

from halfbyte.errors import EnvironmentFault
from halfbyte.host import memory_bytes, processor, rss_anon_bytes, usable_cores


@dataclass(frozen=True)
class Gpu:
    """One accelerator: its name, memory in bytes and compute capability as text ("9.0"; empty where there is none)."""

    name: str
    memory_bytes: int
    capability: str


@dataclass(frozen=True)
class Machine:
    """Everything `halfbyte doctor` and a run's environment.json say about the hardware; memory in bytes."""

    system: str
    cpu: str
    cores: int
    usable_cores: int
    isa: tuple[str, ...]
    memory_bytes: int
    available_bytes: int
    gpus: tuple[Gpu, ...]
    dtypes: tuple[str, ...]
    torch_threads: int

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def describe() -> Machine:
    """Look at this machine once; asks torch for accelerators without starting a device context where there is none."""
    import torch

    name, isa = processor()
    total, available = memory_bytes()
    gpus: list[Gpu] = []
    dtypes = ["float32", "bfloat16"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(seen.name, int(seen.total_memory), f"{seen.major}.{seen.minor}"))
        dtypes.append("float16")
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=name,
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        isa=isa,
        memory_bytes=total,
        available_bytes=available,
        gpus=tuple(gpus),
        dtypes=tuple(dtypes),
        torch_threads=torch.get_num_threads(),
    )


def compute_device(choice: str = "auto") -> str:
    """cuda or cpu: what was chosen, or for auto the GPU where PyTorch has one.  Raises EnvironmentFault for a GPU that is not there."""
    import torch

    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault(
            "a GPU must be there to compute on it", code="E-ENV-020", place="model.device", found="no GPU that PyTorch can use",
            expected="auto or cpu on this machine", remedy="set model.device: auto", nothing_done="Nothing was loaded.",
        )  # fmt: skip
    return choice


def set_threads(count: int) -> None:
    """Let torch's own loops use `count` threads; at least one."""
    import torch

    torch.set_num_threads(max(1, count))


class FreedMemory:
    """Let glibc keep what this process frees for the next use, within a bound; nothing happens where there is no glibc.

    By default large blocks go back to the system at once and come again page by page, each page cleared by the kernel, at every step of a
    training.  Kept without a bound they pile up instead, for an aligned block seldom fits where its like has been; so `bound`, called
    after each step, gives everything free back once the process is GROWTH times what it was after the first step since the last time.
    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """

    GROWTH = 1.25

    def __init__(self) -> None:
        self.usual = 0
        glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
        self.library = ctypes.CDLL(None) if glibc else None
        if self.library is not None:
            trim_threshold, top_pad, mmap_max = -1, -2, -4
            for setting in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 16 << 20)):
                self.library.mallopt(*setting)

    def bound(self) -> bool:
        """Give back what is free if there is too much of it; True when it was done."""
        if self.library is None:
            return False
        now = rss_anon_bytes()
        self.usual = self.usual or now
        if now <= self.GROWTH * self.usual:
            return False
        self.library.malloc_trim(0)
        self.usual = 0
        return True


def versions() -> dict[str, str]:
    """Version of Python and of each package a result depends on, without importing them; absent ones are left out."""
    from importlib import metadata

    names = (
        "halfbyte",
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "numpy",
        "numba",
        "pydantic",
        "triton",
        "peft",
        "bitsandbytes",
    )
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
