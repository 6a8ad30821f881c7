"""Wheels for a GPU machine that has torch and transformers but no network: what Halfbyte lacks there, and the peers.

    python -m benchmarks.gpu_wheels FOLDER [--python 3.12]        where there is a network
    python -m benchmarks.gpu_run ... --wheels FOLDER              on the GPU machine: unpacked into the work folder

Each wheel is fetched without its needs, and made smaller where most of it is not used there: bitsandbytes keeps its libraries for the CPU
and for CUDA 13.0, unsloth loses its web studio.  Such a wheel has its RECORD rewritten, so that pip installs it as any other.
32 MiB in all (November 2026).  trl and datasets are the newest that unsloth takes.
"""

import argparse
import csv
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

OURS = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "gguf", "rouge-score", "nltk")
PEERS = (
    "bitsandbytes==0.50.2", "trl==1.15.0", "datasets<5", "multiprocess", "dill", "requests", "liger-kernel", "cut-cross-entropy",
    "unsloth", "unsloth-zoo", "tyro", "docstring-parser", "shtab", "typeguard", "msgspec", "hf-transfer", "xformers", "torchao",
    "diffusers", "json5", "nest-asyncio", "structlog",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
UNUSED = {
    "bitsandbytes": re.compile(r"libbitsandbytes_(cuda(?!130)|rocm|xpu)|\.dll$"),
    "unsloth": re.compile(r"^(studio|unsloth_studio)/|/studio/"),
}
"""Files that are left out of a wheel, by its name."""


def fetch(folder: Path, name: str, python: str) -> str:
    """One wheel for x86-64 Linux; the empty string, or why not."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        python,
        "--implementation",
        "cp",
    ]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, "--quiet", "-d", str(folder), name], capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]


def make_smaller(wheel: Path) -> None:
    """Leave out what UNUSED names, in place."""
    unused = UNUSED.get(wheel.name.split("-")[0].lower())
    if unused is None:
        return
    fresh = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as new:
        kept = [one for one in old.namelist() if not unused.search(one)]
        for name in kept:
            content = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                rows = [row for row in csv.reader(io.StringIO(content.decode())) if row and row[0] in kept]
                text = io.StringIO()
                csv.writer(text, lineterminator="\n").writerows(rows)
                content = text.getvalue().encode()
            new.writestr(old.getinfo(name), content)
    fresh.replace(wheel)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--only", help="names, with commas; default all")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    names = options.only.split(",") if options.only else [*OURS, *PEERS]
    failed = {name: why for name in names if (why := fetch(options.folder, name, options.python))}
    for wheel in sorted(options.folder.glob("*.whl")):
        make_smaller(wheel)
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
    for name, why in failed.items():
        print(f"not fetched: {name}: {why}")
    print(f"{sum(wheel.stat().st_size for wheel in options.folder.glob('*.whl')) / 2**20:.1f} MiB in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
