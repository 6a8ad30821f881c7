"""What a plan is made for: this machine, a card by its name, or a size.

A card sold as 24 GB shows up to 24 * 2^30 bytes to a program.  Most show more than 24 * 10^9, which is what the table and `--gpu-memory 24`
mean; cards whose GDDR memory can keep error correction codes in itself (a sixteenth of it) show less, so the table has what a program
is shown with them on.  So "fits" is not said wrongly.  A size with its unit (`22.5GiB`) is taken as it stands.

The program itself takes memory before a model is loaded.  These are the only measured numbers of a memory plan: on the CPU the resident
memory of `halfbyte train`, from its start to its report, on a model of next to no size, less that model (torch 2.13, transformers 5.23,
Linux: 580 MiB, which benchmarks/bench_memory.py measures); on a GPU the device context with its libraries, for which 0.6 GiB is an
estimate, and 2 GiB of host memory, an estimate too.
Sources of the sizes as sold and of bfloat16 (NVIDIA's from compute capability 8.0 on): the makers' data sheets; an MI250X is two devices of
64 GB.  Of what programs are shown, messages of PyTorch: T4 14.56 GiB (https://github.com/Zheng-Chong/CatVTON/issues/133), A10 21.99
(https://github.com/zai-org/CogVLM/issues/236), L40 44.40 (https://github.com/NVlabs/Eagle/issues/68), RTX 6000 Ada 44.43
(https://github.com/DINGYANB/MTVCrafter/issues/21), L40S 44.53 (https://github.com/Wan-Video/Wan2.1/issues/205); other cards of such memory
are taken alike.
"""

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from halfbyte import env, host
from halfbyte.errors import ConfigError, nearest

PROCESSOR = "this machine's processor"
PROGRAM_BYTES = {"cpu": 580 << 20, "gpu": round(0.6 * 2**30)}
PROGRAM_ON_HOST = 2 << 30
MARGIN = {"cpu": 0.12, "gpu": 0.05}
"""A setting is said to fit only with this share to spare: on the CPU more than the largest shortfall measured (results/memory.json)."""


class Card(NamedTuple):
    """A card: gigabytes as sold, GiB that a program is shown where that is less than 10^9 times them, whether it multiplies bfloat16."""

    gb: int
    usable_gib: float = 0.0
    bf16: bool = True

    @property
    def memory_bytes(self) -> int:
        """What a program can have."""
        return int(self.usable_gib * 2**30) or self.gb * 10**9


CARDS = {
    "RTX 2080 Ti": Card(11, bf16=False), "RTX 3060": Card(12), "RTX 3070": Card(8), "RTX 3080": Card(10), "RTX 3090": Card(24),
    "RTX 4060": Card(8), "RTX 4060 Ti 16GB": Card(16), "RTX 4070": Card(12), "RTX 4080": Card(16), "RTX 4090": Card(24),
    "RTX 5060 Ti 16GB": Card(16), "RTX 5070": Card(12), "RTX 5070 Ti": Card(16), "RTX 5080": Card(16), "RTX 5090": Card(32),
    "RTX A4000": Card(16, 14.56), "RTX A5000": Card(24, 21.99), "RTX A6000": Card(48, 44.40), "RTX 6000 Ada": Card(48, 44.40),
    "T4": Card(16, 14.56, bf16=False), "P100": Card(16, bf16=False), "V100 16GB": Card(16, bf16=False), "V100 32GB": Card(32, bf16=False),
    "A10": Card(24, 21.99), "A10G": Card(24, 21.99), "A30": Card(24), "A40": Card(48, 44.40), "A100 40GB": Card(40), "A100 80GB": Card(80),
    "L4": Card(24, 21.99), "L40": Card(48, 44.40), "L40S": Card(48, 44.40), "H100": Card(80), "H200": Card(141), "B200": Card(180),
    "MI210": Card(64), "MI250X": Card(64), "MI300X": Card(192),
}  # fmt: skip
ANOTHER = {"ti", "super", "laptop", "mobile", "max", "mig"}
"""Words that make another card of a name that has them beside a title of the table."""
DRIVER_SECONDS = 20.0
LEAST_BF16 = 8  # NVIDIA's compute capability from which on bfloat16 is multiplied natively
UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "": 10**9}


@dataclass(frozen=True)
class Hardware:
    """One place to train: memory_bytes for the run and the program together, on the device; host_bytes beside it (0: not looked at);
    whether a card multiplies bfloat16 (a processor is asked itself)."""

    name: str
    kind: str
    memory_bytes: int
    host_bytes: int = 0
    native_bf16: bool = True

    @property
    def program_bytes(self) -> int:
        """What the program takes on the device before a model is loaded."""
        return PROGRAM_BYTES[self.kind]

    @property
    def margin(self) -> float:
        """Share by which a prediction may be off here."""
        return MARGIN[self.kind]


def size_bytes(text: str) -> int:
    """Bytes of a size such as 24, 24GB or 22.5 GiB; a bare number is a card's size as sold, in units of 10^9.

    >>> size_bytes("24"), size_bytes("22.5 GiB")
    (24000000000, 24159191040)
    """
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)", text.strip())
    count = round(float(found[1]) * UNITS[found[2].lower()]) if found and found[2].lower() in UNITS else 0
    if not 2**28 <= count <= 2**50:
        raise ConfigError(
            "the memory of a card is a number of gigabytes", code="E-CONF-401", place="--gpu-memory", found=text[:40],
            expected="24, 24GB or 22.5GiB; at least 0.25 GiB", nothing_done="Nothing was planned.",
        )  # fmt: skip
    return count


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("geforce", "").replace("tesla", "").replace("amd", ""))


def card(name: str) -> Hardware:
    """A card of the table; case, spaces and the maker's name do not matter.  Raises ConfigError with the nearest names.

    >>> card("nvidia rtx4090").memory_bytes
    24000000000
    """
    known = {_plain(title): title for title in CARDS}
    title = known.get(_plain(name))
    if title is None:
        likely = [title for plain, title in known.items() if _plain(name) and (plain.startswith(_plain(name)) or _plain(name) in plain)]
        remedy = f"did you mean {', '.join(likely[:3])}?" if likely else nearest(_plain(name), known)
        raise ConfigError(
            "a card is named as in the table", code="E-CONF-402", place="--gpu", found=name[:40], expected=", ".join(CARDS),
            remedy=remedy or "or give its size: --gpu-memory 24", nothing_done="Nothing was planned.",
        )  # fmt: skip
    return Hardware(title, "gpu", CARDS[title].memory_bytes, native_bf16=CARDS[title].bf16)


def known_as(name: str) -> str | None:
    """The title in the table of a card as its driver names it; None where it is not there.

    >>> known_as("NVIDIA H100 80GB HBM3"), known_as("NVIDIA A100-SXM4-40GB"), known_as("NVIDIA GeForce RTX 4070 Ti")
    ('H100', 'A100 40GB', None)
    """
    words = _words(name)
    found = [title for title in CARDS if _words(title) <= words and not (words - _words(title)) & ANOTHER]
    return max(found, key=lambda title: len(_words(title)), default=None)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def sized(text: str) -> Hardware:
    """A card of a given size."""
    count = size_bytes(text)
    return Hardware(f"a card with {text.strip()}{' GB' if text.strip().replace('.', '').isdigit() else ''}", "gpu", count)


def this_machine() -> Hardware:
    """The first accelerator that a run would see, else this machine's processor; with the memory that is free for a program now."""
    found = _driver_says()
    if found is not None:
        name, free, native = found
        return Hardware(name, "gpu", free, host.memory_bytes()[1], native)
    return processor()


def processor(own_bytes: int = 0) -> Hardware:
    """This machine's processor with the memory that is free; `own_bytes` this program already holds, which a plan counts as its own."""
    return Hardware(PROCESSOR, "cpu", host.memory_bytes()[1] + own_bytes)


def accelerator(name: str, free: int, total: int, own_on_host: int = 0) -> Hardware:
    """A card on which this program already has its context, which a plan counts as its own, and `own_on_host` bytes in host memory."""
    return Hardware(name, "gpu", min(total, free + PROGRAM_BYTES["gpu"]), host.memory_bytes()[1] + own_on_host)


def _driver_says() -> tuple[str, int, bool] | None:
    """What `parse_driver` says of the first accelerator that CUDA shows; None without a driver that answers, or a PyTorch that uses it."""
    program = shutil.which("nvidia-smi")
    if program is None or not torch_uses_gpus():
        return None
    asked = [program, "--query-gpu=index,uuid,name,memory.free,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=DRIVER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_driver(done.stdout, env.visible_gpus()) if done.returncode == 0 else None


def torch_uses_gpus() -> bool:
    """Whether the installed PyTorch was built for accelerators; a plan does not import it."""
    spec = importlib.util.find_spec("torch")
    path = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    return path is not None and path.is_file() and built_for_gpus(path.read_text(encoding="utf-8"))


def built_for_gpus(version: str) -> bool:
    """Whether this torch/version.py is of a build with CUDA or HIP.

    >>> built_for_gpus("cuda: Optional[str] = '12.8'"), built_for_gpus("cuda: Optional[str] = None")
    (True, False)
    """
    return re.search(r"^(?:cuda|hip)\b[^=\n]*= *['\"]", version, re.MULTILINE) is not None


def parse_driver(text: str, visible: str | None = None) -> tuple[str, int, bool] | None:
    """(name, free bytes, whether it multiplies bfloat16) of the first accelerator that `visible` names by number or UUID, from nvidia-smi's
    lines with memory in MiB and the compute capability.

    Without `visible` it is the first of all; None where there is none, or nvidia-smi says nothing of use.

    >>> parse_driver("0, GPU-17ab, NVIDIA L4, 22494, 8.9"), parse_driver("0, GPU-17ab, NVIDIA L4, 22494, 8.9", "")
    (('NVIDIA L4', 23586668544, True), None)
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in text.strip().splitlines()]
    wanted = None if visible is None else visible.split(",")[0].strip()
    for number, uuid, name, free, capability in (row for row in rows if len(row) == 5):
        if (wanted is None or (wanted and (number == wanted or uuid.startswith(wanted)))) and free.isdigit():
            major = capability.partition(".")[0]
            return name, int(free) << 20, not major.isdigit() or int(major) >= LEAST_BF16
    return None
