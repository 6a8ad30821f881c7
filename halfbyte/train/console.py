"""A run as a person sees it: a live line on a terminal, plain lines anywhere else.

On a terminal the last line shows progress, loss, rate, memory and the time left, and is redrawn; evaluations and notes scroll above it.
Without one (a pipe, a log file, CI) the same values come as at most about a hundred plain lines.  Both go to standard error.
"""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from halfbyte.train.metrics import Header
from halfbyte.units import bytes_text, seconds_text

PLAIN_LINES = 100


class Screen(Console):
    """A console whose reader may leave (`| head`): the run goes on unseen; metrics.jsonl has everything."""

    def on_broken_pipe(self) -> None:
        """Write no more, instead of ending the program."""
        self.quiet = True


class Pace:
    """Seconds left, from the steps this process has done, evaluations and saves included."""

    def __init__(self, header: Header) -> None:
        self.first, self.total, self.began = header.first_step, header.total_steps, time.monotonic()

    def left(self, step: int) -> str:
        """Time to the last step as text; "?" before the first, at the last what is still to do."""
        if step >= self.total:
            return "0 steps, then evaluation and report"
        done = step - self.first
        return seconds_text((time.monotonic() - self.began) / done * (self.total - step)) if done > 0 else "?"


def step_text(record: dict[str, Any], total: int, left: str) -> str:
    """The values of one step in one line."""
    loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
    return (
        f"step {record['step']}/{total}  loss {loss}  lr {record['lr']:.2e}  grad {record['grad_norm']:.3g}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {bytes_text(record['memory_bytes'])}  left {left}"
    )


def evaluation_text(record: dict[str, Any]) -> str:
    """The values of one evaluation in one line."""
    best = "  (best so far)" if record["best"] else ""
    second = f"accuracy {100 * record['accuracy']:.1f} %" if "accuracy" in record else f"perplexity {record['perplexity']:.3f}"
    return f"step {record['step']}  held-out loss {record['eval_loss']:.4f}  {second}{best}"


class PlainLines:
    """Lines for logs and pipes."""

    def __init__(self) -> None:
        self.console = Screen(stderr=True, highlight=False, soft_wrap=True, markup=False)

    def started(self, header: Header) -> None:
        """Print the header."""
        self.pace = Pace(header)
        self.stride = max(1, -(-header.total_steps // PLAIN_LINES))
        width = max(len(label) for label, _ in header.lines)
        for label, text in header.lines:
            self.console.print(f"{label:<{width}}  {text}")

    def stepped(self, record: dict[str, Any]) -> None:
        """Print the step when its turn has come."""
        if record["step"] % self.stride == 0 or record["step"] in (self.pace.first + 1, self.pace.total):
            self.console.print(step_text(record, self.pace.total, self.pace.left(record["step"])))

    def evaluated(self, record: dict[str, Any]) -> None:
        """Print the evaluation."""
        self.console.print(evaluation_text(record))

    def noted(self, text: str) -> None:
        """Print the note."""
        self.console.print(text)

    def finished(self, summary: dict[str, Any]) -> None:
        """Print how the run ended."""
        self.console.print(finish_text(summary))


def finish_text(summary: dict[str, Any]) -> str:
    """How the run ended, in one line."""
    text = f"{summary['status']} at step {summary['steps']} of {summary['total_steps']} after {seconds_text(summary['seconds'])}"
    if summary.get("best_eval_loss") is not None:
        text += f", best held-out loss {summary['best_eval_loss']:.4f} at step {summary['best_step']}"
    return text + f", peak memory {bytes_text(summary['peak_memory_bytes'])}"


class LiveView:
    """The live line of a terminal."""

    def __init__(self, drawn_on: Console | None = None) -> None:
        self.console = drawn_on or Screen(stderr=True, highlight=False, markup=False)
        self.progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=None),
            TextColumn("{task.fields[values]}"), console=self.console, expand=True,
        )
        self.task = TaskID(0)

    def started(self, header: Header) -> None:
        """Print the header and begin the live line."""
        self.pace = Pace(header)
        width = max(len(label) for label, _ in header.lines)
        for label, text in header.lines:
            self.console.print(f"[bold]{label:<{width}}[/bold]  ", end="", markup=True)
            self.console.print(text)
        self.task = self.progress.add_task("training", total=header.total_steps, completed=header.first_step, values="")
        self.progress.start()

    def stepped(self, record: dict[str, Any]) -> None:
        """Redraw the live line."""
        values = step_text(record, self.pace.total, self.pace.left(record["step"])).partition("  ")[2]
        self.progress.update(self.task, completed=record["step"], values=values)

    def evaluated(self, record: dict[str, Any]) -> None:
        """Print the evaluation above the live line."""
        self.console.print(evaluation_text(record), style="green" if record["best"] else "yellow")

    def noted(self, text: str) -> None:
        """Print the note above the live line."""
        self.console.print(text, style="yellow")

    def finished(self, summary: dict[str, Any]) -> None:
        """End the live line and print how the run ended."""
        self.progress.stop()
        self.console.print(finish_text(summary), style="bold")


def for_this_terminal() -> PlainLines | LiveView:
    """The live view when standard error is a terminal, plain lines otherwise."""
    return LiveView() if sys.stderr.isatty() else PlainLines()
