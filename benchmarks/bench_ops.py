"""Time, bytes per second, share of this machine's own ceiling and peak memory of single ops, beside their peers.

Every side is a process of its own that keeps its inputs; the sides run in turn, a few repeats each, so that a busy moment of the machine
falls on all.  Medians.  Before anything is counted a side runs once (kernels are made or loaded) and its result is compared
with the others'.  Peak memory is what a side's resident memory rose by over its inputs (VmHWM, reset after one run of a small case).

| subcommand   | what                                                             | ceiling                            |
|--------------|------------------------------------------------------------------|------------------------------------|
| dequantize   | NF4 + double quantization to bfloat16, bits equal                | a copy of as many bytes            |
| linear4bit   | frozen 4-bit linear layer, forward and backward                  | the two matrix products            |
| decode       | one token of a 1B Llama shape with random weights                | its weights' bytes at copy speed   |
| head         | output head, cross-entropy and gradient, all tokens trained      | the two matrix products            |

dequantize is measured twice: as the C library hands out memory (a tensor of 32 MiB is mapped afresh, and faulting in its pages
takes most of the time of a side that makes a new one), and with `kept_pages`, where freed memory is kept (MALLOC_MMAP_MAX_=0).

    python -m benchmarks.bench_ops dequantize|linear4bit|decode|head [--threads 2] [--rounds 12] [--work FOLDER] [--smoke]
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.meter import status_bytes

KEPT_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
SIDES = {
    "dequantize": ("halfbyte", "bitsandbytes", "halfbyte-new", "copy"), "linear4bit": ("halfbyte", "bf16", "bitsandbytes", "gemm"),
    "decode": ("halfbyte", "bf16", "bitsandbytes", "fp32"), "head": ("halfbyte", "transformers", "gemm"),
}  # fmt: skip
CASES: dict[str, list[dict[str, Any]]] = {
    "dequantize": [{"shape": [4096, 4096]}, {"shape": [1536, 576]}, {"shape": [4096, 4096], "kept_pages": True}],
    "linear4bit": [{"shape": [512, 1536, 576]}, {"shape": [512, 4096, 4096]}],
    "decode": [{}],
    "head": [{"shape": [2048, 576, 49152], "dtype": "bf16"}, {"shape": [2048, 576, 49152], "dtype": "fp32"}],
}
SMOKE: dict[str, list[dict[str, Any]]] = {
    "dequantize": [{"shape": [256, 128]}, {"shape": [256, 128], "kept_pages": True}],
    "linear4bit": [{"shape": [16, 128, 64]}],
    "decode": [{"model": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }}],
    "head": [{"shape": [64, 32, 512], "dtype": "bf16"}, {"shape": [64, 32, 512], "dtype": "fp32"}],
}  # fmt: skip
# how far results may lie apart: decode and the layer are checked against sides with other roundings of the same weights
AGREE = {"linear4bit": 0.05, "decode": 0.05, "head": 0.02}


# ---- one side, in a process of its own


def serve(op: str, side: str, case: dict[str, Any], threads: int) -> None:
    """Answer requests on standard input: a number of repeats -> their seconds; "end" -> peak memory."""
    import torch

    from benchmarks.op_arms import OPS

    torch.set_num_threads(threads)
    if "shape" in case:  # imports and kernels out of the way before memory is counted
        small = OPS[op](side, {**case, "shape": SMOKE[op][0]["shape"]})
        small.run()
        small.check()
    arm = OPS[op](side, case)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    arm.run()
    arm.run()
    peak = status_bytes("VmHWM") - before
    print(json.dumps({"check": arm.check(), "bytes": arm.bytes, "flops": arm.flops, "peak": peak}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            arm.run()
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)


class Side:
    """The other end of `serve`."""

    def __init__(self, op: str, name: str, case: dict[str, Any], threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.bench_ops", op, "--side", name, "--case", json.dumps(case), "--threads", str(threads)]
        environment = {**os.environ, **(KEPT_PAGES if case.get("kept_pages") else {})}
        self.name = name
        self.process = subprocess.Popen(
            command, cwd=record.ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.about = self._answer()
        self.seconds: list[float] = []

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the side {self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def run(self, repeats: int) -> list[float]:
        """Seconds of each of `repeats` runs."""
        assert self.process.stdin is not None
        print(repeats, file=self.process.stdin, flush=True)
        return self._answer()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---- all sides of one case


def measure(op: str, case: dict[str, Any], rounds: int, threads: int) -> dict[str, Any]:
    """Every side in turn, `rounds` times; the first round is not counted."""
    sides = [Side(op, name, case, threads) for name in SIDES[op]]
    try:
        agreement = agree(op, {side.name: side.about["check"] for side in sides})
        repeats = {side.name: max(1, min(50, math.ceil(0.05 / max(1e-6, min(side.run(2)))))) for side in sides}
        for turn in range(rounds + 1):
            for side in sides:
                taken = side.run(repeats[side.name])
                side.seconds += taken if turn else []
    finally:
        for side in sides:
            side.end()
    rows = {side.name: row(side) for side in sides}
    return {"case": {key: value for key, value in case.items() if key != "folder"}, "sides": rows, "agree": agreement, **ratios(op, rows)}


def row(side: Side) -> dict[str, Any]:
    """What one side did."""
    seconds = statistics.median(side.seconds)
    quarters = statistics.quantiles(side.seconds, n=4)
    found: dict[str, Any] = {
        "ms": round(1e3 * seconds, 4), "ms_quarters": [round(1e3 * quarters[0], 4), round(1e3 * quarters[2], 4)],
        "runs": len(side.seconds), "peak_mib": round(side.about["peak"] / 2**20, 1),
    }  # fmt: skip
    if side.about["bytes"]:
        found["gb_per_s"] = round(side.about["bytes"] / seconds / 1e9, 2)
    if side.about["flops"]:
        found["gflop_per_s"] = round(side.about["flops"] / seconds / 1e9, 1)
    return found


def ratios(op: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours against the others, and against the machine's ceiling."""
    ours = rows["halfbyte"]
    others = {name: one for name, one in rows.items() if name != "halfbyte"}
    found: dict[str, Any] = {"times_faster_than": {name: round(one["ms"] / ours["ms"], 3) for name, one in others.items()}}
    if op == "decode":
        fastest = min((one["ms"], name) for name, one in others.items())
        found |= {"tokens_per_s": {name: round(1e3 / one["ms"], 2) for name, one in rows.items()}}
        found |= {"fastest_peer": fastest[1], "times_faster_than_fastest": round(fastest[0] / ours["ms"], 3)}
    ceiling = "copy" if "copy" in rows else "gemm" if "gemm" in rows else ""
    if ceiling:
        found["share_of_ceiling"] = {name: round(rows[ceiling]["ms"] / one["ms"], 3) for name, one in rows.items() if name != ceiling}
    if op == "linear4bit":
        found["time_against_bf16"] = round(ours["ms"] / rows["bf16"]["ms"], 3)
    if op == "head":
        found["memory_against_transformers"] = round(ours["peak_mib"] / max(0.1, rows["transformers"]["peak_mib"]), 3)
    return found


def agree(op: str, checks: dict[str, Any]) -> dict[str, float | bool]:
    """Bits for dequantize; else the distance of the compared values from ours, relative to theirs.  Raises where it is too large."""
    ours = checks["halfbyte"]
    found: dict[str, float | bool] = {}
    for name, other in checks.items():
        if name in ("halfbyte", "copy", "gemm") or other == "":
            continue
        if op == "dequantize":
            found[name] = other == ours
            near = bool(found[name])
        else:
            distance = math.dist(ours, other) / math.hypot(*other)
            found[name] = round(distance, 5)
            # weights in 16 bit are other weights than those in 4 bit
            near = distance <= AGREE[op] or (op in ("decode", "linear4bit") and name in ("bf16", "fp32") and distance < 0.5)
        if not near:
            raise RuntimeError(f"{op}: {name} and halfbyte do not agree: {found[name]}")
    return found


def copy_bandwidth(threads: int) -> float:
    """GB/s read and written by a copy between two buffers of 256 MiB, the best of 10."""
    import torch

    torch.set_num_threads(threads)
    source, target = (torch.ones(256 << 20, dtype=torch.uint8) for _ in range(2))
    best = math.inf
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - began)
    return round(2 * source.numel() / best / 1e9, 2)


def run_all(op: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All cases of one op."""
    rows = []
    for case in (SMOKE if options.smoke else CASES)[op]:
        if op == "decode":
            folder = work / ("decode-smoke" if options.smoke else "decode")
            if not (folder / "config.json").exists():
                make_model(folder, case)
            case = {**case, "folder": str(folder)}
        rows.append(measure(op, case, options.rounds, options.threads))
        print(json.dumps(rows[-1]), flush=True)
    found = {"what": f"{op}: {__doc__.splitlines()[0]}", "threads": options.threads, "rounds": options.rounds, "rows": rows}
    if op == "decode":
        bandwidth = copy_bandwidth(options.threads)
        found |= {"copy_gb_per_s": bandwidth}
        for one in rows:
            one["share_of_ceiling"] = {name: round(side["gb_per_s"] / bandwidth, 3) for name, side in one["sides"].items()}
    return found


def make_model(folder: Path, case: dict[str, Any]) -> None:
    """In a process of its own, so that this one stays small."""
    code = "import json, pathlib, sys; from benchmarks.op_arms import make_decode_model as make; make(pathlib.Path(sys.argv[1]), "
    command = [sys.executable, "-c", code + "json.loads(sys.argv[2]))", str(folder), json.dumps(case)]
    subprocess.run(command, cwd=record.ROOT, check=True, stderr=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("op", choices=sorted(SIDES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--work", type=Path, help="folder for the decode model; kept for the next time")
    parser.add_argument("--smoke", action="store_true", help="tiny cases, nothing written")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options.op, options.side, options.case, options.threads)
        return 0
    options.rounds = 2 if options.smoke else options.rounds
    with tempfile.TemporaryDirectory() as temporary:
        found = run_all(options.op, options, options.work or Path(temporary))
    if not options.smoke:
        print(record.write(f"ops_{options.op}", found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
