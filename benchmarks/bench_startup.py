"""How long the program takes to answer before any work: `halfbyte --help`, a mistyped option, a dry run, importing the package.

Each is a process of its own, timed from start to end; the median and the fastest of REPEATS, after one that warms the disk cache.

    python -m benchmarks.bench_startup [--repeats 15]
"""

import argparse
import statistics
import subprocess
import sys
import time

from benchmarks import record

COMMANDS = {
    "python alone": ["-c", "pass"],
    "import halfbyte": ["-c", "import halfbyte"],
    "halfbyte --help": ["-m", "halfbyte", "--help"],
    "halfbyte train --help": ["-m", "halfbyte", "train", "--help"],
    "a mistyped option": ["-m", "halfbyte", "train", "--modle", "x"],
    "halfbyte train --dry-run": ["-m", "halfbyte", "train", "--data", "rows.jsonl", "--out", "runs/none", "--dry-run"],
    "import torch, for comparison": ["-c", "import torch"],
}
AIM_SECONDS = {"halfbyte --help": 0.3}


def measure(words: list[str], repeats: int) -> dict[str, float]:
    """Seconds of one command: median and fastest."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], capture_output=True, cwd=record.ROOT, check=False)
        seconds.append(time.perf_counter() - began)
    return {"median_seconds": statistics.median(seconds[1:]), "fastest_seconds": min(seconds[1:])}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    table = {name: measure(words, repeats) for name, words in COMMANDS.items()}
    print(record.write("startup", {"repeats": repeats, "aim_seconds": AIM_SECONDS, "commands": table}))
    for name, found in table.items():
        print(f"{name:<30} median {found['median_seconds']:.3f} s, fastest {found['fastest_seconds']:.3f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
