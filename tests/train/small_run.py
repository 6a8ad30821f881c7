"""A real run made small: a random Llama of two layers saved to a folder, 22 rows, the real loop; and the comparison of two runs.

A run is stopped inside this process by the fault kind "stop": an exception that nothing on the way catches, after which everything of
the run is thrown away and the next `go` builds model, data and optimizer anew, with other random numbers around, as a new process would.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from halfbyte.config.run import RunConfig
from halfbyte.data.load import TrainData, load_data
from halfbyte.errors import Interrupted
from halfbyte.models.assemble import assemble
from halfbyte.models.load import load_tokenizer
from halfbyte.models.source import resolve
from halfbyte.train import checkpoint, faults, loop, metrics
from halfbyte.train.saver import Saver
from halfbyte.train.state import TrainState

ROWS, HELD_OUT, VOCABULARY = 22, 4, 64
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "data": {"workers": 0, "packing": False}},
    "lora, packed, 2 workers": {"method": "lora", "data": {"workers": 2, "packing": True}},
    "qlora, packed, 8-bit state": {"method": "qlora", "data": {"workers": 0, "packing": True}, "optim": {"state": "int8"}},
    "full, 2 workers": {"method": "full", "data": {"workers": 2, "packing": False}},
}


def write_model(folder: Path) -> None:
    """A Llama with random weights and attention dropout, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
        max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_dropout=0.1,
    )).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
    tokenizer.save_pretrained(folder)


def write_rows(path: Path) -> None:
    """Token rows of 6 to 16 tokens, the first third without a label."""
    rng = random.Random(3)
    with path.open("w") as file:
        for _ in range(ROWS):
            ids = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(5, 15))] + [2]
            cut = len(ids) // 3
            file.write(json.dumps({"input_ids": ids, "labels": [-100] * cut + ids[cut:]}) + "\n")


@dataclass
class Stage:
    """A folder with a model and rows, and the settings of one kind of run; `changes` are by name, e.g. {"lora.rank": 8}."""

    root: Path
    kind: str = "lora"
    changes: dict[str, Any] = field(default_factory=dict)

    def prepare(self) -> "Stage":
        """Write model and rows once."""
        if not (self.root / "rows.jsonl").exists():
            self.root.mkdir(parents=True, exist_ok=True)
            write_model(self.root / "model")
            write_rows(self.root / "rows.jsonl")
        return self

    def config(self, out: Path) -> RunConfig:
        """10 to 12 steps of windows of two micro-batches; evaluation and saving at different steps."""
        kind = KINDS[self.kind]
        packing = kind["data"]["packing"]
        train = {
            "epochs": 3 if packing else 2, "micro_batch_size": 1 if packing else 2, "global_batch_size": 2 if packing else 4,
            "eval_every_steps": 3, "save_every_steps": 2, "sample_prompts": 0, "threads": 1, "seed": 5,
        }
        settings: dict[str, Any] = {
            "method": kind["method"], "out": str(out), "model": {"name": str(self.root / "model")},
            "lora": {} if kind["method"] == "full" else {"rank": 4, "dropout": 0.1},
            "data": {"path": str(self.root / "rows.jsonl"), "eval_rows": HELD_OUT, "max_tokens": 32, **kind["data"]},
            "optim": {"learning_rate": 0.01, **kind.get("optim", {})}, "train": train,
        }
        for name, value in self.changes.items():
            group, key = name.split(".")
            settings[group][key] = value
        return RunConfig.model_validate(settings)

    def data(self, config: RunConfig) -> TrainData:
        """The rows as examples."""
        return load_data(config.data, load_tokenizer(resolve(config.model.name)))


class Drawer:
    """An observer that draws from python's and numpy's global generators at each step, so that losing their state shows."""

    def __init__(self) -> None:
        self.draws: dict[int, tuple[float, float, float]] = {}

    def started(self, header: object) -> None:
        """See Observer."""

    def stepped(self, record: dict[str, Any]) -> None:
        """Draw."""
        self.draws[record["step"]] = (random.random(), random.gauss(0, 1), float(numpy.random.random()))

    def evaluated(self, record: dict[str, Any]) -> None:
        """See Observer."""

    def noted(self, text: str) -> None:
        """See Observer."""

    def finished(self, summary: dict[str, Any]) -> None:
        """See Observer."""


@dataclass
class Outcome:
    """What two equal runs have in common: the last checkpoint, the log without times, the draws, the delivered files' hashes."""

    state: TrainState
    log: list[dict[str, Any]]
    draws: dict[int, tuple[float, float, float]]
    delivered: dict[str, str]
    progress: dict[int, dict[str, object]]


def scramble() -> None:
    """The generators as some other process would have them."""
    random.seed(987)
    numpy.random.seed(654)
    torch.manual_seed(321)


def watch_saves(patch: Any) -> dict[int, dict[str, object]]:
    """The progress of each save that the runs under `patch` make, by step, without the offset (times differ in length)."""
    seen: dict[int, dict[str, object]] = {}
    real = Saver.save

    def save(self: Saver, state: TrainState) -> Path | None:
        seen[state.progress.step] = {k: v for k, v in state.progress.to_json().items() if k != "metrics_offset"}
        return real(self, state)

    patch.setattr(Saver, "save", save)
    return seen


def go(stage: Stage, out: Path, drawer: Drawer, *, resume: bool = False) -> None:
    """One process's share of a run, from nothing but its files."""
    config = stage.config(out)
    scramble()
    loop.run(config, assemble(config), stage.data(config), resume=resume, observers=[drawer])


def clear_faults(patch: Any) -> None:
    """No faults from here on; passing a point lets the counts of the old ones be forgotten."""
    patch.setenv("HALFBYTE_FAULTS", "")
    faults.point("train.micro_batch")


def go_until(stage: Stage, out: Path, drawer: Drawer, fault: str, patch: Any, *, resume: bool = False) -> bool:
    """Run with a fault; True when it struck, False when the run came to its end."""
    patch.setenv("HALFBYTE_FAULTS", fault)
    try:
        go(stage, out, drawer, resume=resume)
    except (faults.FaultStop, Interrupted):
        return True
    finally:
        clear_faults(patch)
    return False


def go_on(stage: Stage, out: Path, drawer: Drawer) -> int:
    """Resume, or start anew where nothing was saved yet; the step it went on from."""
    valid = checkpoint.scan(out / "checkpoints").valid
    if not valid:
        shutil.rmtree(out)
    go(stage, out, drawer, resume=bool(valid))
    return valid[0].step if valid else 0


def outcome(out: Path, drawer: Drawer, progress: dict[int, dict[str, object]]) -> Outcome:
    """What the run in `out` reached."""
    log = [{k: v for k, v in record.items() if k not in metrics.TIME_FIELDS} for record in metrics.read(out / "metrics.jsonl")]
    files = [path for name in ("adapter", "model") for path in (out / name).glob("*.safetensors")]
    delivered = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return Outcome(checkpoint.load_newest(out / "checkpoints").state, log, drawer.draws, delivered, dict(progress))


def differences(one: Outcome, two: Outcome) -> list[str]:
    """Names of what is not equal to the bit."""
    found = []
    for group in ("trainables", "optimizer", "rng"):
        mine, theirs = getattr(one.state, group), getattr(two.state, group)
        found += [f"{group} {name}" for name in sorted(mine.keys() | theirs.keys()) if not _same(mine.get(name), theirs.get(name))]
    for step in sorted(one.progress.keys() & two.progress.keys()):
        mine, theirs = one.progress[step], two.progress[step]
        found += [f"progress {name} at step {step}" for name in mine if repr(mine[name]) != repr(theirs.get(name))]
    found += [f"log line {n}" for n, (a, b) in enumerate(zip(one.log, two.log), 1) if repr(a) != repr(b)]
    found += [f"{len(one.log)} and {len(two.log)} log lines"] if len(one.log) != len(two.log) else []
    found += ["draws"] if one.draws != two.draws else []
    found += ["delivered files"] if one.delivered != two.delivered or not one.delivered else []
    return found


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    return one is not None and two is not None and one.dtype == two.dtype and torch.equal(one, two)


def rewrite(out: Path, change: Callable[[TrainState], None]) -> None:
    """Put a changed copy of the newest checkpoint in its place."""
    newest = checkpoint.load_newest(out / "checkpoints")
    change(newest.state)
    shutil.rmtree(newest.path)
    if newest.state.progress.step < checkpoint.load_newest(out / "checkpoints").state.progress.step:
        shutil.rmtree(out / "checkpoints")
    checkpoint.save(out / "checkpoints", newest.state)
