"""What `halfbyte rank` prints, and the same as plain values for --json.  Every number has its unit; an estimate is called one."""

import textwrap
from dataclasses import asdict
from typing import Any

from halfbyte.config.yaml_text import dump
from halfbyte.studies.rank import Choice, Recommendation
from halfbyte.studies.rank_adapter import Costs, Group
from halfbyte.units import bytes_text, count_text, percent_text, seconds_text

WIDEST = 140


def rows_of(header: list[str], rows: list[list[str]]) -> list[str]:
    """Columns padded to their widest cell."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in lines]


def wrapped(line: str) -> str:
    """A long line as several, at most WIDEST characters each where its words allow, indented as the stages are."""
    parts = textwrap.wrap(line, WIDEST, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False)
    return "\n".join(parts) if len(line) > WIDEST else line


def stages_text(found: Recommendation) -> list[str]:
    """One paragraph a stage."""
    lines = []
    if (held := found.capacity) is not None:
        lines.append(
            f"capacity   {count_text(held.trained_tokens)} trained tokens, {percent_text(held.new_share)} of them new; loss "
            f"{held.base_loss:.3f} nats/token, floor {held.floor:.3f}: {count_text(held.bits)} bits (estimate) -> rank {held.rank} "
            f"for {held.task} (estimate)"
        )
    if (seen := found.gradient) is not None:
        some = ", ".join(f"{rank}: {percent_text(seen.explained(rank))}" for rank in (1, 4, 16, 64) if rank <= seen.sketch)
        lines.append(
            f"gradient   of what comes back on other rows, explained by rank {some}; median rank for 90 %: {seen.median_rank}, median "
            f"stable rank {seen.stable_rank:.1f} (sketch of {seen.sketch} directions, {count_text(seen.tokens)} trained tokens)"
        )
    if (probe := found.probe) is not None:
        known = any(point.error is not None for point in probe.points.values())
        lines.append(
            f"probe      rank {probe.rank}, {probe.steps} steps at {probe.rate:g}, then cut, and small ranks run: held-out loss "
            f"{probe.base_loss:.4f} -> {probe.loss:.4f} nats/token on {probe.tokens} tokens; a rank is enough within "
            f"{probe.tolerance:.4f} nats/token"
            + (", a standard error to spare, or not told from the best" if known else " (one held-out batch has no standard error)")
        )
        header = ["rank", "cut, nats/token", "run, nats/token", "above the best", "standard error"]
        rows = [
            [str(point.rank), f"{point.cut_loss:.4f}", "-" if point.run_loss is None else f"{point.run_loss:.4f}",
             f"{point.gap:+.4f}", "-" if point.error is None else f"{point.error:.4f}"] for point in probe.points.values()
        ]  # fmt: skip
        lines += ["  " + line for line in rows_of(header, rows)]
    return lines


def reasons_of(found: Recommendation) -> list[str]:
    """The decision's reasons, and where the probe could not tell its rank from the best, that this alone made it enough."""
    reasons, probe = list(found.decision.reasons), found.probe
    point = probe.points.get(probe.needed) if probe is not None else None
    if probe is not None and point is not None and point.error is not None and point.gap + point.error > probe.tolerance:
        reasons.append(
            f"probe: rank {point.rank} is {point.gap:.4f} nats/token above the best rank with a standard error of {point.error:.4f}: not "
            f"told from the best, and not shown to be within the {probe.tolerance:.4f} that are tolerated; more held-out rows would tell"
        )
    return reasons


def cells(choice: Choice, recommended: int) -> list[str]:
    """One row of the table of choices."""
    return [
        f"{'>' if choice.rank == recommended else ''}{choice.rank}", "-" if choice.loss is None else f"{choice.loss:.4f}",
        "-" if choice.gap is None else f"{choice.gap:+.4f}", count_text(choice.parameters), bytes_text(choice.file_bytes),
        bytes_text(choice.training_bytes), "-" if choice.step_seconds is None else seconds_text(choice.step_seconds),
    ]  # fmt: skip


def recommendation_text(found: Recommendation, *, modules: bool = False) -> str:
    """The whole answer."""
    rank = found.decision.rank
    lines = [f"rank {rank}, decided by the stage {found.decision.stage}", *(wrapped("  " + reason) for reason in reasons_of(found)), ""]
    header = ["rank", "loss (estimate)", "to the best, nats/token (estimate)", "parameters", "adapter file", "while training (estimate)",
              "per step (estimate)"]  # fmt: skip
    lines += rows_of(header, [cells(choice, rank) for choice in found.choices])
    lines += ["loss: held-out nats/token after the probe's steps, an estimate of the run's" if found.probe is not None
              else "no loss is predicted without the stage probe", ""]  # fmt: skip
    lines += [*map(wrapped, stages_text(found)), "", wrapped(f"measured on {found.setting}; {seconds_text(found.seconds)}")]
    if modules and not found.modules:
        lines += ["", f"no ranks of modules: the gradient was looked at in {found.gradient.sketch if found.gradient else 0} directions"]
    if found.modules:
        changed = sum(own != rank for own in found.modules.values())
        if modules:
            lines += ["", f"# ranks of modules by their gradients, the same number of parameters (estimate); {changed} differ from {rank}",
                      settings_text(found)]  # fmt: skip
        else:
            lines.append(f"--modules prints ranks of modules for a settings file ({changed} of {len(found.modules)} differ from {rank})")
    return "\n".join(lines)


def settings_text(found: Recommendation) -> str:
    """The `lora` group with ranks of modules, ready to be put into a settings file."""
    return dump({"lora": found.lora_settings()}).rstrip()


def recommendation_dict(found: Recommendation) -> dict[str, Any]:
    """The answer as plain values; losses in nats a token, sizes in bytes, times in seconds."""
    gradient, probe, capacity = found.gradient, found.probe, found.capacity
    return {
        "rank": found.decision.rank, "decided_by": found.decision.stage, "reasons": reasons_of(found),
        "choices": [
            {"rank": one.rank, "loss_estimate": one.loss, "loss_above_best_estimate": one.gap, "parameters": one.parameters,
             "file_bytes": one.file_bytes, "training_bytes": one.training_bytes, "seconds_per_step_estimate": one.step_seconds}
            for one in found.choices
        ],
        "capacity": None if capacity is None else {**asdict(capacity), "bits_estimate": capacity.bits, "rank_estimate": capacity.rank},
        "gradient": None if gradient is None else {
            "median_rank": gradient.median_rank, "stable_rank": gradient.stable_rank, "tokens": gradient.tokens, "sketch": gradient.sketch,
            "modules": {name: {"rank": one.rank, "norm": one.norm, "stable_rank": one.stable_rank, "returns": one.shares[-1]}
                        for name, one in gradient.modules.items()}},
        "probe": None if probe is None else {
            **asdict(probe), "points": [asdict(one) for one in probe.points.values()]},
        "lora": found.lora_settings(), "planned_steps": found.planned_steps, "setting": found.setting, "seconds": found.seconds,
    }  # fmt: skip


def adapter_text(title: str, found: list[Group], ranks: dict[int, float]) -> str:
    """The spectrum of a trained adapter."""
    header = ["modules", "count", "rank", "effective rank", "rank for 90 %", "share of the squared norm"]
    rows = [
        [one.name, str(one.count), str(one.rank), f"{one.effective_rank:.1f}", str(one.rank_for_most), percent_text(one.share)]
        for one in found
    ]
    explained = "medians over the modules; effective rank: exp of the entropy of the squared singular values; 90 % of the squared norm"
    lines = [f"spectrum of {title}", *rows_of(header, rows), explained, ""]
    lines += rows_of(["cut to rank", "squared norm left out"], [[str(rank), percent_text(share)] for rank, share in ranks.items()])
    return "\n".join(lines)


def costs_text(found: Costs, per: str = "token") -> str:
    """Losses of cuts, predicted and measured; `per` is what a loss is the mean of."""
    rows_seen = f"{per}s" if per == "row" else f"{per}s of these rows"
    header = ["cut", "parameters", "squared norm left out", "loss predicted (estimate)", "standard error", "loss measured", "cost"]
    rows = [
        [one.name, count_text(one.parameters), percent_text(one.left_out),
         f"{one.predicted:.4f}", "-" if one.error is None else f"{one.error:.4f}", f"{one.measured:.4f}",
         f"{one.measured - found.full:+.4f}"] for one in found.cuts
    ]  # fmt: skip
    return "\n".join([
        *rows_of(header, rows),
        wrapped(f"nats/{per} on {found.tokens} {rows_seen}; whole adapter {found.full:.4f}, without it {found.base:.4f}; "
                f"predicted by the same cuts on {found.calibration_tokens} other {per}s"),
    ])  # fmt: skip
