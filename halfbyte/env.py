"""The only reader of os.environ, one function per variable.

| variable            | meaning                                                        | default             |
|---------------------|----------------------------------------------------------------|---------------------|
| HALFBYTE_CACHE      | folder for the starter model and converted files               | ~/.cache/halfbyte   |
| HALFBYTE_KERNELS    | kernels to take where an op has them: reference, cpu, triton   | auto                |
| HALFBYTE_FAULTS     | fault points for crash tests, e.g. checkpoint.write:kill:3     | none                |
| NUMBA_CPU_NAME      | make CPU kernels for this processor (with NUMBA_CPU_FEATURES)  | this machine's      |
| CUDA_VISIBLE_DEVICES | which accelerators CUDA shows to a program, by number or UUID | all of them         |
| RANK                | set by a launcher of several processes; only number 0 speaks   | 0                   |
| OMP_NUM_THREADS     | CPU threads of a run whose train.threads is auto               | one for each core   |
| NO_COLOR            | any value switches colours off                                 | unset               |
"""

import os
from pathlib import Path

KERNEL_CHOICES = ("auto", "reference", "cpu", "triton")


def cache_dir() -> Path:
    """Folder for files that can be made again."""
    named = os.environ.get("HALFBYTE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "halfbyte"


def kernels() -> str:
    """The forced kind of kernel, or "auto"; an unknown word is returned as it is, for the kernel listing to refuse."""
    return os.environ.get("HALFBYTE_KERNELS", "auto")


def numba_processor() -> tuple[str, str]:
    """(name, features) of the processor to compile for, as numba's own variables say; empty: this machine's."""
    return os.environ.get("NUMBA_CPU_NAME", ""), os.environ.get("NUMBA_CPU_FEATURES", "")


def faults() -> str:
    """Fault points switched on by a crash test; empty in every normal run."""
    return os.environ.get("HALFBYTE_FAULTS", "")


def rank() -> int:
    """This process's number among all processes of the run."""
    return int(os.environ.get("RANK", "0"))


def visible_gpus() -> str | None:
    """The accelerators that CUDA shows, as CUDA's own variable lists them; None where it is not set, which means all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def omp_threads() -> int | None:
    """The threads that OpenMP's variable asks for, of a list the outermost; None where it is not set or no number from 1 on."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and len(first) < 9 and int(first) > 0 else None


def no_color() -> bool:
    """True when the user asked for plain text."""
    return bool(os.environ.get("NO_COLOR"))


def at_home(name: str | Path) -> Path:
    """A path with a leading ~ or ~user in full; one of a user that is not there stays as it is, as the shell leaves it."""
    return Path(os.path.expanduser(name))  # Path.expanduser raises for a user that is not there
