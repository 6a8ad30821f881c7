"""What every process of the training benchmark starts from, written once into a folder: rows, batches, adapter, model folder.

    rows-<mode>.jsonl             token rows, one per document: what `halfbyte train` reads
    batches-<mode>.safetensors    input_ids, labels, position_ids (steps, rows, tokens): what it makes of them, and what all others read
    adapter/                      a PEFT adapter folder, B zero: the start of every arm
    inputs.json                   the settings of all this, and the counts (tokens: without padding, for each step)

A document is prompt + newline + completion + end token of `e2e_nlg`; for models of random weights, one row of random tokens.  Mode
`completion` trains on the completion and the end token, mode `all` on every token but a document's first.  The batches are what halfbyte's
own packing (best fit, 512 tokens a row) and order (seed 0) give, so ours and the peers see the same tokens in the same rows and steps.
Positions restart at each document; peers keep the documents of a row apart by them, as transformers does.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import record

MODES = ("completion", "all")
SEED = 0
TARGETS = "all-linear"


@dataclass(frozen=True)
class Settings:
    """The work of one benchmark; everything that has an influence on the numbers is here or in the arm's name."""

    model: str = "starter"
    documents: str = "e2e_nlg"
    rank: int = 16
    alpha: int = 32
    rows: int = 4
    tokens: int = 512
    windows: int = 24
    learning_rate: float = 1e-3
    clip_norm: float = 1.0


def random_documents(tokenizer: object, settings: Settings) -> list[tuple[list[int], int]]:
    """As many documents of random tokens as there are rows, each filling its row; a quarter of it is prompt."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(len(tokenizer), (settings.windows * settings.rows, settings.tokens), generator=generator)  # type: ignore[arg-type]
    return [(row, settings.tokens // 4) for row in drawn.tolist()]


def documents(tokenizer: object, wanted: int) -> list[tuple[list[int], int]]:
    """(tokens, how many of them are prompt) of rows spread over e2e_nlg, `wanted` tokens in all or a little more."""
    lines = (record.SHARED / "e2e_nlg" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    step, made, total = 7, [], 0  # neighbours in the file say the same: every seventh, then again from the second
    for number in (number for start in range(step) for number in range(start, len(lines), step)):
        row = json.loads(lines[number])
        prompt = tokenizer(row["prompt"] + "\n", add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        made.append(([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))  # type: ignore[attr-defined]
        total += len(made[-1][0])
        if total >= wanted:
            return made
    raise SystemExit(f"e2e_nlg has {total:,} tokens; {wanted:,} are wanted")


def write_rows(folder: Path, tokenizer: object, settings: Settings) -> None:
    """rows-<mode>.jsonl for both modes; a document longer than a row is left out."""
    if settings.documents == "random":
        found = random_documents(tokenizer, settings)
    else:
        found = documents(tokenizer, settings.windows * settings.rows * settings.tokens)
    found = [one for one in found if len(one[0]) <= settings.tokens]
    for mode in MODES:
        untrained = [prompt if mode == "completion" else 0 for _, prompt in found]
        lines = [json.dumps({"input_ids": ids, "labels": [-100] * skip + ids[skip:]}) for (ids, _), skip in zip(found, untrained)]
        (folder / f"rows-{mode}.jsonl").write_text("\n".join(lines) + "\n")


def train_settings(folder: Path, mode: str, settings: Settings, **more: object) -> dict[str, object]:
    """The settings of `halfbyte train` for these inputs, by dotted name."""
    return {
        "data.path": str(folder / f"rows-{mode}.jsonl"), "data.shape": "tokens", "data.packing": True, "data.max_tokens": settings.tokens,
        "data.eval_rows": 0, "train.seed": SEED, "train.micro_batch_size": settings.rows, "train.global_batch_size": settings.rows,
        "train.eval_every_steps": None, "train.save_every_steps": None, "train.sample_prompts": 0,
        "lora.rank": settings.rank, "lora.alpha": settings.alpha, "lora.targets": TARGETS,
        "optim.learning_rate": settings.learning_rate, "optim.schedule": "constant", "optim.warmup_share": 0.0,
        "optim.clip_norm": settings.clip_norm, **more,
    }  # fmt: skip


def write_batches(folder: Path, mode: str, tokenizer: object, settings: Settings) -> dict[str, object]:
    """batches-<mode>.safetensors: the windows `halfbyte train` will make of the rows; returns the counts."""
    import torch
    from safetensors.torch import save_file

    from halfbyte.config import load_config
    from halfbyte.data.batches import Batches
    from halfbyte.data.load import load_data
    from halfbyte.data.packing import pack

    config = load_config(None, flags={"out": str(folder / "unused"), **train_settings(folder, mode, settings)})
    data = load_data(config.data, tokenizer)
    items = pack(data.train, settings.tokens)
    pad = tokenizer.pad_token_id or 0  # type: ignore[attr-defined]
    batches = Batches(items, micro_batch_size=settings.rows, global_batch_size=settings.rows, seed=SEED, pad_id=pad)
    found = [batch for number, window in enumerate(batches.epoch(0)) for batch in window if number < settings.windows]
    found = [batch for batch in found if batch.input_ids.shape[0] == settings.rows]
    tensors: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(found):
        tensors[f"{number}.input_ids"], tensors[f"{number}.labels"] = batch.input_ids, batch.labels
        tensors[f"{number}.position_ids"], tensors[f"{number}.segment_ids"] = batch.positions, batch.segment_ids
    save_file(tensors, folder / f"batches-{mode}.safetensors")
    return {
        "windows": len(found), "documents": len(data.train), "packed_rows": len(items),
        "tokens": [int((batch.segment_ids >= 0).sum()) for batch in found], "places": [batch.input_ids.numel() for batch in found],
        "trained_tokens": [batch.trained_tokens for batch in found],
    }  # fmt: skip


def write_adapter(folder: Path, source: Path, settings: Settings) -> int:
    """adapter/: the start that halfbyte's seed 0 gives, in PEFT's format; returns the number of trained parameters."""
    import torch

    import halfbyte as hb
    from halfbyte.adapters.folder import save_adapter
    from halfbyte.config import LoraConfig
    from halfbyte.lora.inject import inject

    model, _ = hb.load(source, dtype="bfloat16")
    injected = inject(model, LoraConfig(rank=settings.rank, alpha=settings.alpha, targets=TARGETS), seed=SEED)
    with torch.no_grad():
        save_adapter(model, folder / "adapter", base_name=str(source), allow_untrained=True)
    return injected.trainable_params


def prepare(folder: Path, settings: Settings) -> dict[str, object]:
    """Write all of it once and return inputs.json; a folder made with other settings is refused."""
    done = folder / "inputs.json"
    if done.exists():
        found = json.loads(done.read_text())
        if found["settings"] != asdict(settings):
            raise SystemExit(f"{folder} was made with {found['settings']}; name another --work, or remove it")
        return found
    from halfbyte.models.load import load_tokenizer
    from halfbyte.models.source import resolve

    folder.mkdir(parents=True, exist_ok=True)
    source = resolve(settings.model)
    tokenizer = load_tokenizer(source)
    write_rows(folder, tokenizer, settings)
    counts = {mode: write_batches(folder, mode, tokenizer, settings) for mode in MODES}
    trained = write_adapter(folder, source.folder, settings)
    found = {"settings": asdict(settings), "model_folder": str(source.folder), "trained_parameters": trained, "counts": counts}
    done.write_text(json.dumps(found, indent=1) + "\n")
    return found
