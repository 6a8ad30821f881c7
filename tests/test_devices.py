"""What the machine has: figures that must agree with a second way of asking."""

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from halfbyte import devices, env, host
from halfbyte.errors import EnvironmentFault


def test_describe_names_this_machine() -> None:
    machine = devices.describe()
    assert machine.cores == os.cpu_count()
    assert 1 <= machine.usable_cores <= machine.cores
    assert 0 < machine.available_bytes <= machine.memory_bytes <= psutil.virtual_memory().total
    assert machine.torch_threads == torch.get_num_threads()
    assert (len(machine.gpus) > 0) == torch.cuda.is_available()
    assert set(machine.as_dict()) >= {"cpu", "isa", "gpus", "dtypes"}


def test_a_user_that_is_not_there_is_part_of_a_name() -> None:
    assert env.at_home("~") == Path.home() and env.at_home("~no-such-user-here/x") == Path("~no-such-user-here/x")


def test_memory_figures_follow_an_allocation() -> None:
    before_anon, before_rss = host.rss_anon_bytes(), host.rss_bytes()
    block = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # fresh pages, whatever the allocator has kept
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    assert host.rss_anon_bytes() - before_anon > 60 * 2**20
    assert host.rss_bytes() - before_rss > 60 * 2**20
    assert host.peak_rss_bytes() >= before_rss + 60 * 2**20
    block.close()


def test_threads_are_set_and_never_zero() -> None:
    before = torch.get_num_threads()
    devices.set_threads(0)
    assert torch.get_num_threads() == 1
    devices.set_threads(before)


def test_versions_are_those_installed() -> None:
    found = devices.versions()
    assert found["torch"] == torch.__version__
    assert found["python"] == sys.version.split()[0]
    assert "a-package-that-is-not-there" not in found


def test_memory_figures_need_no_torch() -> None:
    code = "import sys; from halfbyte import host; host.rss_anon_bytes(); host.peak_rss_bytes(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def freed_memory(program: str) -> list[float]:
    """What a program printed that counts page faults, in a process of its own, for the setting stays."""
    begin = (
        "import resource, torch; from halfbyte import devices, host\n"
        "def faults(sizes):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; blocks = [torch.empty(int(n * 2**18)).fill_(1) for n in sizes]\n"
        "    del blocks; return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
    )
    ran = subprocess.run([sys.executable, "-c", begin + program], capture_output=True, text=True, check=True)
    return [float(word) for word in ran.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other allocators")
def test_freed_memory_is_kept() -> None:
    """A loop that frees all it took faults on few pages when it takes the same again."""
    loop = "sizes = range(1, 41); first = faults(sizes); print(min(faults(sizes) for _ in range(3)) / first)"
    assert freed_memory("devices.FreedMemory()\n" + loop)[0] < 0.1 < freed_memory(loop)[0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other allocators")
def test_kept_memory_is_bounded() -> None:
    """Blocks of ever other sizes leave holes; the process does not grow with them."""
    loop = (
        "import random; random.seed(0); freed = devices.FreedMemory(); seen = []; held = []\n"
        "for step in range(40):\n"
        "    faults([random.uniform(8, 24) for _ in range(8)]); held.append(torch.empty(3000).fill_(1)); freed.bound()\n"
        "    seen.append(host.rss_anon_bytes())\n"
        "print(max(seen) / seen[0])"
    )
    assert freed_memory(loop)[0] < 1.6


def test_a_gpu_that_is_not_there_is_refused() -> None:
    """Asked for, not guessed: no silent step down to the CPU."""
    assert devices.compute_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentFault, match="a GPU must be there"):
            devices.compute_device("cuda")


def test_a_control_groups_limit_counts_and_its_file_pages_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that has read a large model file is not out of memory: the pages of the file go when others are asked for."""
    monkeypatch.setattr(host, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(host, "OWN_GROUPS", tmp_path / "none")
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 << 30, available=60 << 30))
    assert host.memory_bytes() == (64 << 30, 60 << 30)
    (tmp_path / "memory.max").write_text(f"{8 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{7 << 30}\n")
    assert host.memory_bytes() == (8 << 30, 1 << 30)
    (tmp_path / "memory.stat").write_text(f"anon {1 << 30}\nfile {6 << 30}\ninactive_file {4 << 30}\nactive_file {1 << 30}\n")
    assert host.memory_bytes() == (8 << 30, 6 << 30)
    (tmp_path / "memory.max").write_text("max\n")
    assert host.memory_bytes() == (64 << 30, 60 << 30)


def _group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, str(used), stat)):
        (folder / name).write_text(text + "\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("path", ["/job/step", "/../job/step"])
def test_the_tightest_of_nested_control_groups_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, path: str) -> None:
    """A job's limit binds all its steps, and a step's own limit may be wider."""
    root = tmp_path / "memory" if version == 1 else tmp_path
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    prefix, none = ("total_", "9223372036854771712") if version == 1 else ("", "max")
    (tmp_path / "cgroup").write_text("9:name=systemd:/\n4:memory,pids:" + path + "\n0::/\n" if version == 1 else f"0::{path}\n")
    monkeypatch.setattr(host, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(host, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 << 30, available=60 << 30))
    assert host.memory_bytes() == (64 << 30, 60 << 30)
    _group(root, names, none, 50 << 30)
    _group(root / "job" / "step", names, str(16 << 30), 1 << 30)
    assert host.memory_bytes() == (16 << 30, 15 << 30)
    _group(root / "job", names, str(8 << 30), 7 << 30, f"{prefix}inactive_file {4 << 30}\n{prefix}active_file {1 << 30}")
    assert host.memory_bytes() == (8 << 30, 6 << 30)
    (tmp_path / "cgroup").write_text("4:memory:/elsewhere\n" if version == 1 else "0::/elsewhere\n")  # a path that a container does not see
    _group(root, names, str(32 << 30), 2 << 30)
    assert host.memory_bytes() == (32 << 30, 30 << 30)


def test_a_limit_of_the_shell_counts_less_what_is_mapped() -> None:
    code = (
        "import resource\n"
        "from halfbyte import host\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))\n"
        "total, available = host.memory_bytes()\n"
        "assert total == 2 << 30 and 1 << 30 < available < 2 << 30, (total, available)\n"
        "block = bytearray(512 << 20)\n"
        "assert available - host.memory_bytes()[1] >= 512 << 20\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [
    MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ImportError("libtorch.so: failed to map segment: Cannot allocate memory"), torch.OutOfMemoryError("CUDA"),
])  # fmt: skip
def test_every_kind_of_no_memory_is_known(error: Exception) -> None:
    assert host.is_out_of_memory(error)
    assert not host.is_out_of_memory(type(error)("other")) or isinstance(error, MemoryError | torch.OutOfMemoryError)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not hold a program to a core")
def test_the_share_of_the_processor_is_what_is_given_now() -> None:
    """One core, another program computing on it: about half.  The load average of the last minute would not know it yet."""
    program = (
        "import os, subprocess, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from halfbyte import host\n"
        "other = subprocess.Popen([sys.executable, '-c', 'print(flush=True)\\nwhile True: pass'], stdout=subprocess.PIPE)\n"
        "other.stdout.readline(); print(host.processor_share(0.5)); other.kill()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert 0.0 < float(done.stdout) < 0.75


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="this system does not tell what is mapped")
def test_mapped_pages_are_given_back_and_read_again_but_not_those_written_to(tmp_path: Path) -> None:
    size, held = 8 << 20, []
    for name in ("read", "written"):
        (tmp_path / name).write_bytes(bytes(range(256)) * (size // 256))
        with (tmp_path / name).open("rb") as file:
            held.append(mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE))
        assert sum(held[-1][::4096]) == 0
    held[1][5] = 77
    before = _file_bytes()
    host.drop_mapped_pages([tmp_path / "read", tmp_path / "written", tmp_path / "not-there"])
    assert size // 2 < before - _file_bytes() < 1.5 * size
    assert held[0][300] == 300 % 256 and held[1][5] == 77


def _file_bytes() -> int:
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))


@pytest.mark.parametrize(("anonymous", "swap", "unwritten"), [(0, 0, True), (4, 0, False), (0, 4, False)])
def test_a_mapping_is_unwritten_in_memory_and_in_swap(anonymous: int, swap: int, unwritten: bool) -> None:
    assert host.is_unwritten(f"Rss:  96 kB\nAnonymous:      {anonymous} kB\nSwap:      {swap} kB\nSwapPss: 0 kB\n") is unwritten
