"""What this machine has: processor, memory, accelerators; how much memory this process uses; process-wide torch switches.

Resident memory (RSS) counts pages of memory-mapped files, which the system may drop at any time; anonymous memory (RssAnon) counts only
what the program itself allocated.  A model file that is mapped and read shows in the first and not in the second, so load peaks are
stated as RssAnon and whole runs as peak RSS.

torch is imported inside the functions that need it: asking for memory figures starts nothing.
Source of the fields: https://man7.org/linux/man-pages/man5/proc_pid_status.5.html
"""

import ctypes
import os
import platform
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from halfbyte.errors import EnvironmentFault

_WATCHED_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
    "i8mm",
)


CONTROL_GROUP = Path("/sys/fs/cgroup")
NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Instruction sets that multiply bfloat16."""


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


def usable_cores() -> int:
    """Cores this process may run on, limits of containers and `taskset` included where the system tells."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(count, quota)) if quota else count


def _cgroup_quota() -> int | None:
    """Whole cores granted by a control group (v2), rounded up; None where there is no limit."""
    path = Path("/sys/fs/cgroup/cpu.max")
    if not path.is_file():
        return None
    quota, _, period = path.read_text().strip().partition(" ")
    return None if quota == "max" else -(-int(quota) // int(period or 100_000))


def memory_bytes() -> tuple[int, int]:
    """(total, available) bytes of main memory, the smaller of the machine's and the control group's limit.

    Pages of files that the system keeps for the group count as available: it drops them when memory is asked for.
    """
    seen = psutil.virtual_memory()
    total, available = int(seen.total), int(seen.available)
    limit, used = CONTROL_GROUP / "memory.max", CONTROL_GROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
        held = int(used.read_text()) - _file_pages(CONTROL_GROUP / "memory.stat")
        available = min(available, max(0, int(text) - held))
    return total, available


def _file_pages(path: Path) -> int:
    """Bytes of file pages in a control group's memory.stat; 0 where there is none."""
    if not path.is_file():
        return 0
    fields = dict(line.split() for line in path.read_text().splitlines() if len(line.split()) == 2)
    return sum(int(fields.get(name, 0)) for name in ("inactive_file", "active_file"))


def _cpu() -> tuple[str, tuple[str, ...]]:
    """(model name, watched instruction sets) from /proc/cpuinfo; the platform's word for it elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine(), ()
    fields: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.machine(), tuple(flag for flag in _WATCHED_FLAGS if flag in flags)


def processor() -> tuple[str, tuple[str, ...]]:
    """(name of the processor, its instruction sets that matter here)."""
    return _cpu()


def native_bf16() -> str:
    """The instruction set with which this processor multiplies bfloat16; empty where it has none."""
    return next((flag for flag in _cpu()[1] if flag in NATIVE_BF16), "")


def describe() -> Machine:
    """Look at this machine once; asks torch for accelerators without starting a device context where there is none."""
    import torch

    name, isa = _cpu()
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


def rss_bytes() -> int:
    """Resident memory of this process now, mapped files included."""
    return int(psutil.Process().memory_info().rss)


def rss_anon_bytes() -> int:
    """Anonymous resident memory of this process now; all resident memory where the system does not tell them apart."""
    return _status_bytes("RssAnon") or rss_bytes()


def peak_rss_bytes() -> int:
    """The most resident memory this process has had since it began."""
    seen = _status_bytes("VmHWM")
    if seen:
        return seen
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes; 0 where there is no such file or field."""
    path = Path("/proc/self/status")
    if not path.is_file():
        return 0
    for line in path.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


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
