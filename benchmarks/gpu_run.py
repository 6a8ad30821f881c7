"""The GPU lines: one resumable subcommand each, under eight minutes a call, results in benchmarks/results/gpu_<line>.json.

    python -m benchmarks.gpu_run step-8b        speed and share of peak: Llama-3.1-8B shape, NF4, rank 16, 4 x 2048, beside the peers
    python -m benchmarks.gpu_run step-small     the same at 1 x 1024 and 1 x 512 tokens
    python -m benchmarks.gpu_run memory-7b      Llama-2-7B shape, rank 256, 1 x 512: peak memory by precision of state
    python -m benchmarks.gpu_run step-65b       Llama-65B shape, rank 64, 1 x 2048, card capped to 48 GiB
    python -m benchmarks.gpu_run context-24g    8B shape, rank 32, card capped to 24 GiB: the longest context
    python -m benchmarks.gpu_run dequantize     NF4 to bfloat16: share of the measured copy bandwidth, beside bitsandbytes
    python -m benchmarks.gpu_run memory-plan    predicted against measured peak memory in twelve settings
    python -m benchmarks.gpu_run paging         optimizer state in host memory: finishes where plain state does not, costs nothing else

What a call finishes is written at once and not repeated by the next; a call stops by itself before its minutes are over (`--minutes`)
and says what is left.  --results names another folder (on a lent machine: the one that is brought back), --tiny runs the same
code with tiny shapes on any machine and writes nowhere but into --work.  A peer that is not installed is named as such in the result.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gpu_models, record, train_inputs, train_results

GIB = 1 << 30
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}
"""Published dense bf16 rates."""
NEEDS = {
    "peft": ("peft", "bitsandbytes"), "trl": ("trl", "peft", "bitsandbytes"), "unsloth": ("unsloth",),
    "liger": ("liger_kernel", "peft", "bitsandbytes"),
}  # fmt: skip
RESULT_FILES = {"memory-plan": "memory-gpu"}
PEERS = ("triton", "unsloth", "unsloth_zoo", "liger_kernel", "xformers")


class Line:
    """One result file, and the time that this call has."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.tiny, self.device, self.retry = name, options.tiny, options.device, options.retry_failed
        self.work = options.work.absolute()
        self.work.mkdir(parents=True, exist_ok=True)
        self.ends = time.monotonic() + 60 * options.minutes
        folder = self.work if options.tiny else options.results
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{RESULT_FILES.get(name, f'gpu_{name}')}.json"
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.found.setdefault("runs", {})
        self.left: list[str] = []

    def run(self, name: str, measure: Callable[[], dict[str, Any]], seconds: float = 60.0) -> dict[str, Any] | None:
        """The result of this name: of an earlier call, or measured now if `seconds` are left; None when they are not."""
        runs = self.found["runs"]
        if name not in runs or (self.retry and "failed" in runs[name]):
            if time.monotonic() + seconds > self.ends:
                self.left.append(name)
                return None
            began = time.monotonic()
            runs[name] = {**measure(), "took_seconds": round(time.monotonic() - began, 1), "date_and_code": stamp()}
            self.write()
            print(f"{self.name} {name}: {json.dumps({k: v for k, v in runs[name].items() if not isinstance(v, list | dict)})}", flush=True)
        return dict(runs[name])

    def child(self, name: str, words: list[str], seconds: float = 60.0) -> dict[str, Any] | None:
        """`run` of a process of its own, which writes its result to the file after --out; a failure is a result too."""

        def measure() -> dict[str, Any]:
            out = self.work / "child.json"
            out.unlink(missing_ok=True)
            surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            limit = max(30.0, self.ends - time.monotonic() + 30.0)
            log = self.work / f"{self.name}-{name}.log"
            with log.open("w") as text:
                try:
                    command = [sys.executable, "-m", *words, "--out", str(out)]
                    status = subprocess.run(command, cwd=record.ROOT, env=surroundings, stdout=text, stderr=text, timeout=limit).returncode
                except subprocess.TimeoutExpired:
                    status = 124
            if status or not out.exists():
                return {"failed": status, "said": log.read_text()[-1500:].splitlines()[-12:]}
            return json.loads(out.read_text())

        return self.run(name, measure, seconds)

    def write(self) -> None:
        """Write the result file: header, what it is, runs, summary."""
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps({**record.header(), **gpu(self.device), **self.found}, indent=1) + "\n")
        fresh.replace(self.path)

    def finish(self, **summary: Any) -> int:
        """Write the summary; 0 when nothing is left to do."""
        self.found["summary"] = summary
        self.write()
        print(json.dumps(summary, indent=1))
        print(f"{self.path}" + (f"; left for the next call: {', '.join(self.left)}" if self.left else "; all done"))
        return 3 if self.left else 0


def stamp() -> str:
    """When and from which source a run was made."""
    from benchmarks.bench_train import code_digest

    return f"{time.strftime('%Y-%m-%d %H:%M')} {code_digest()}"


def gpu(device: str) -> dict[str, object]:
    """The card."""
    import torch

    if not device.startswith("cuda"):
        return {"gpu": "none"}
    seen = torch.cuda.get_device_properties(0)
    found = {name: importlib.metadata.version(name) for name in PEERS if importlib.util.find_spec(name) is not None}
    return {"gpu": seen.name, "gpu_bytes": seen.total_memory, "cuda": torch.version.cuda, "peers": found}


def missing(arm: str) -> list[str]:
    """Packages that an arm needs and that are not installed."""
    return [name for name in NEEDS.get(arm.split("-")[0], ()) if importlib.util.find_spec(name) is None]


def in_order(arms: list[str], rounds: int, first: tuple[str, ...]) -> list[tuple[int, str]]:
    """(round, arm): every round of the `first` arms, then every round of the others.

    >>> in_order(["ours", "peer", "other"], 2, ("ours", "other"))
    [(0, 'ours'), (0, 'other'), (1, 'ours'), (1, 'other'), (0, 'peer'), (1, 'peer')]
    """
    groups = [arm for arm in arms if arm in first], [arm for arm in arms if arm not in first]
    return [(number, arm) for group in groups for number in range(rounds) for arm in group]


def arms_of(
    line: Line, arms: list[str], settings: train_inputs.Settings, steps: int, rounds: int, seconds: float, first: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Arms of train_arms.py in turn, round after round, on the same folder; figures, ratios of a round, agreement."""
    work = line.work / f"{line.name}-{settings.rows}x{settings.tokens}"
    inputs = train_inputs.prepare(work, settings)
    tokens = inputs["counts"]["all"]["tokens"][:steps]
    prefix = f"{settings.rows}x{settings.tokens}"
    by_round: list[dict[str, Any]] = [{} for _ in range(rounds)]
    for number, arm in in_order(arms, rounds, first):
        name = f"{prefix}-{number}-{arm}"
        if lacking := missing(arm):
            line.found.setdefault("not_installed", {})[arm] = lacking
            continue
        words = ["benchmarks.train_arms", arm, "--work", str(work), "--mode", "all", "--steps", str(steps), "--device", line.device]
        found = line.child(name, [*words, "--threads", str(os.cpu_count() or 1)], seconds)
        if found is not None and "failed" not in found:
            by_round[number][arm] = found
    done = {arm: runs for arm in arms if (runs := [found[arm] for found in by_round if arm in found])}
    if not done:
        return {"arms": {}}
    return {
        "arms": {arm: train_results.figures(runs, tokens) for arm, runs in done.items()}, "by_round": by_round, "tokens": tokens,
        "agreement": train_results.agreement({arm: runs[0]["losses"] for arm, runs in done.items()}),
    }  # fmt: skip


def summary_of(found: dict[str, Any], bars: list[tuple[Any, ...]]) -> dict[str, Any]:
    """What of it is written."""
    if not found["arms"]:
        return {"arms": {}}
    ratios = train_results.ratios(found["by_round"], found["tokens"], bars)
    return {"arms": found["arms"], "agreement": found["agreement"], "ratios": ratios}


def flops_per_step(shape: str, rank: int, rows: int, tokens: int) -> float:
    """Model FLOPs of a LoRA step: forward and dX of the frozen linears and the head, all three products of A and B, attention.

    4 N (P_linears + P_head) + 6 N P_lora + 3.5 attention forward;  attention forward = 2 T^2 H layers rows, causal.
    What is computed a second time does not count.
    """
    one = gpu_models.SHAPES[shape]
    hidden, inner, layers, heads = (one[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
    keys = one.get("num_key_value_heads", heads) * hidden // heads
    sizes = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    linears = layers * sum(wide * tall for wide, tall in sizes)
    adapters = layers * sum(rank * (wide + tall) for wide, tall in sizes)
    count = rows * tokens
    attention = 2.0 * tokens**2 * hidden * layers * rows
    return 4.0 * count * (linears + hidden * one["vocab_size"]) + 6.0 * count * adapters + 3.5 * attention


def model_folder(line: Line, shape: str) -> Path:
    """The folder that all arms load, written by a process of its own, which leaves the card empty."""
    folder = line.work / f"model-{shape}"
    command = [sys.executable, "-m", "benchmarks.gpu_models", shape, str(folder), line.device]
    subprocess.run(command, cwd=record.ROOT, check=True)
    return folder


def step_8b(line: Line) -> int:
    """Lines 11 and 12.  All rounds of the two arms that the lines compare come first: the rest may need a call on another day."""
    rows, tokens, steps, rounds = (2, 64, 3, 1) if line.tiny else (4, 2048, 15, 3)
    shape = "tiny" if line.tiny else "8b"
    folder = model_folder(line, shape)
    settings = train_inputs.Settings(model=str(folder), documents="random", rows=rows, tokens=tokens, windows=steps)
    arms = ["train-nf4", "trl-nf4", "unsloth-nf4", "train-nf4-recompute", "unsloth-nf4-keep", "peft-nf4", "loop-nf4", "liger-nf4"]
    found = arms_of(line, arms, settings, steps, rounds, 75.0, first=("train-nf4", "peft-nf4"))
    bars = [
        ("tokens/s", "train-nf4", "trl-nf4", ">=", 1.8), ("tokens/s", "train-nf4", "unsloth-nf4", ">=", 1.35),
        ("tokens/s", "train-nf4-recompute", "unsloth-nf4", ">=", 1.1), ("tokens/s", "train-nf4", "unsloth-nf4-keep", ">=", 1.1),
        ("tokens/s", "train-nf4", "peft-nf4", ">=", None), ("tokens/s", "train-nf4", "liger-nf4", ">=", None),
    ]  # fmt: skip
    summary = summary_of(found, bars)
    flops = flops_per_step(shape, settings.rank, rows, tokens)
    peak = next((rate for name, rate in PEAK_TFLOPS.items() if name in str(gpu(line.device)["gpu"])), None)
    for figures in summary["arms"].values():
        figures["model_tflops"] = round(flops / figures["step_seconds"] / 1e12, 1)
        figures["share_of_peak"] = round(figures["model_tflops"] / peak, 3) if peak else None
    return line.finish(flops_per_step=flops, published_peak_tflops=peak, share_of_peak_bar=0.5, **summary)


def step_small(line: Line) -> int:
    """Line 13."""
    sizes, steps, rounds = ([(1, 32)], 3, 1) if line.tiny else ([(1, 1024), (1, 512)], 33, 3)
    shape = "tiny" if line.tiny else "8b"
    folder = model_folder(line, shape)
    summary = {}
    for rows, tokens in sizes:
        settings = train_inputs.Settings(model=str(folder), documents="random", rows=rows, tokens=tokens, windows=steps)
        found = arms_of(line, ["train-nf4", "peft-nf4", "loop-nf4", "trl-nf4", "unsloth-nf4"], settings, steps, rounds, 60.0)
        bars = [("tokens/s", ours, "peft-nf4", ">=", 2.5) for ours in ("train-nf4", "loop-nf4")]
        bars += [("tokens/s", "train-nf4", peer, ">=", None) for peer in ("trl-nf4", "unsloth-nf4")]
        summary[f"{rows}x{tokens}"] = summary_of(found, bars)
    return line.finish(**summary)


def other(line: Line) -> int:
    """The lines in gpu_lines.py and gpu_memory.py."""
    from benchmarks import gpu_lines, gpu_memory

    return int({**gpu_lines.LINES, "memory-plan": gpu_memory.line}[line.name](line))


def install(wheels: Path, site: Path) -> None:
    """Unpack the wheels into a folder that this process and those it starts search first."""
    if not site.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
        subprocess.run([*command, *map(str, sorted(wheels.glob("*.whl")))], check=True)
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))


LINES: dict[str, Callable[[Line], int]] = {
    "step-8b": step_8b, "step-small": step_small, "memory-7b": other, "step-65b": other, "context-24g": other, "dequantize": other,
    "memory-plan": other, "paging": other,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("line", choices=list(LINES))
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder for models and inputs")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--minutes", type=float, default=7.5, help="no new run is begun that would not end in this time")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to unpack into --work; see gpu_wheels.py")
    parser.add_argument("--device")
    parser.add_argument("--retry-failed", action="store_true", help="repeat runs that are written down as failed")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.wheels:
        install(options.wheels, options.work.absolute() / "site")
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cpu" and not options.tiny:
        raise SystemExit("no GPU here: nothing is measured (--tiny runs the code with tiny shapes)")
    return LINES[options.line](Line(options.line, options))


if __name__ == "__main__":
    sys.exit(main())
