"""The GPU lines that only Halfbyte runs: memory, long context, a large model on a small card, dequantize, paging.

Each measurement is a process of its own (`python -m benchmarks.gpu_lines NAME '{settings}' --out FILE`), so that a run that fills the
card leaves nothing behind.  A card is made small by torch's own limit on what a process may allocate.  Too little memory is a result:
`fits` is false.  Peak memory is torch's, of what was allocated, and of what was taken from the card (reserved).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gpu_models

GIB = 1 << 30
SIZES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))


def cap(device: str, gib: float | None) -> None:
    """Let this process allocate no more than `gib` of the card."""
    import torch

    if gib is not None and device.startswith("cuda"):
        torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peaks(device: str) -> dict[str, float]:
    """Highest allocated and reserved memory of the card so far, GiB; of the process, on a CPU."""
    import torch

    if device.startswith("cuda"):
        return {
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        }

    from halfbyte import host

    return {"peak_gib": round(host.peak_rss_bytes() / GIB, 3)}


class Trainee:
    """A packed model with adapters, its optimizer, and steps on a few fixed documents of random tokens, which it can learn by heart."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        import torch

        import halfbyte as hb
        from halfbyte.models.recompute import use_policy
        from halfbyte.optim.adamw import AdamW

        self.device = wanted["device"]
        cap(self.device, wanted.get("cap_gib"))
        torch.manual_seed(gpu_models.SEED)
        self.model = gpu_models.packed_model(wanted["shape"], self.device, layers=wanted.get("layers"))
        hb.inject(
            self.model, rank=wanted["rank"], alpha=wanted["alpha"], targets="all-linear", seed=gpu_models.SEED,
            dtype=wanted.get("adapter_dtype", "float32"),
        )  # fmt: skip
        use_policy(self.model, wanted["kept"])
        self.model.train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = AdamW(
            self.trained, lr=wanted.get("learning_rate", 1e-4), state=wanted.get("state", "float32"), paged=wanted.get("paged", False)
        )
        self.optimizer.allocate()

    def documents(self, tokens: int, rows: int, count: int) -> list[Any]:
        """`count` batches (rows, tokens)."""
        import torch

        generator = torch.Generator().manual_seed(gpu_models.SEED)
        vocabulary = self.model.config.vocab_size
        return [torch.randint(vocabulary, (rows, tokens), generator=generator).to(self.device) for _ in range(count)]

    def step(self, ids: Any) -> float:
        """Forward, backward, clip, update; the loss."""
        from torch.nn.utils import clip_grad_norm_

        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())


def train(wanted: dict[str, Any]) -> dict[str, Any]:
    """Some steps at one length; losses, seconds and peaks, or fits=false."""
    import torch

    losses: list[float] = []
    seconds: list[float] = []
    try:
        trainee = Trainee(wanted)
        static = peaks(wanted["device"])["peak_gib"]
        batches = trainee.documents(wanted["tokens"], wanted["rows"], wanted.get("documents", 1))
        for number in range(wanted["steps"]):
            began = time.perf_counter()
            losses.append(trainee.step(batches[number % len(batches)]))
            wait(wanted["device"])
            seconds.append(round(time.perf_counter() - began, 4))
    except torch.OutOfMemoryError as error:
        return {**wanted, "fits": False, "steps_done": len(losses), "said": str(error).splitlines()[0][:200], **peaks(wanted["device"])}
    return {**wanted, "fits": True, "after_start_gib": static, "losses": losses, "seconds": seconds, **peaks(wanted["device"])}


def paging(wanted: dict[str, Any]) -> dict[str, Any]:
    """Two steps, then the optimizer's state goes to a file and into a fresh optimizer, as a resume does, and two more."""
    import torch
    from safetensors.torch import load_file, save_file

    from halfbyte.optim.adamw import AdamW

    done = 0
    try:
        trainee = Trainee(wanted)
        batch = trainee.documents(wanted["tokens"], wanted["rows"], 1)[0]
        for _ in range(2):
            trainee.step(batch)
            done += 1
        file = Path(wanted["file"])
        save_file({name: value.contiguous() for name, value in trainee.optimizer.state_tensors().items()}, file)
        settings = {"state": trainee.optimizer.kind, "paged": trainee.optimizer.paged, "lr": trainee.optimizer.param_groups[0]["lr"]}
        del trainee.optimizer
        trainee.optimizer = AdamW(trainee.trained, **settings)
        trainee.optimizer.load_state_tensors(load_file(file))
        file.unlink()
        for _ in range(2):
            trainee.step(batch)
            done += 1
    except torch.OutOfMemoryError as error:
        return {**wanted, "fits": False, "steps_done": done, "said": str(error).splitlines()[0][:200], **peaks(wanted["device"])}
    return {**wanted, "fits": True, "steps_done": done, **peaks(wanted["device"])}


def seconds_of(work: Callable[[], object], device: str, tiny: bool) -> float:
    """Median seconds of a call: Triton's do_bench with the cache cleared between calls, a plain clock on a CPU."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return float(do_bench(work, warmup=100, rep=400, return_mode="median")) / 1e3
    taken = []
    for _ in range(3 if tiny else 20):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def dequantize(wanted: dict[str, Any]) -> dict[str, Any]:
    """NF4, double quantization, to bfloat16: seconds and bytes/s beside a large copy and bitsandbytes, and whether the bits are equal."""
    import torch

    from halfbyte.quant import blockwise

    device, tiny = wanted["device"], wanted["tiny"]
    source = torch.empty(1 << (20 if tiny else 30), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds_of(lambda: target.copy_(source), device, tiny)
    rows = []
    for tall, wide in ((256, 128),) if tiny else SIZES:
        weight = torch.empty((tall, wide), dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)
        packed, state = blockwise.quantize(weight, "nf4", 64, True)
        moved = packed.numel() + state.absmax.numel() + 4 * state.nested.absmax2.numel() + 2 * weight.numel()
        ours = seconds_of(lambda packed=packed, state=state: blockwise.dequantize(packed, state, torch.bfloat16), device, tiny)
        row: dict[str, Any] = {
            "shape": [tall, wide], "seconds": ours, "bytes_per_second": moved / ours, "share_of_copy": round(moved / ours / copy, 3)
        }  # fmt: skip
        if wanted["bitsandbytes"]:
            row |= _bitsandbytes(weight, blockwise.dequantize(packed, state, torch.bfloat16), ours, device, tiny)
        rows.append(row)
    return {"copy_bytes_per_second": copy, "rows": rows, "equal_bits": all(row.get("equal_bits", True) for row in rows)}


def _bitsandbytes(weight: Any, ours: Any, seconds: float, device: str, tiny: bool) -> dict[str, Any]:
    import bitsandbytes.functional as bnb
    import torch

    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    taken = seconds_of(lambda: bnb.dequantize_4bit(packed, state), device, tiny)
    equal = torch.equal(bnb.dequantize_4bit(packed, state).view(torch.int16), ours.view(torch.int16))
    return {"bitsandbytes_seconds": taken, "times_bitsandbytes": round(taken / seconds, 3), "equal_bits": equal}


WORKS = {"train": train, "paging": paging, "dequantize": dequantize}


def asked(line: Any, name: str, work: str, wanted: dict[str, Any], seconds: float = 60.0) -> dict[str, Any] | None:
    """One measurement in a process of its own."""
    words = ["benchmarks.gpu_lines", work, json.dumps({**wanted, "device": line.device})]
    return dict(found) if (found := line.child(name, words, seconds)) is not None else None


def memory_7b(line: Any) -> int:
    """Line 14: what each precision of state costs, and that the losses stay within 0.5 % of those of fp32 states."""
    steps = 4 if line.tiny else 50
    common = {
        "shape": "tiny" if line.tiny else "7b", "rank": 8 if line.tiny else 256, "alpha": 16 if line.tiny else 512, "rows": 1,
        "tokens": 32 if line.tiny else 512, "steps": steps, "documents": 4,
    }  # fmt: skip
    made = {}
    for adapters, state in (("float32", "float32"), ("bfloat16", "float32"), ("float32", "int8"), ("bfloat16", "int8")):
        for kept in ("keep", "recompute"):
            name = f"{adapters}-{state}-{kept}"
            made[name] = asked(line, name, "train", {**common, "adapter_dtype": adapters, "state": state, "kept": kept}, 75.0)
    base = made["float32-float32-keep"]
    summary = {}
    for name, found in made.items():
        if found is None or base is None or not found.get("fits") or not base.get("fits"):
            continue
        apart = [abs(one - other) / other for one, other in zip(found["losses"], base["losses"])]
        summary[name] = {"peak_gb": round(found["peak_gib"] * 1.073741824, 2), "mean_loss_apart": round(statistics.mean(apart), 6),
                         "within": statistics.mean(apart) <= 0.005}  # fmt: skip
    return int(line.finish(bar_gb=12.0, aim_gb=9.0, published_gb=17.86, by_state=summary))


def step_65b(line: Any) -> int:
    """Line 15: forward, backward and update at 2,048 tokens on 48 GiB."""
    common = {"shape": "tiny" if line.tiny else "65b", "rank": 64, "alpha": 128, "rows": 1, "tokens": 64 if line.tiny else 2048, "steps": 2}
    made = {}
    for adapters, state in (("bfloat16", "int8"), ("float32", "float32")):
        name = f"{adapters}-{state}"
        wanted = {**common, "adapter_dtype": adapters, "state": state, "kept": "recompute", "cap_gib": 48.0}
        made[name] = asked(line, name, "train", wanted, 200.0)
    fits = {name: {"fits": found.get("fits"), "peak_gib": found.get("peak_gib")} for name, found in made.items() if found}
    return int(line.finish(cap_gib=48.0, aim_gib=42.0, runs=fits))


def context_24g(line: Any) -> int:
    """Line 16: doubling, then halving the gap, until it is 4,096 tokens."""
    unit = 16 if line.tiny else 4096
    common = {"shape": "tiny" if line.tiny else "8b", "rank": 4 if line.tiny else 32, "alpha": 64, "rows": 1, "steps": 1,
              "adapter_dtype": "bfloat16", "state": "int8", "kept": "offload", "cap_gib": 24.0}  # fmt: skip
    good, bad = 0, (5 if line.tiny else 96)  # in units; 96 is 393,216 tokens
    for units in (1, 3) if line.tiny else (8, 20, 30, 40, 60, 80):
        found = asked(line, f"{units * unit}", "train", {**common, "tokens": units * unit}, 120.0)
        if found is None or not found.get("fits"):
            bad = bad if found is None else units
            break
        good = units
    while not line.left and bad - good > 1:
        middle = (good + bad) // 2
        found = asked(line, f"{middle * unit}", "train", {**common, "tokens": middle * unit}, 180.0)
        if found is None:
            break
        good, bad = (middle, bad) if found.get("fits") else (good, middle)
    return int(
        line.finish(cap_gib=24.0, longest_tokens=good * unit, too_long=bad * unit, published_unsloth=78475, bar=120_000, aim=240_000)
    )


def dequantize_line(line: Any) -> int:
    """Line 17."""
    import importlib.util

    peer = importlib.util.find_spec("bitsandbytes") is not None
    found = asked(line, "all", "dequantize", {"tiny": line.tiny, "bitsandbytes": peer}) or {}
    rows = found.get("rows", [])
    large = [row for row in rows if row["shape"][0] * row["shape"][1] >= 1 << 24]
    return int(line.finish(
        share_of_copy=min((row["share_of_copy"] for row in large), default=None), share_bar=0.85,
        times_bitsandbytes=min((row["times_bitsandbytes"] for row in large if "times_bitsandbytes" in row), default=None), times_bar=1.15,
        equal_bits=found.get("equal_bits"),
    ))  # fmt: skip


def paging_line(line: Any) -> int:
    """Line 18: the plain run's peak divided by 1.1 is the card; and the cost where all fits."""
    common = {"shape": "tiny" if line.tiny else "1b", "rank": 8 if line.tiny else 256, "alpha": 64, "rows": 1,
              "tokens": 32 if line.tiny else 4096, "kept": "keep", "file": str(line.work / "optimizer.safetensors")}  # fmt: skip
    free = asked(line, "plain-uncapped", "paging", {**common, "paged": False})
    limit = None if free is None or "peak_gib" not in free else round(free["peak_gib"] / 1.1, 3)
    capped = {}
    for paged in (False, True) if limit else ():
        name = f"{'paged' if paged else 'plain'}-capped"
        capped[name] = asked(line, name, "paging", {**common, "paged": paged, "cap_gib": limit})
    rates: dict[str, list[float]] = {"plain": [], "paged": []}
    for number in range(1 if line.tiny else 3):
        for name, found in rates.items():
            steps = {**common, "paged": name == "paged", "steps": 3 if line.tiny else 20}
            if (run := asked(line, f"{name}-fits-{number}", "train", steps)) and run.get("fits"):
                found.append(statistics.median(run["seconds"][1:]))
    slower = [paged / plain - 1 for plain, paged in zip(rates["plain"], rates["paged"])]
    return int(line.finish(
        cap_gib=limit, plain_fits=(capped.get("plain-capped") or {}).get("fits"), paged_fits=(capped.get("paged-capped") or {}).get("fits"),
        slower=round(statistics.median(slower), 4) if slower else None, slower_bar=0.02,
    ))  # fmt: skip


LINES: dict[str, Callable[[Any], int]] = {
    "memory-7b": memory_7b, "step-65b": step_65b, "context-24g": context_24g, "dequantize": dequantize_line, "paging": paging_line,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=list(WORKS))
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.write_text(json.dumps(WORKS[options.work](options.settings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
