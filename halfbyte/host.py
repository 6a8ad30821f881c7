"""The host without torch: its processor, cores and memory, and how much memory this process uses.

Resident memory (RSS) counts pages of memory-mapped files, which the system may drop at any time; anonymous memory (RssAnon) counts only
what the program itself allocated.  A model file that is mapped and read shows in the first and not in the second, so load peaks are
stated as RssAnon and whole runs as peak RSS.  Source of the fields: https://man7.org/linux/man-pages/man5/proc_pid_status.5.html
"""

import ctypes
import errno
import hashlib
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

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

CONTROL_GROUP, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
ALLOCATOR_TEXTS = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
MADV_DONTNEED = 4
NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Instruction sets that multiply bfloat16."""


def usable_cores() -> int:
    """Cores this process may run on, limits of containers and `taskset` included where the system tells."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(count, quota)) if quota else count


def processor_share(seconds: float = 0.2) -> float:
    """Share of the usable processor time that this program is given right now, 0 to 1: one thread a core computes for so long.

    Unlike the load average it is of the last moment, and in a container it is the container's own.
    """
    cores, block = usable_cores(), bytes(1 << 20)  # hashing a large block does not hold the interpreter's lock

    def compute(_: int) -> float:
        began, until = time.thread_time(), time.monotonic() + seconds
        while time.monotonic() < until:
            hashlib.sha256(block).digest()
        return time.thread_time() - began

    started = time.monotonic()
    with ThreadPoolExecutor(cores) as pool:
        used = sum(pool.map(compute, range(cores)))
    return min(1.0, used / (cores * (time.monotonic() - started)))


def _cgroup_quota() -> int | None:
    """Whole cores granted by a control group (v2), rounded up; None where there is no limit."""
    path = Path("/sys/fs/cgroup/cpu.max")
    if not path.is_file():
        return None
    quota, _, period = path.read_text().strip().partition(" ")
    return None if quota == "max" else -(-int(quota) // int(period or 100_000))


def memory_bytes() -> tuple[int, int]:
    """(total, available) bytes of main memory: the smallest of the machine's, of the control groups' and of `ulimit -v`.

    Pages of files that the system keeps for a group count as available: it drops them when memory is asked for.
    """
    seen = psutil.virtual_memory()
    limits = [(int(seen.total), int(seen.available)), *_group_limits()]
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        limits.append((soft, max(0, soft - int(psutil.Process().memory_info().vms))))
    return min(total for total, _ in limits), min(available for _, available in limits)


def _group_limits() -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) of this process's control group for memory and of each group around it."""
    for root, path, (limit, used, file_pages) in _memory_groups():
        for folder in (root / path, *(root / path).parents):
            if not folder.is_relative_to(root):
                break
            if (folder / limit).is_file() and (folder / used).is_file() and (text := (folder / limit).read_text().strip()) != "max":
                held = int((folder / used).read_text()) - _file_pages(folder / "memory.stat", file_pages)
                yield int(text), max(0, int(text) - held)


def _memory_groups() -> Iterator[tuple[Path, str, tuple[str, str, tuple[str, str]]]]:
    """(root, path below it, names of files) of each tree of control groups that may limit memory.

    A line of /proc/self/cgroup is `number:controllers:path`; in version 2 number is 0.  In a container the path may be one that it does
    not see, and then the root is its own group.  Source: https://man7.org/linux/man-pages/man7/cgroups.7.html
    """
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []
    for line in lines or ["0::/"]:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        inside = "/".join(part for part in path.split("/") if part not in ("", ".."))
        if number == "0":
            yield CONTROL_GROUP, inside, ("memory.max", "memory.current", ("inactive_file", "active_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
            yield CONTROL_GROUP / "memory", inside, names


def _file_pages(path: Path, names: tuple[str, str]) -> int:
    """Bytes of file pages in a control group's memory.stat; 0 where there is none."""
    if not path.is_file():
        return 0
    fields = dict(line.split() for line in path.read_text().splitlines() if len(line.split()) == 2)
    return sum(int(fields.get(name, 0)) for name in names)


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's, the system's, PyTorch's and an accelerator's out-of-memory errors, told apart without torch."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or (isinstance(error, RuntimeError | OSError | ImportError) and any(text in str(error) for text in ALLOCATOR_TEXTS))


def processor() -> tuple[str, tuple[str, ...]]:
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


def native_bf16() -> str:
    """The instruction set with which this processor multiplies bfloat16; empty where it has none."""
    return next((flag for flag in processor()[1] if flag in NATIVE_BF16), "")


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


def drop_mapped_pages(files: Iterable[Path]) -> None:
    """Give the pages of these mapped files back to the system; one that is used again comes from the system's file cache.

    A mapping with pages of its own (written to since, in memory or swapped out) is left alone, for they would be lost; nothing may write
    to one at the same moment.  Does nothing where the system has no /proc/self/smaps.  Source: MADV_DONTNEED, https://man7.org/linux/man-pages/man2/madvise.2.html
    """
    smaps, wanted = Path("/proc/self/smaps"), {str(file.resolve()) for file in files}
    if not wanted or not smaps.is_file():
        return
    advise = ctypes.CDLL(None).madvise
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps.read_text(errors="replace")):
        head, _, fields = mapping.partition("\n")
        if head.split(maxsplit=5)[-1] in wanted and is_unwritten(fields):
            start, end = (int(part, 16) for part in head.split()[0].split("-"))
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def is_unwritten(fields: str) -> bool:
    """Whether a mapping has no page of its own, by its block in smaps: `Anonymous` counts those in memory, `Swap` those that are not."""
    return all(re.search(rf"^{name}: +0 kB", fields, re.MULTILINE) for name in ("Anonymous", "Swap"))


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes; 0 where there is no such file or field."""
    path = Path("/proc/self/status")
    if not path.is_file():
        return 0
    for line in path.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0
