"""Predicted against measured peak memory on a GPU: the line `memory-plan` of gpu_run.py, results in memory-gpu.json.

    python -m benchmarks.gpu_memory folder MODEL FOLDER DEVICE      a model of SIZES with random weights, as a model folder
    python -m benchmarks.gpu_memory steps '{"setting": ...}' --out FILE

Each setting is a process of its own: it makes the model ready as `halfbyte train` does and takes three optimizer steps on rows of random
tokens.  Measured is torch's peak of allocated memory in these steps.  Predicted is what `halfbyte plan` says for a GPU, less the program's
share, which torch does not count: what the card gives the process beyond torch's own blocks stands beside it (`context_bytes`), like
the peak of what torch took from the card (`reserved_bytes`).  On a CPU (--tiny) the process's resident memory stands for both.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import bench_memory, gpu_models, record

TIED = {**gpu_models.LLAMA_3, "tie_word_embeddings": True}
SIZES: dict[str, dict[str, Any]] = {
    "0.1b": gpu_models.llama(576, 1536, 30, 9, **{**TIED, "vocab_size": 49152, "num_key_value_heads": 3}),  # SmolLM2-135M
    "1b": gpu_models.llama(2048, 8192, 16, 32, **TIED, rope_parameters=gpu_models.ROPE),  # Llama-3.2-1B
    "3b": gpu_models.llama(3072, 8192, 28, 24, **TIED, rope_parameters=gpu_models.ROPE),  # Llama-3.2-3B
    "tiny": gpu_models.llama(64, 160, 2, 4, **{**TIED, "vocab_size": bench_memory.VOCABULARY, "num_key_value_heads": 2}),
}
BASE: dict[str, Any] = {**bench_memory.BASE, "model": "1b", "tokens": 1024}
CHANGES: list[dict[str, Any]] = [
    {}, {"rank": 256}, {"rank": 256, "state": "int8"}, {"policy": "recompute_mlp"}, {"policy": "recompute", "tokens": 4096},
    {"policy": "offload", "tokens": 4096}, {"method": "full", "state": "int8", "rows": 2}, {"model": "0.1b", "method": "full", "rows": 8},
    {"model": "0.1b", "method": "lora", "tokens": 512, "rows": 16}, {"model": "3b"},
    {"model": "3b", "rank": 64, "policy": "recompute", "tokens": 4096, "rows": 1},
    {"model": "3b", "method": "lora", "policy": "recompute", "tokens": 2048, "rows": 2},
]  # fmt: skip
ALLOWED = 0.05
TINY = {"model": "tiny", "tokens": 32, "rows": 2, "rank": 4}


def settings(tiny: bool = False) -> list[dict[str, Any]]:
    """The settings that are measured; two small ones where only the code is tried."""
    return [{**BASE, **TINY}, {**BASE, **TINY, "method": "lora"}] if tiny else [{**BASE, **change} for change in CHANGES]


def name_of(setting: dict[str, Any]) -> str:
    """A setting in a few words."""
    return "-".join(str(setting[key]) for key in ("model", "method", "rank", "tokens", "rows", "policy", "state"))


def write_folder(folder: Path, model: str, device: str) -> None:
    """A Llama of these sizes in bfloat16, its weights drawn on the device; written once."""
    if (folder / "tokenizer_config.json").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(gpu_models.SEED)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES[model]), dtype=torch.bfloat16)
    made.save_pretrained(folder)
    gpu_models.tokenizer_for(SIZES[model]["vocab_size"]).save_pretrained(folder)


def predict(setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the plan says for a GPU, in bytes, without the program; needs config.json alone."""
    from halfbyte.plan.memory import plan_memory
    from halfbyte.plan.setting import Setting
    from halfbyte.shape import ModelShape

    planned = Setting.of(
        bench_memory.run_config(setting, str(folder)), dtype=setting["dtype"], tokens=setting["tokens"], micro_batch_size=setting["rows"],
        policy=setting["policy"], device="gpu",
    )  # fmt: skip
    memory = plan_memory(ModelShape.read(folder), planned)
    return {"predicted_bytes": memory.total, "peak": memory.peak, "terms": {term.name: term.bytes for term in memory.terms}}


def window_of(setting: dict[str, Any], generator: Any) -> list[Any]:
    """One batch of random tokens; packed rows hold four samples each."""
    import torch

    from halfbyte.data.batches import collate
    from halfbyte.data.packing import pack
    from halfbyte.data.tokenize import IGNORED, Example

    rows, tokens, packing = setting["rows"], setting["tokens"], setting["packing"]
    count, length = (rows * 4, tokens // 4) if packing else (rows, tokens)
    ids = torch.randint(0, bench_memory.VOCABULARY, (count, length), generator=generator).tolist()
    hidden = round(length * (1 - setting["labelled"]))
    examples = [Example(row, [IGNORED] * hidden + row[hidden:], number, "-") for number, row in enumerate(ids)]
    return [collate(pack(examples, tokens) if packing else examples, pad_id=0)]


def measure(wanted: dict[str, Any]) -> dict[str, Any]:
    """Three steps in this process, as the trainer takes them."""
    import torch

    from halfbyte import host
    from halfbyte.models.assemble import assemble
    from halfbyte.models.heads import head_of
    from halfbyte.models.recompute import use_policy
    from halfbyte.optim.adamw import AdamW
    from halfbyte.train.step import train_step

    setting, cuda = wanted["setting"], torch.cuda.is_available()
    made = assemble(bench_memory.run_config(setting, wanted["folder"]))
    use_policy(made.model, setting["policy"])
    trained = [parameter for parameter in made.model.parameters() if parameter.requires_grad]
    optimizer, head = AdamW([{"params": trained}], lr=1e-4, state=setting["state"]), head_of(made.model)
    optimizer.allocate()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    generator, after = torch.Generator().manual_seed(0), []
    for _ in range(bench_memory.STEPS):
        train_step(made.model, head, window_of(setting, generator), optimizer, clip_norm=1.0)
        after.append(torch.cuda.max_memory_allocated() if cuda else host.peak_rss_bytes())
    if not cuda:
        return {"measured_bytes": after[-1], "reserved_bytes": after[-1], "context_bytes": 0, "peak_after_each_step": after}
    free, total = torch.cuda.mem_get_info()
    return {
        "measured_bytes": after[-1], "reserved_bytes": torch.cuda.max_memory_reserved(),
        "context_bytes": total - free - torch.cuda.memory_reserved(), "peak_after_each_step": after,
    }  # fmt: skip


def line(line: Any) -> int:
    """All settings, one process each; how many predictions are within 5 % of what was measured."""
    rows = []
    for setting in settings(line.tiny):
        folder = line.work / f"dense-{setting['model']}"
        if not (folder / "tokenizer_config.json").exists():
            command = [sys.executable, "-m", "benchmarks.gpu_memory", "folder", setting["model"], str(folder), line.device]
            subprocess.run(command, cwd=record.ROOT, check=True)
        words = ["benchmarks.gpu_memory", "steps", json.dumps({"setting": setting, "folder": str(folder)})]
        found = line.child(name_of(setting), words, 45.0)
        if found is None or "failed" in found:
            continue
        said = predict(setting, folder)
        rows.append({"setting": setting, **found, **said, "predicted_over_measured": said["predicted_bytes"] / found["measured_bytes"]})
    off = [abs(row["predicted_over_measured"] - 1) for row in rows]
    return int(line.finish(
        settings=len(rows), within_5_percent=sum(one <= ALLOWED for one in off), largest_difference=max(off, default=None), rows=rows,
    ))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    works = parser.add_subparsers(dest="work", required=True)
    folder = works.add_parser("folder")
    folder.add_argument("model", choices=list(SIZES))
    folder.add_argument("folder", type=Path)
    folder.add_argument("device")
    steps = works.add_parser("steps")
    steps.add_argument("wanted", type=json.loads)
    steps.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.work == "folder":
        write_folder(options.folder, options.model, options.device)
    else:
        options.out.write_text(json.dumps(measure(options.wanted)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
