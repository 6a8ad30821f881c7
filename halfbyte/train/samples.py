"""A few held-out prompts and the model's answers before and after the training, for the report: samples.json.

    [{"prompt": ..., "reference": ..., "before": ..., "after": ...}, ...]

A prompt is what stands before a row's first trained token; of a row that is trained from its start it is the first half.
Answers are greedy and draw no random number, so a run with and without samples trains alike.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from halfbyte.data.tokenize import IGNORED, Example
from halfbyte.models.generate import generate

if TYPE_CHECKING:
    from halfbyte.train.training import Training

LONGEST_ANSWER = 128


def pick(items: Sequence[Any], count: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, reference ids) of `count` items spread over all; packed rows and classes have no prompt and are passed over."""
    usable = [item for item in items if isinstance(item, Example) and item.label is None and len(item.input_ids) > 1]
    if not usable or count == 0:
        return []
    step = max(1, len(usable) // count)
    return [_cut(item) for item in usable[::step][:count]]


def _cut(item: Example) -> tuple[list[int], list[int]]:
    trained = [index for index, label in enumerate(item.labels) if label != IGNORED and index > 0]
    first = trained[0] if trained and trained[0] > 1 else max(1, len(item.input_ids) // 2)
    return item.input_ids[:first], item.input_ids[first:]


def answers(training: "Training") -> list[dict[str, str]]:
    """Prompt, reference and the model's answer now, for each picked row."""
    tokenizer = training.assembled.tokenizer
    picked = pick(training.data.eval or training.data.train, training.config.train.sample_prompts)
    if not picked:
        return []
    longest = min(LONGEST_ANSWER, max(len(reference) for _, reference in picked) + 8)
    found = generate(training.model, tokenizer, [prompt for prompt, _ in picked], max_new_tokens=longest, take_over=False)

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return [{"prompt": text(prompt), "reference": text(reference), "answer": answer} for (prompt, reference), answer in zip(picked, found)]


def write_before(training: "Training") -> None:
    """samples.json with the answers of the model as it came."""
    rows = [{"prompt": row["prompt"], "reference": row["reference"], "before": row["answer"]} for row in answers(training)]
    if rows:
        training.folder.write_json(training.folder.samples, rows)


def write_after(training: "Training") -> None:
    """The same file with the answers of the trained model added."""
    path = training.folder.samples
    if path.exists():
        rows = json.loads(path.read_text())
        for row, now in zip(rows, answers(training)):
            row["after"] = now["answer"]
        training.folder.write_json(path, rows)
