"""From the outcomes of a comparison to its numbers: one plain dictionary that the text, the JSON, the CSV and the page are made of.

| value                          | over the seeds                                                                   |
|--------------------------------|----------------------------------------------------------------------------------|
| held-out loss, general text    | mean and sample standard deviation                                               |
| held-out loss against the      | ratio of the means - 1; half width of the 95 % interval of seed against the same |
| reference                      | seed, which leaves out what a seed does to both                                  |
| task score                     | mean and half width of its 95 % confidence interval (Student's t)                |
| time, tokens per second        | mean                                                                             |
| peak memory                    | largest                                                                          |
| steps to the target's loss     | mean of seed against the same seed; straight lines between evaluations: estimate |

The reference is the setting named full, else the first; the target the one named qlora, else none.
"""

from collections.abc import Sequence
from typing import Any

from halfbyte import devices
from halfbyte.config.rules import value_at
from halfbyte.studies import judging
from halfbyte.studies.compare import Outcome, Results
from halfbyte.studies.measures import interval, mean, mean_curve, spread, steps_to_reach
from halfbyte.units import loss_is_per

FORMAT = "halfbyte comparison 1"
REFERENCE, TARGET = "full", "qlora"
DRAWN = ("default", "gaussian")
"""Values of lora.init whose factors are drawn with the seed; the others are computed from the weights, or read."""
TIMED = ("seconds", "tokens_per_second", "peak_memory_bytes", "preparation_seconds", "preparation_peak_memory_bytes", "machine")
"""What differs between two equal studies."""


def numbers(results: Results) -> dict[str, Any]:
    """The whole comparison as plain values for JSON."""
    finished = [one for one in results.outcomes if one.status == "finished"]
    names = [one.arm.name for one in finished]
    reference = REFERENCE if REFERENCE in names else (names[0] if names else None)
    target = TARGET if TARGET in names else None
    by_name = {one.arm.name: one for one in finished}
    arms = [_arm(one, by_name.get(reference or ""), by_name.get(target or "")) for one in results.outcomes]
    return {
        "format": FORMAT, "setting": _setting(results, finished), "reference": reference, "target": target, "arms": arms,
        "samples": _samples(finished),
    }  # fmt: skip


def without_times(values: Any) -> Any:
    """The same without what two equal studies measure differently: times, speeds, peak memory, the machine's state."""
    if isinstance(values, dict):
        return {key: without_times(value) for key, value in values.items() if key not in TIMED}
    return [without_times(value) for value in values] if isinstance(values, list) else values


def _setting(results: Results, finished: Sequence[Outcome]) -> dict[str, Any]:
    """What all arms share, and what the numbers rest on."""
    study, config = results.study, results.study.arms[0].config
    first = finished[0].runs[0] if finished else {}
    machine, swept = first.get("machine", {}), results.rows["sweep-train"] if study.sweep_rows else 0

    def common(key: str) -> Any:
        """What all settings have; None where they differ, which the words of each setting tell."""
        values = [value_at(arm.config, key) for arm in study.arms]
        return values[0] if all(value == values[0] for value in values) else None

    return {
        "model": config.model.name, "data": results.rows["source"], "train_rows": first.get("train_rows", results.rows["train"]),
        "held_out_rows": first.get("eval_rows", results.rows["held-out"]), "rows_sha256": results.rows["digest"],
        "global_batch_size": common("train.global_batch_size"), "packing": common("data.packing"),
        "max_tokens": first.get("max_tokens", common("data.max_tokens")),
        "schedule": common("optim.schedule"), "seeds": [config.train.seed + seed for seed in range(study.seeds)],
        "sweep_rows": max((one.sweep["rows"] for one in results.outcomes if one.sweep), default=swept),
        "sweep_held_out_rows": results.rows["sweep-held-out"],
        "sweep_rows_apart": results.rows["sweep_apart"], "general_text": results.general,
        "score": _score_setting(results), "per": loss_is_per(config.model.task),
        "threads": first.get("threads"), "jobs": max([study.jobs, *(run["jobs"] for one in finished for run in one.runs)]),
        "versions": devices.versions(),
        "machine": {key: machine[key] for key in ("cpu", "cores", "memory_bytes") if key in machine}, "notes": _notes(finished),
    }  # fmt: skip


def _notes(finished: Sequence[Outcome]) -> list[str]:
    """What the runs said of their rows, and the judging of its own; the same for all runs, so once."""
    said = [f"Rows: {note}." for one in finished for run in one.runs for note in run.get("data_notes", ())]
    return list(dict.fromkeys([*said, *judging.notes([judged for one in finished for judged in one.judged])]))


def _score_setting(results: Results) -> dict[str, Any] | None:
    """What the task score is and on how many rows; a classifier's is always the accuracy on all held-out rows (judge.py)."""
    score = results.study.score
    if score is None:
        return None
    judged = [rows for one in results.outcomes for each in one.judged if (rows := each.get("score_rows")) is not None]
    held_out = min(judged, default=results.rows["held-out"])
    if results.study.arms[0].config.model.task == "sequence-classification":
        return {"metric": "accuracy", "rows": held_out, "max_new_tokens": 0}
    return {"metric": score.metric, "rows": min(score.rows, held_out), "max_new_tokens": score.max_new_tokens}


def _arm(one: Outcome, reference: Outcome | None, target: Outcome | None) -> dict[str, Any]:
    """One setting: its own settings, its sweep, each seed, and the values of the table."""
    values = _values(one, reference, target) if one.status == "finished" else {}
    return {
        "name": one.arm.name, "method": one.arm.config.method, "own": one.arm.own, "status": one.status, "error": one.error,
        "values": values, "sweep": one.sweep, "curve": mean_curve([run["curve"] for run in one.runs]) if values else [],
        "shared_start": _shares_start(one), "seeds": [_seed(run, judged) for run, judged in zip(one.runs, one.judged)],
    }  # fmt: skip


def _seed(run: dict[str, Any], judged: dict[str, Any]) -> dict[str, Any]:
    kept = ("rate", "steps", "seconds", "tokens", "tokens_per_second", "peak_memory_bytes", "first_eval_loss", "last_eval_loss", "curve")
    return {key: run.get(key) for key in kept} | {key: judged[key] for key in ("score", "general_after") if key in judged}


def _values(one: Outcome, reference: Outcome | None, target: Outcome | None) -> dict[str, Any]:
    """The table's values of a finished setting; None where there is nothing to say."""
    runs, first = one.runs, one.runs[0]
    losses = [run["last_eval_loss"] for run in runs]
    scores = [judged["score"] for judged in one.judged if "score" in judged]
    general = [judged["general_after"] for judged in one.judged if "general_after" in judged]
    before = one.judged[0].get("general_before")
    reached = _reached(one, target)
    return {
        "rate": first["rate"], "steps": first["steps"], "micro_batch_size": first.get("micro_batch_size"),
        "trainable_params": first["trainable_params"], "trainable_share": first["trainable_share"],
        "weight_bytes": first["weight_bytes"], "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "seconds": mean([run["seconds"] for run in runs]), "tokens_per_second": mean([run["tokens_per_second"] for run in runs]),
        "preparation_seconds": one.base["seconds"] if one.base else None,
        "preparation_peak_memory_bytes": one.base["peak_memory_bytes"] if one.base else None,
        "eval_loss": mean(losses), "eval_loss_spread": spread(losses),
        **_against(losses, [run["last_eval_loss"] for run in reference.runs] if reference and reference is not one else None),
        "score": mean(scores) if scores else None, "score_interval": interval(scores),
        "adapter_bytes": first.get("adapter_bytes"), "model_bytes": first.get("model_bytes"),
        "general_before": before, "general_after": mean(general) if general else None, "general_spread": spread(general),
        "forgotten": mean(general) - before if general and before is not None else None,
        "steps_to_target": reached, "steps_to_target_share": None if reached is None else reached / first["steps"],
    }  # fmt: skip


def _against(losses: Sequence[float], others: Sequence[float] | None) -> dict[str, float | None]:
    """The held-out loss over the reference's (share), and the half width of its interval; the reference itself has none."""
    if others is None:
        return {"against_reference": 0.0, "against_reference_interval": None}
    shares = [own / other - 1 for own, other in zip(losses, others, strict=True)]
    return {"against_reference": mean(losses) / mean(others) - 1, "against_reference_interval": interval(shares)}


def _shares_start(one: Outcome) -> bool:
    """Whether the adapter of every seed begins with the same numbers, so that a seed changes the order of the rows alone."""
    init = one.base["init"] if one.base else one.arm.config.lora.init
    return one.arm.config.method != "full" and init not in DRAWN


def _reached(one: Outcome, target: Outcome | None) -> float | None:
    """Steps until the held-out loss is that of the target's end, each seed against the same seed; None where one never comes there."""
    if target is None:
        return None
    pairs = zip(one.runs, target.runs, strict=True)
    found = [steps_to_reach([(step, loss) for step, loss in run["curve"]], other["last_eval_loss"]) for run, other in pairs]
    return mean([steps for steps in found if steps is not None]) if None not in found else None


def _samples(finished: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The first held-out prompts with each setting's answer (its first seed)."""
    answered = {one.arm.name: one.judged[0].get("answers", []) for one in finished}
    first: list[dict[str, str]] = next((answers for answers in answered.values() if answers), [])
    return [
        {"prompt": row["prompt"], "reference": row["reference"],
         "answers": {name: answers[number]["answer"] for name, answers in answered.items() if answers}}
        for number, row in enumerate(first)
    ]  # fmt: skip
