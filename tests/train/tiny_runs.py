"""Small runs for the tests of training: a random Llama with adapters, random rows, a tokenizer of numbers."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from halfbyte.config import RunConfig
from halfbyte.config.lora import LoraConfig
from halfbyte.data.batches import Batch, collate
from halfbyte.data.load import TrainData
from halfbyte.data.tokenize import DataReport, Example
from halfbyte.lora.inject import inject, total_parameters, updates
from halfbyte.models.assemble import Assembled, weight_bytes
from halfbyte.surgery import trainable

VOCABULARY = 512


class NumberTokenizer:
    """Token 7 is written "t7"; enough of a tokenizer for the loop."""

    pad_token_id, eos_token_id, chat_template = 0, 2, None
    backend_tokenizer = SimpleNamespace(to_str=lambda: "numbers")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(f"t{number}" for number in ids if not (skip_special_tokens and number in (0, 2)))

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "tokenizer.json").write_text("{}")


def examples(lengths: Sequence[int], *, seed: int = 0, untrained: float = 0.4, vocabulary: int = VOCABULARY) -> list[Example]:
    """Rows of random tokens that end with token 2; about the first `untrained` share has no label.  Rows of length 1 train nothing."""
    rng = random.Random(seed)
    made = []
    for row, length in enumerate(lengths):
        ids = [rng.randrange(3, vocabulary) for _ in range(length - 1)] + [2]
        first = max(1, int(length * untrained * rng.uniform(0.2, 1.8))) if length > 1 else 1
        made.append(Example(ids, [-100] * min(first, length - 1 or 1) + ids[min(first, length - 1 or 1):], row, f"rows line {row + 1}"))
    return made


def uneven(count: int, *, seed: int = 0, longest: int = 24) -> list[Example]:
    """`count` rows of very different lengths."""
    rng = random.Random(seed)
    return examples([rng.randrange(2, longest + 1) for _ in range(count)], seed=seed)


def classes(count: int, labels: int = 3, seed: int = 0) -> list[Example]:
    """Rows whose class is written in their last token."""
    rng = random.Random(seed)
    made = []
    for row in range(count):
        label = rng.randrange(labels)
        ids = [rng.randrange(20, VOCABULARY) for _ in range(rng.randrange(2, 12))] + [10 + label]
        made.append(Example(ids, [-100] * len(ids), row, f"rows line {row + 1}", label))
    return made


def window(items: Sequence[Example], micro: int) -> list[Batch]:
    """All items as one optimizer step of micro-batches."""
    return [collate(items[start : start + micro], 0) for start in range(0, len(items), micro)]


def adapted(model: nn.Module, *, awake: bool = True, **settings: Any) -> nn.Module:
    """The model with adapters; `awake` gives lora_b a start other than zero, so that every factor has a gradient."""
    inject(model, LoraConfig(**{"rank": 4, "alpha": 8.0, **settings}), seed=1)
    if awake:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for update in updates(model).values():
                update.lora_b.copy_(torch.randn(update.lora_b.shape, generator=generator) * 0.05)
    return model


def assembled(model: nn.Module, name: str = "tiny") -> Assembled:
    """What `assemble` would give for a model that is already adapted (or not: then all of it trains)."""
    injected = SimpleNamespace(names=tuple(updates(model))) if updates(model) else None
    if injected is None:
        model.requires_grad_(True)
    trained = sum(parameter.numel() for _, parameter in trainable(model))
    source = SimpleNamespace(name=name, digest="digest-of-" + name, weights="weights-of-" + name, kind="folder", folder=Path("nowhere"))
    return Assembled(model, NumberTokenizer(), source, injected, trained, total_parameters(model), weight_bytes(model))  # type: ignore[arg-type]


def data(train: list[Example], held_out: Sequence[Example] = (), max_tokens: int = 64) -> TrainData:
    """Rows as `load_data` would give them."""
    report = DataReport(
        rows=len(train), kept=len(train), dropped={}, cut=0, tokens=sum(len(one.input_ids) for one in train), trained_tokens=0,
        tokens_dropped=0, longest=max(len(one.input_ids) for one in train), longest_place="", max_tokens=max_tokens,
        stop_token_text="t2", stop_token_id=2,
    )
    return TrainData(list(train), list(held_out), report, f"digest of {len(train)}", SimpleNamespace(name="tokens"))  # type: ignore[arg-type]


def config(out: Path, **settings: Any) -> RunConfig:
    """Settings of a small, quick run: "train.max_steps": 4 style keys override."""
    values: dict[str, Any] = {
        "method": "lora", "out": str(out), "data": {"path": "rows.jsonl"},
        "lora": {"rank": 4, "alpha": 8.0}, "optim": {"learning_rate": 1e-2, "warmup_steps": 0},
        "train": {
            "global_batch_size": 4, "micro_batch_size": 2, "eval_every_steps": 2, "save_every_steps": 2, "sample_prompts": 0, "threads": 1,
        },
    }
    if settings.get("method") == "full":
        del values["lora"]
    if settings.get("model.task") == "sequence-classification":
        del values["train"]["sample_prompts"]
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        target = values.setdefault(group, {}) if group else values
        target[name] = value
    return RunConfig.model_validate(values)


class Quiet:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.header: Any = None
        self.summary: dict[str, Any] = {}
        self.on_step: Callable[[dict[str, Any]], None] = lambda record: None

    def started(self, header: Any) -> None:
        self.header = header

    def stepped(self, record: dict[str, Any]) -> None:
        self.steps.append(record)
        self.on_step(record)

    def evaluated(self, record: dict[str, Any]) -> None:
        self.evaluations.append(record)

    def noted(self, text: str) -> None:
        self.notes.append(text)

    def finished(self, summary: dict[str, Any]) -> None:
        self.summary = summary
