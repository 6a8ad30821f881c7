"""Loading a 1.2 GB bfloat16 model straight into NF4: peak anonymous memory and time, beside transformers + bitsandbytes.

Two models of random weights in shards of 300 MB, one of Llama's shape and one of Mixtral's (fused experts).  Each load is a fresh process,
ours and the peer's in turn, the files in the page cache for both.  A thread reads RssAnon from /proc/self/status every 2 ms;
the peak is counted over what the process held after its imports.  Mapped pages of the model files are not anonymous.

Before the loads that are counted each side loads once in a process of its own, which is not counted.  Ours starts there with an empty
folder for compiled kernels: its time is `cold_seconds`, what the very first load on a machine takes; the others find the kernels made.

    limit = quantized size + 2 x largest tensor (after expert fusion) + 300 MiB

    python -m benchmarks.bench_load [--work FOLDER] [--repeats 5] [--smoke]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import record

MIB = 1 << 20
SLACK = 300 * MIB
SHARD = "300MB"
COMMON = {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
SHAPES: dict[str, dict[str, int]] = {
    "llama": {**COMMON, "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 20},
    "mixtral": {
        **COMMON, "hidden_size": 1024, "intermediate_size": 1792, "num_hidden_layers": 12, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
SMOKE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 2000}


def make(folder: Path, kind: str, smoke: bool) -> None:
    """Write the random model, once; the norms' ones are kept, the rest is drawn."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(SHAPES[kind] | SMOKE if smoke else SHAPES[kind]))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)


class Sampler(threading.Thread):
    """The highest RssAnon of this process, in bytes, since `start()`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            self.peak = max(self.peak, rss_anon())
            time.sleep(0.002)


def rss_anon() -> int:
    """RssAnon now, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell RssAnon")


def child(who: str, folder: Path) -> dict[str, float]:
    """One load in this process."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if who == "ours":
        from halfbyte.config.quant import QuantConfig
        from halfbyte.models.load import load_model
        from halfbyte.models.source import Source
    else:
        import bitsandbytes  # noqa: F401  imported before the baseline is taken, as ours is
    idle = rss_anon()
    sampler = Sampler()
    sampler.start()
    began = time.monotonic()
    if who == "ours":
        model = load_model(Source("folder", folder, str(folder), ""), dtype="bfloat16", quant=QuantConfig(format="nf4"))
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    seconds = time.monotonic() - began
    sampler.over.set()
    sampler.join()
    held = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return {"seconds": seconds, "peak": sampler.peak - idle, "after": rss_anon() - idle, "size": sum(held.values()), "idle": idle}


def largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor once experts are fused."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    return max(parameter.nbytes for parameter in model.parameters())


def one_load(who: str, folder: Path, cache: Path) -> dict[str, float]:
    """A load in a fresh process whose compiled kernels are in `cache`; its last line is the JSON."""
    command = [sys.executable, "-m", "benchmarks.bench_load", "--child", who, "--work", str(folder)]
    environment = {**os.environ, "HALFBYTE_CACHE": str(cache)}
    done = subprocess.run(command, cwd=record.ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(kind: str, folder: Path, repeats: int) -> dict[str, object]:
    """Both sides in turn, `repeats` times each after one load each that is not counted."""
    files = sorted(folder.glob("*.safetensors"))
    total = sum(len(path.read_bytes()) for path in files)  # into the page cache
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "bitsandbytes": []}
    with tempfile.TemporaryDirectory() as cache:
        cold = {who: one_load(who, folder, Path(cache))["seconds"] for who in runs}
        for _ in range(repeats):
            for who, found in runs.items():
                found.append(one_load(who, folder, Path(cache)))
    ours = runs["ours"]
    largest, size = largest_tensor(folder), max(run["size"] for run in ours)
    limit = size + 2 * largest + SLACK
    peak = max(run["peak"] for run in ours)
    seconds = {who: statistics.median(run["seconds"] for run in found) for who, found in runs.items()}
    return {
        "model": kind, "file_bytes": total, "shards": len(files), "repeats": repeats, "quantized_bytes": size,
        "largest_tensor_bytes": largest,
        "limit_mib": round(limit / MIB, 1), "peak_mib": round(peak / MIB, 1), "within_limit": peak <= limit,
        "peer_peak_mib": round(max(run["peak"] for run in runs["bitsandbytes"]) / MIB, 1),
        "peer_quantized_bytes": max(run["size"] for run in runs["bitsandbytes"]),
        "seconds": round(seconds["ours"], 3), "peer_seconds": round(seconds["bitsandbytes"], 3),
        "cold_seconds": round(cold["ours"], 3), "peer_first_seconds": round(cold["bitsandbytes"], 3),
        "no_slower": seconds["ours"] <= seconds["bitsandbytes"],
        "all_seconds": {who: [round(run["seconds"], 3) for run in found] for who, found in runs.items()},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, help="folder for the models; kept for the next time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny models, nothing written")
    parser.add_argument("--child", choices=["ours", "bitsandbytes"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.work)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        rows = []
        for kind in SHAPES:
            folder = work / (f"{kind}-smoke" if options.smoke else kind)
            if not (folder / "config.json").exists():
                make(folder, kind, options.smoke)
            rows.append(measure(kind, folder, 1 if options.smoke else options.repeats))
            print(json.dumps(rows[-1]), flush=True)
    if not options.smoke:
        print(record.write("load", {"what": __doc__.splitlines()[0], "rows": rows}))
    return 0 if all(row["within_limit"] and (row["no_slower"] or options.smoke) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
