"""Judge one finished run of a study in a process of its own: `python -m halfbyte.studies.judge ORDER.json ANSWER.json`.

ORDER    {"run", "threads", "general": file or null, "before": bool, "held_out": file, "samples": count,
          "score": {"metric", "rows", "max_new_tokens"} or null}
ANSWER   general_after, general_rows, general_left_out; general_before where it was asked for; score, score_rows;
         answers [{"prompt", "reference", "answer"}], or no_answers: why; asked_left_out, asked_short: rows over the model's limit,
         answers that it cut

General text is judged before and after: before is the model as this setting's training began, its base as stored and, on a calibrated base,
the low-rank start, so the difference is what the training did, not what storage or start did.  A classifier writes no text and is judged
by its labels alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

from halfbyte import devices, redact
from halfbyte.config import load_config
from halfbyte.errors import DataError, HalfbyteError
from halfbyte.evaluate.generation import score
from halfbyte.evaluate.opened import Opened, open_model
from halfbyte.evaluate.rows import answer_rows, evaluate_rows
from halfbyte.models.calibrated_base import START
from halfbyte.studies.runs import write_json
from halfbyte.train.run_folder import RunFolder

SAMPLE_TOKENS = 96
NO_PROMPTS = "E-DATA-082"


def judged(order: dict[str, Any]) -> dict[str, Any]:
    """The answer to an order; see the top of this module."""
    run = Path(order["run"])
    devices.set_threads(int(order["threads"]))
    opened = open_model(run)
    if opened.labels:
        seen = evaluate_rows(opened, order["held_out"]) if order["score"] else {}
        return {"score": seen["accuracy"], "score_rows": seen["rows"], "asked_left_out": seen.get("rows_left_out", 0)} if seen else {}
    found = _answers(opened, order)
    if order["general"]:
        seen = evaluate_rows(opened, order["general"], own_columns=False)
        found |= {"general_after": float(seen["loss"]), "general_rows": seen["rows"], "general_left_out": seen.get("rows_left_out", 0)}
        if order["before"] and (begun := _untrained(opened, run)) is not None:
            found["general_before"] = float(evaluate_rows(begun, order["general"], own_columns=False)["loss"])
    return found


def _answers(opened: Opened, order: dict[str, Any]) -> dict[str, Any]:
    """Scores of the model's own answers, and the first of these to look at; nothing for rows without prompts and no score asked for."""
    wanted = order["score"]
    count = max(order["samples"], wanted["rows"] if wanted else 0)
    if count == 0:
        return {}
    tokens = wanted["max_new_tokens"] if wanted else SAMPLE_TOKENS
    try:
        answered = answer_rows(opened, order["held_out"], max_rows=count, max_new_tokens=tokens, to_limit=True)
    except DataError as fault:
        if wanted:
            raise
        return {} if fault.code == NO_PROMPTS else {"no_answers": fault.found}
    rows = zip(answered.prompts, answered.references, answered.answers, strict=True)
    found: dict[str, Any] = {"answers": [{"prompt": p, "reference": r, "answer": a} for p, r, a in list(rows)[: order["samples"]]]}
    found |= {"asked_left_out": answered.left_out, "asked_short": answered.short}
    if wanted:
        rows_scored = wanted["rows"]
        found["score_rows"] = min(rows_scored, len(answered.answers))
        found["score"] = score(answered.answers[:rows_scored], answered.references[:rows_scored], [wanted["metric"]])[wanted["metric"]]
    return found


def _untrained(opened: Opened, run: Path) -> Opened | None:
    """The model as this run's training began; None after init loftq, whose start is made of dense weights that are not here any more."""
    config = load_config(RunFolder(run).config)
    if opened.located.adapter is None:
        return open_model(
            config.model.name, revision=config.model.revision, dtype=config.model.dtype, template=config.model.template,
            allow_download=config.model.allow_download,
        )  # fmt: skip
    if config.lora.init == "loftq":
        return None
    opened.activate(str(opened.source.folder / START) if config.lora.init == "calibrated" else None)
    return opened


def main(arguments: list[str]) -> int:
    """Read the order, write the answer; the border of this process, where an error becomes text and an exit code."""
    order, answer = (Path(argument) for argument in arguments)
    try:
        write_json(answer, judged(json.loads(order.read_text(encoding="utf-8"))))
    except HalfbyteError as error:
        print(redact.terminal(redact.secrets(error.text())), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
