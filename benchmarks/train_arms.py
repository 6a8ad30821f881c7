"""One arm of the training benchmark in this process: load, train some steps, write what was measured.

| arm                       | what it is                                                                                        |
|---------------------------|---------------------------------------------------------------------------------------------------|
| peft-{nf4,bf16,fp32}      | transformers + PEFT (+ bitsandbytes) in a plain loop, torch's fused AdamW, no checkpointing       |
| trl-{nf4,bf16,fp32}       | TRL's SFTTrainer with its defaults; only data, steps, batch, rate, schedule and threads are ours  |
| train-{nf4,bf16,fp32}     | what `halfbyte train` runs: the same settings object, the same loop, one more observer            |
| loop-{nf4,bf16,fp32}      | `hb.load`, `hb.inject`, `model(..., labels=...).loss` in a plain loop with halfbyte's AdamW       |
| unsloth-nf4, liger-nf4    | on a GPU only, in the same plain loop as peft                                                     |

A third word says what is kept for the backward pass where that is not the arm's default: `recompute` keeps each layer's input only, `keep`
everything; ours are those of `train.activations`.

bf16 and fp32 name the base; adapters are fp32 (TRL makes those of a 4-bit base bf16).  In nf4 the rest of the base is bf16, but float32
under TRL, which loads so by default and computes under bf16 autocast.  Positions restart at each document, no arm uses a cache.

    python -m benchmarks.train_arms ARM --work FOLDER --mode completion --steps 6 --threads 2 --out result.json
"""

import argparse
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import train_inputs
from benchmarks.meter import Meter

PRECISIONS = ("nf4", "bf16", "fp32")
DTYPES = {"nf4": "bfloat16", "bf16": "bfloat16", "fp32": "float32"}


class Job:
    """What an arm was asked for."""

    def __init__(self, work: Path, mode: str, precision: str, kept: str, steps: int, device: str) -> None:
        self.work, self.mode, self.precision, self.kept, self.steps, self.device = work, mode, precision, kept, steps, device
        self.inputs = json.loads((work / "inputs.json").read_text())
        self.settings = train_inputs.Settings(**self.inputs["settings"])
        self.model_folder = self.inputs["model_folder"]
        self.quantized = "quantization_config" in json.loads((Path(self.model_folder) / "config.json").read_text())
        self.notes: dict[str, object] = {}

    def batches(self) -> Iterator[dict[str, Any]]:
        """input_ids, labels, position_ids of each step, on the device."""
        from safetensors import safe_open

        with safe_open(self.work / f"batches-{self.mode}.safetensors", "pt") as file:
            for number in range(self.steps):
                names = ("input_ids", "labels", "position_ids")
                yield {name: file.get_tensor(f"{number}.{name}").to(self.device) for name in names}


def plain_loop(job: Job, meter: Meter, model: Any, optimizer: Any) -> None:
    """Forward with labels, backward, clip, update."""
    from torch.nn.utils import clip_grad_norm_

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    batches = list(job.batches())
    meter.begin()
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(trained, job.settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.step(loss.item())


def peft_model(job: Job, load: Any, dtype: str) -> Any:
    """The base through `load` with the adapter of the inputs, ready to train."""
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    settings: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if job.precision == "nf4" and not job.quantized:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = load(job.model_folder, **settings, **({} if job.device == "cpu" else {"device_map": {"": job.device}}))
    return PeftModel.from_pretrained(model, str(job.work / "adapter"), is_trainable=True)


def with_torch_adamw(job: Job, meter: Meter, model: Any) -> None:
    """The plain loop with torch's fused AdamW."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.settings.learning_rate, weight_decay=0.0, fused=True)
    job.notes["adapter_dtype"] = str(trained[0].dtype)
    plain_loop(job, meter, model, optimizer)


def peft(job: Job, meter: Meter) -> None:
    """transformers + PEFT, without checkpointing unless the arm says so."""
    from transformers import AutoModelForCausalLM

    model = peft_model(job, AutoModelForCausalLM.from_pretrained, DTYPES[job.precision])
    if job.kept == "recompute":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with_torch_adamw(job, meter, model)


def liger(job: Job, meter: Meter) -> None:
    """PEFT over Liger's kernels and its fused head and loss."""
    from liger_kernel.transformers import AutoLigerKernelForCausalLM

    with_torch_adamw(job, meter, peft_model(job, AutoLigerKernelForCausalLM.from_pretrained, DTYPES[job.precision]))


def unsloth(job: Job, meter: Meter) -> None:
    """Unsloth with its default checkpointing, or with none; bf16 autocast, as its trainer sets it."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from unsloth import FastLanguageModel

    settings = job.settings
    kept: object = False if job.kept == "keep" else "unsloth"
    model, _ = FastLanguageModel.from_pretrained(
        job.model_folder, max_seq_length=settings.tokens, dtype=torch.bfloat16, load_in_4bit=True, use_gradient_checkpointing=kept
    )
    named = json.loads((job.work / "adapter" / "adapter_config.json").read_text())["target_modules"]
    model = FastLanguageModel.get_peft_model(
        model, r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0, bias="none", use_gradient_checkpointing=kept,
        target_modules=sorted({name.split(".")[-1] for name in named}), random_state=train_inputs.SEED,
    )  # fmt: skip
    set_peft_model_state_dict(model, load_file(job.work / "adapter" / "adapter_model.safetensors"))
    with torch.autocast("cuda", torch.bfloat16):
        with_torch_adamw(job, meter, model)


def trl(job: Job, meter: Meter) -> None:
    """SFTTrainer with its defaults, the batches ready made."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.utils import create_model_from_path

    model = peft_model(job, create_model_from_path, "bfloat16" if job.precision == "bf16" else "float32")
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for batch in job.batches():
        for name, held in rows.items():
            held += batch[name].tolist()
    config = SFTConfig(
        str(job.work / "trl"), max_steps=job.steps, per_device_train_batch_size=job.settings.rows, learning_rate=job.settings.learning_rate,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=job.device == "cpu", remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        data_seed=train_inputs.SEED, **({"gradient_checkpointing": False} if job.kept == "keep" else {}),
    )  # fmt: skip

    class Told(TrainerCallback):
        """Tells the meter where the steps are."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 0:
                meter.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            meter.step(trainer.last_loss.item())

    class Trainer(SFTTrainer):
        """Keeps the loss of each step."""

        last_loss: Any = None

        def training_step(self, *arguments: Any, **more: Any) -> Any:
            self.last_loss = super().training_step(*arguments, **more)
            return self.last_loss

    def collate(items: list[dict[str, list[int]]]) -> dict[str, Any]:
        return {name: torch.tensor([item[name] for item in items]) for name in items[0]}

    trainer = Trainer(
        model, args=config, data_collator=collate, train_dataset=Dataset.from_dict(rows), callbacks=[Told()],
        processing_class=AutoTokenizer.from_pretrained(job.model_folder),
    )  # fmt: skip
    asked = ("gradient_checkpointing", "bf16", "optim", "max_grad_norm", "weight_decay", "loss_type", "activation_offloading")
    trained = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    job.notes |= {name: str(getattr(config, name)) for name in asked}
    job.notes |= {"adapter_dtype": str(trained.dtype), "embedding_dtype": str(model.get_input_embeddings().weight.dtype)}
    trainer.train()


def same_start(job: Job, model: Any) -> None:
    """The seed gave the adapter that the peers read from the folder."""
    import torch

    from halfbyte.formats import peft as peft_format
    from halfbyte.lora.tensors import adapter_tensors

    wanted = peft_format.read(job.work / "adapter", allow_untrained=True).tensors
    found = adapter_tensors(model)
    if wanted.keys() != found.keys() or not all(torch.equal(wanted[name].cpu(), found[name].detach().cpu()) for name in wanted):
        raise SystemExit("this arm does not start from the adapter of the inputs")


def loop(job: Job, meter: Meter) -> None:
    """halfbyte as a library, in somebody's own loop."""
    import halfbyte as hb
    from halfbyte.models.recompute import use_policy
    from halfbyte.optim.adamw import AdamW

    settings = job.settings
    quant = "nf4" if job.precision == "nf4" and not job.quantized else None
    model, _ = hb.load(job.model_folder, quant=quant, dtype=DTYPES[job.precision])
    model.to(job.device)
    hb.inject(model, seed=train_inputs.SEED, rank=settings.rank, alpha=settings.alpha, targets=train_inputs.TARGETS)
    same_start(job, model)
    use_policy(model, job.kept or "keep")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    job.notes["adapter_dtype"] = str(trained[0].dtype)
    plain_loop(job, meter, model, AdamW(trained, lr=settings.learning_rate))


def train(job: Job, meter: Meter) -> None:
    """`halfbyte train`, watched by one more observer."""
    from halfbyte.config import load_config
    from halfbyte.train.console import for_this_terminal
    from halfbyte.train.from_config import prepare, train_prepared

    class Watch:
        """An observer that tells the meter where the steps are."""

        def started(self, header: Any) -> None:
            meter.begin()

        def stepped(self, record: dict[str, Any]) -> None:
            meter.step(record["loss"])

        def evaluated(self, record: dict[str, Any]) -> None: ...

        def noted(self, text: str) -> None: ...

        def finished(self, summary: dict[str, Any]) -> None: ...

    out = job.work / "runs" / "-".join(filter(None, (job.precision, job.mode, job.kept)))
    shutil.rmtree(out, ignore_errors=True)
    asked = {
        "model.name": job.model_folder, "method": "qlora" if job.precision == "nf4" else "lora", "out": str(out),
        "model.dtype": DTYPES[job.precision], "train.max_steps": job.steps, "train.threads": threads(),
        "train.activations": job.kept or "keep", **train_inputs.train_settings(job.work, job.mode, job.settings),
    }  # fmt: skip
    prepared = prepare(load_config(None, flags=asked))
    same_start(job, prepared.assembled.model)
    prepared.assembled.model.to(job.device)
    train_prepared(prepared, observers=[for_this_terminal(), Watch()])


def threads() -> int:
    """Threads that torch computes with."""
    import torch

    return torch.get_num_threads()


KINDS = {"peft": peft, "trl": trl, "train": train, "loop": loop, "unsloth": unsloth, "liger": liger}
ARMS = tuple(f"{kind}-{precision}" for precision in PRECISIONS for kind in ("peft", "trl", "train", "loop"))


def run(arm: str, work: Path, mode: str, steps: int, device: str) -> dict[str, object]:
    """One arm here and now."""
    meter = Meter(device, steps)
    kind, precision, *kept = arm.split("-")
    job = Job(work, mode, precision, *(kept or [""]), steps, device)
    KINDS[kind](job, meter)
    return {"arm": arm, "mode": mode, "steps": steps, "threads": threads(), **meter.result(), "notes": job.notes}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("arm")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mode", choices=train_inputs.MODES, default="completion")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(train_inputs.SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        found = run(options.arm, options.work, options.mode, options.steps, options.device)
    fresh = options.out.with_suffix(".new")
    fresh.write_text(json.dumps(found, indent=1) + "\n")
    fresh.replace(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
