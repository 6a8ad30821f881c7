"""The `halfbyte` command: its sub-commands, and the one border where errors become text and an exit code.

Importing this module loads typer and nothing heavy: a command imports what it needs in its body, so `--help` and a mistyped option
answer at once.

Exit codes: 0 ok, 1 a bug of this program, 2 bad input, 3 environment, 4 resume refused, 5 storage, 6 numeric, 7 out of memory,
130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import FrameType
from typing import Annotated, Any, TextIO

import typer

from halfbyte import host, redact
from halfbyte.cli import chat, compare, data, doctor, evaluate, generate, label, lr, merge, plan, quantize, quickstart, rank, train
from halfbyte.errors import DoesNotFitError, HalfbyteError, Terminated
from halfbyte.units import bytes_text

app = typer.Typer(
    name="halfbyte",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune large language models with LoRA and QLoRA on the hardware you have.",
    epilog="Start here: halfbyte quickstart",
)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at a data file: is it usable, and what will be trained?")

NOT_TRAINING = {
    "plan": "planned", "rank": "measured", "quantize": "written", "eval": "measured", "merge": "merged", "generate": "written",
    "label": "written",
}  # fmt: skip
"""What each of these commands has not done when it ends in an error."""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"halfbyte {metadata.version('halfbyte')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On an error show the whole traceback; may stand anywhere on the line.")] = False,
) -> None:
    """Options of all commands; `--version` is acted on where it is read, `--debug` is read in `run` and declared here for the help text."""


app.command("quickstart")(quickstart.quickstart)
app.command("plan")(plan.plan)
app.command("rank")(rank.rank)
app.command("train")(train.train)
app.command("lr")(lr.lr)
app.command("compare")(compare.compare)
app.add_typer(data_app, name="data")
data_app.command("check")(data.check)
data_app.command("show")(data.show)
app.command("eval")(evaluate.evaluate)
app.command("label")(label.label)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("merge")(merge.merge)
app.command("quantize")(quantize.quantize)
app.command("doctor")(doctor.doctor)


def command() -> Any:
    """The command tree, for running it and for writing docs/cli.md."""
    return typer.main.get_command(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; text for people goes to standard error."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with _terminated():
            command().main(args=arguments, prog_name="halfbyte")
    except SystemExit as leaving:
        if (stop := _stop_behind(leaving)) is not None:
            return _stopped(stop)
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except HalfbyteError as error:
        if debug:
            traceback.print_exc()
        _say(_told(error, arguments))
        return error.exit_code
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except Exception as error:  # the border: whatever was not foreseen is a bug, and is said to be one
        if debug:
            traceback.print_exc()
        if host.is_out_of_memory(error):
            lacking = _no_memory(error)
            _say(lacking.text())
            return lacking.exit_code
        _say(_bug(error, arguments))
        return 1
    return 0


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM as an exception, so that a command can end its processes; a training has handlers of its own meanwhile."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop_behind(leaving: BaseException) -> KeyboardInterrupt | None:
    """The KeyboardInterrupt of which typer has made an exit."""
    earlier = leaving.__cause__ or leaving.__context__
    return earlier if earlier is None or isinstance(earlier, KeyboardInterrupt) else _stop_behind(earlier)


def _stopped(stop: KeyboardInterrupt) -> int:
    by_signal = isinstance(stop, Terminated)
    _say("stopped by SIGTERM" if by_signal else "stopped by Ctrl-C")
    return 143 if by_signal else 130


def _say(text: str) -> None:
    print(redact.terminal(redact.secrets(text)), file=sys.stderr, flush=True)


def _told(error: HalfbyteError, arguments: Sequence[str]) -> str:
    """The block of an error; checks that commands share with training close it in the word of this command."""
    name = next((word for word in arguments if not word.startswith("-")), "")
    if error.nothing_done == "Nothing was trained." and name in NOT_TRAINING:
        error.nothing_done = f"Nothing was {NOT_TRAINING[name]}."
    return error.text()


def _no_memory(error: Exception) -> DoesNotFitError:
    total, available = host.memory_bytes()
    last = traceback.extract_tb(error.__traceback__)[-1]
    return DoesNotFitError(
        "what a command works with must fit into memory", code="E-FIT-404",
        place=f"{last.name} in {last.filename.rpartition('/')[2]}, line {last.lineno}",
        found=f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no memory'])[0][:200]}",
        expected=f"more than what is left: {bytes_text(available)} of {bytes_text(total)}",
        remedy="see what fits with `halfbyte plan`, or use a larger machine; a limit of the shell is shown by `ulimit -v`",
    )  # fmt: skip


def _bug(error: Exception, arguments: Sequence[str]) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).strip().splitlines()
    return (
        f"error E-BUG-001: this is a bug of Halfbyte or of a library it uses, not of your input\n"
        f"  where:    {last.name} in {last.filename.rpartition('/')[2]}, line {last.lineno}\n"
        f"  found:    {type(error).__name__}: {message[0] if message else 'no message'}\n"
        f"  fix:      see the whole story with: halfbyte --debug {' '.join(arguments)}\n"
        f"            and report it with that text"
    )


def main() -> None:
    """Entry point of the `halfbyte` script."""
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        let_go(stream)
    sys.exit(code)


def let_go(stream: TextIO) -> None:
    """Send what is left for a reader that has gone to nowhere: Python would try once more at exit, and end with 120."""
    try:
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
