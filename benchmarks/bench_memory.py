"""Predicted against measured peak memory on the CPU: methods, ranks, lengths, activation policies and model shapes, a process each.

    python -m benchmarks.bench_memory [--only NUMBER ...]      about ten minutes on two cores

Each process makes the model ready as `halfbyte train` does, forgets the peak so far (/proc/self/clear_refs), takes two optimizer steps
on rows of random tokens that all carry a label, and reports VmHWM.  Beside it stands what `halfbyte plan` says for the same setting,
with its one measured number (the program's own memory) and no other.  Models: the starter, and two with random weights whose
proportions are those of a wide and of a narrow, deep decoder.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.meter import status_bytes

MODELS: dict[str, dict[str, Any] | None] = {
    "starter": None,
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4},
    "deep": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 6, "num_key_value_heads": 6},
}
BASE: dict[str, Any] = {
    "model": "starter", "method": "qlora", "rank": 16, "tokens": 512, "rows": 4, "policy": "keep", "state": "float32", "dtype": "bfloat16",
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    {}, {"method": "lora"}, {"method": "full", "rows": 2}, {"dtype": "float32"}, {"method": "lora", "dtype": "float32"},
    {"rank": 4}, {"rank": 64}, {"rank": 256}, {"rank": 256, "state": "int8"}, {"method": "full", "rows": 2, "state": "int8"},
    {"tokens": 128}, {"tokens": 1024}, {"tokens": 2048, "rows": 1}, {"rows": 1}, {"rows": 8},
    {"policy": "recompute_mlp"}, {"policy": "recompute"}, {"policy": "recompute", "tokens": 2048, "rows": 2},
    {"model": "wide"}, {"model": "wide", "method": "lora", "tokens": 1024, "rows": 2}, {"model": "wide", "policy": "recompute"},
    {"model": "wide", "policy": "recompute_mlp"}, {"model": "deep"}, {"model": "deep", "policy": "recompute", "rows": 8},
]  # fmt: skip


def make_model(name: str, work: Path) -> str:
    """A folder with random weights; the starter by its name."""
    sizes = MODELS[name]
    if sizes is None:
        return "starter"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from halfbyte.models.source import resolve

    folder = work / name
    if not folder.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **sizes)).to(torch.bfloat16).save_pretrained(folder)
        starter = resolve("starter").folder
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((starter / file).read_bytes())
    return str(folder)


def measure(setting: dict[str, Any], folder: str) -> dict[str, Any]:
    """Two steps in this process, and the plan for them."""
    import torch

    from halfbyte.config.run import RunConfig
    from halfbyte.data.batches import collate
    from halfbyte.data.tokenize import Example
    from halfbyte.devices import FreedMemory
    from halfbyte.models.assemble import assemble
    from halfbyte.models.heads import head_of
    from halfbyte.models.recompute import use_policy
    from halfbyte.optim.adamw import AdamW
    from halfbyte.plan.hardware import PROGRAM_BYTES
    from halfbyte.plan.memory import plan_memory
    from halfbyte.plan.setting import Setting
    from halfbyte.shape import ModelShape
    from halfbyte.train.step import train_step

    torch.set_num_threads(2)
    config = RunConfig(
        method=setting["method"], data="-", model={"name": folder, "dtype": setting["dtype"]}, lora={"rank": setting["rank"]},
        optim={"state": setting["state"]},
    )  # fmt: skip
    made = assemble(config)
    use_policy(made.model, setting["policy"])
    trained = [parameter for parameter in made.model.parameters() if parameter.requires_grad]
    optimizer, head = AdamW([{"params": trained}], lr=1e-4, state=setting["state"]), head_of(made.model)
    loaded = status_bytes("VmRSS")
    FreedMemory()
    Path("/proc/self/clear_refs").write_text("5")
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        ids = torch.randint(0, 49152, (setting["rows"], setting["tokens"]), generator=generator).tolist()
        window = [collate([Example(row, row, number) for number, row in enumerate(ids)], pad_id=0)]
        train_step(made.model, head, window, optimizer, clip_norm=1.0)
    shape = ModelShape.read(made.source.folder)
    planned = Setting.of(
        config, dtype=setting["dtype"], tokens=setting["tokens"], micro_batch_size=setting["rows"], policy=setting["policy"], device="cpu"
    )
    memory = plan_memory(shape, planned, PROGRAM_BYTES["cpu"])
    terms = {term.name: term.bytes for term in memory.terms}
    return {
        "measured_bytes": status_bytes("VmHWM"), "loaded_bytes": loaded, "predicted_bytes": memory.total, "peak": memory.peak,
        "terms": terms,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--one", type=json.loads)
    options = parser.parse_args()
    if options.one is not None:
        print("result " + json.dumps(measure(options.one["setting"], options.one["folder"])))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number, change in enumerate(CHANGES):
            if options.only is not None and number not in options.only:
                continue
            setting = {**BASE, **change}
            one = json.dumps({"setting": setting, "folder": make_model(setting["model"], Path(name))})
            command = [sys.executable, "-m", "benchmarks.bench_memory", "--one", one]
            ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=record.ROOT)
            found = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("result ")).removeprefix("result "))
            ratio = found["predicted_bytes"] / found["measured_bytes"]
            rows.append({"setting": setting, **found, "predicted_over_measured": ratio})
            size = f"{found['measured_bytes'] / 2**20:7.0f} MiB"
            print(f"{number:>2} {change or 'base'!s:<60} measured {size}  predicted x {ratio:.3f}", flush=True)
    off = [abs(row["predicted_over_measured"] - 1) for row in rows]
    print(f"within 10 %: {sum(value <= 0.1 for value in off)} of {len(off)}; largest {max(off):.1%}")
    if options.only is None:
        print(record.write("memory", {"settings": rows, "within_10_percent": sum(value <= 0.1 for value in off)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
