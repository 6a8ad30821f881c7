"""What a plan is made for: this machine, a card by its name, or a size.

A card sold as 24 GB shows between 24 * 10^9 and 24 * 2^30 bytes, depending on error correction and what the driver keeps; the table and
`--gpu-memory 24` mean the smaller, so that "fits" is not said wrongly.  A size with its unit (`22.5GiB`) is taken as it stands.

The program itself takes memory before a model is loaded.  These are the only measured numbers of a memory plan: on the CPU the resident
memory of a process that has trained a model of next to no size, less that model (torch 2.13, transformers 5.23, Linux: 553 MiB, which
benchmarks/bench_memory.py measures); on a GPU the device context with its libraries, for which 0.6 GiB is an estimate, and 2 GiB of
host memory, an estimate too.
Sources of the sizes: the makers' data sheets.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass

from halfbyte import host
from halfbyte.errors import ConfigError, nearest

PROCESSOR = "this machine's processor"
PROGRAM_BYTES = {"cpu": 553 << 20, "gpu": round(0.6 * 2**30)}
PROGRAM_ON_HOST = 2 << 30
MARGIN = {"cpu": 0.12, "gpu": 0.05}
"""A setting is said to fit only with this share to spare: on the CPU more than the largest shortfall measured (results/memory.json)."""

CARDS_GB = {
    "RTX 2080 Ti": 11, "RTX 3060": 12, "RTX 3070": 8, "RTX 3080": 10, "RTX 3090": 24, "RTX 4060": 8, "RTX 4060 Ti 16GB": 16, "RTX 4070": 12,
    "RTX 4080": 16, "RTX 4090": 24, "RTX 5060 Ti 16GB": 16, "RTX 5070": 12, "RTX 5070 Ti": 16, "RTX 5080": 16, "RTX 5090": 32,
    "RTX A4000": 16, "RTX A5000": 24, "RTX A6000": 48, "RTX 6000 Ada": 48, "T4": 16, "P100": 16, "V100 16GB": 16, "V100 32GB": 32,
    "A10": 24, "A10G": 24, "A30": 24, "A40": 48, "A100 40GB": 40, "A100 80GB": 80, "L4": 24, "L40": 48, "L40S": 48,
    "H100": 80, "H200": 141, "B200": 180, "MI210": 64, "MI250X": 128, "MI300X": 192,
}  # fmt: skip
UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "": 10**9}


@dataclass(frozen=True)
class Hardware:
    """One place to train: memory_bytes for the run and the program together, on the device; host_bytes beside it (0: not looked at)."""

    name: str
    kind: str
    memory_bytes: int
    host_bytes: int = 0

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
    known = {_plain(title): title for title in CARDS_GB}
    title = known.get(_plain(name))
    if title is None:
        likely = [title for plain, title in known.items() if _plain(name) and (plain.startswith(_plain(name)) or _plain(name) in plain)]
        remedy = f"did you mean {', '.join(likely[:3])}?" if likely else nearest(_plain(name), known)
        raise ConfigError(
            "a card is named as in the table", code="E-CONF-402", place="--gpu", found=name[:40], expected=", ".join(CARDS_GB),
            remedy=remedy or "or give its size: --gpu-memory 24", nothing_done="Nothing was planned.",
        )  # fmt: skip
    return Hardware(title, "gpu", CARDS_GB[title] * 10**9)


def sized(text: str) -> Hardware:
    """A card of a given size."""
    count = size_bytes(text)
    return Hardware(f"a card with {text.strip()}{' GB' if text.strip().replace('.', '').isdigit() else ''}", "gpu", count)


def this_machine() -> Hardware:
    """The accelerator that nvidia-smi names first, else this machine's processor with the memory that is free for a program now."""
    found = _driver_says()
    if found is not None:
        name, free = found
        return Hardware(name, "gpu", free, host.memory_bytes()[1])
    return processor()


def processor(own_bytes: int = 0) -> Hardware:
    """This machine's processor with the memory that is free; `own_bytes` this program already holds, which a plan counts as its own."""
    return Hardware(PROCESSOR, "cpu", host.memory_bytes()[1] + own_bytes)


def _driver_says() -> tuple[str, int] | None:
    """(name, free bytes) of the first accelerator; None where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    done = subprocess.run(
        [program, "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=False
    )
    return parse_driver(done.stdout) if done.returncode == 0 else None


def parse_driver(text: str) -> tuple[str, int] | None:
    """(name, free bytes) from nvidia-smi's first line, where memory is in MiB; None where it says nothing of use.

    >>> parse_driver("NVIDIA L4, 22494")
    ('NVIDIA L4', 23586668544)
    """
    name, comma, free = text.strip().partition("\n")[0].rpartition(",")
    return (name.strip(), int(free) << 20) if comma and free.strip().isdigit() else None
