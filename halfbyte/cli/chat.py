"""`halfbyte chat`: talk with a model, stream its answers, switch adapters by slash command.

Works at a terminal and with piped standard input, where each line is one message.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.options import AllowDownload, ForceBase, MaxNewTokens, ModelOrRun, Quant, Seed, Temperature, TopP

if TYPE_CHECKING:
    from halfbyte.evaluate.opened import Opened

HELP = """/help             this text
/new              forget the conversation
/system TEXT      set the system message and start anew; without TEXT show it
/adapter NAME     switch to an adapter: a name of /adapters, a folder, or none for the bare model
/adapters         the adapters at hand, * marks the active one
/undo             take back the last message and its answer
/save FILE        append the conversation to FILE as one training row
/quit             leave (so does Ctrl-D)"""


@dataclass
class Talk:
    """A conversation and the model it is held with; `say` prints text, `stream` is told each piece of an answer as it comes."""

    opened: "Opened"
    say: Callable[[str], None]
    stream: Callable[[str], None]
    options: dict[str, float | int] = field(default_factory=dict)
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """The whole conversation, system message first."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def message(self, text: str) -> None:
        """Answer one message of the user."""
        asked = {"role": "user", "content": text}
        answer = self.opened.reply([*self.messages(), asked], stream=self.stream, **self.options)
        self.turns += [asked, {"role": "assistant", "content": answer}]  # a message that got no answer is not part of the talk
        self.say("")

    def command(self, line: str) -> bool:
        """Do one slash command; False when it was /quit."""
        from halfbyte.errors import nearest

        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        action = COMMANDS.get(name)
        if action is None:
            self.say(f"{name} is no command. {nearest(name, COMMANDS)} /help lists them.")
        else:
            action(self, rest.strip())
        return True

    def new(self, rest: str = "") -> None:
        self.turns.clear()
        self.say("new conversation")

    def set_system(self, rest: str) -> None:
        if not rest:
            self.say(self.system or "no system message")
            return
        self.system = rest
        self.turns.clear()
        self.say("system message set, new conversation")

    def adapter(self, rest: str) -> None:
        if not rest:
            self.adapters()
            return
        self.opened.activate(None if rest == "none" else rest)
        self.say(f"adapter: {self.opened.active or 'none'}")

    def adapters(self, rest: str = "") -> None:
        names = [*self.opened.adapter_names, "none"]
        self.say("\n".join(("* " if (self.opened.active or "none") == name else "  ") + name for name in names))

    def undo(self, rest: str = "") -> None:
        if not self.turns:
            self.say("nothing to take back")
            return
        del self.turns[-2:]
        self.say(f"taken back; {len(self.turns) // 2} exchanges left")

    def save(self, rest: str) -> None:
        if not rest or not self.turns:
            self.say("usage: /save FILE" if not rest else "nothing to save yet")
            return
        with Path(rest).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self.messages()}, ensure_ascii=False) + "\n")
        self.say(f"one row appended to {rest}; see it with: halfbyte data show {rest}")

    def help(self, rest: str = "") -> None:
        self.say(HELP)


COMMANDS: dict[str, Callable[[Talk, str], None]] = {
    "/help": Talk.help,
    "/new": Talk.new,
    "/system": Talk.set_system,
    "/adapter": Talk.adapter,
    "/adapters": Talk.adapters,
    "/undo": Talk.undo,
    "/save": Talk.save,
    "/quit": Talk.help,
}


def converse(talk: Talk, read: Callable[[], str]) -> None:
    """Read lines until the end of input or /quit; an error of one line is said and the conversation goes on."""
    from halfbyte import redact
    from halfbyte.errors import HalfbyteError

    while True:
        try:
            line = read()
        except EOFError:
            return
        if not line.strip():
            continue
        try:
            if not line.startswith("/"):
                talk.message(line)
            elif not talk.command(line.strip()):
                return
        except HalfbyteError as error:
            talk.say(redact.terminal(redact.secrets(error.text())))
        except OSError as error:
            talk.say(f"{error.strerror}: {error.filename}")


def chat(
    model: ModelOrRun = "starter",
    adapter: Annotated[
        list[Path] | None,
        typer.Option("--adapter", metavar="DIR", help="An adapter folder to have at hand; of several the first answers at the start."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    quant: Quant = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    allow_download: AllowDownload = False,
    force_base: ForceBase = False,
) -> None:
    """Talk with a model; /help lists the commands."""
    from halfbyte import redact
    from halfbyte.models.source import require_at_hand, require_folder

    require_at_hand(model, allow_download=allow_download)
    for folder in adapter or []:
        require_folder(folder)
    from halfbyte.evaluate.opened import open_with  # loads torch: a mistyped name is told before

    opened = open_with(adapter or [], model, quant=quant, allow_download=allow_download, force_base=force_base, writes=True)
    at_terminal = sys.stdin.isatty()

    def stream(piece: str) -> None:
        sys.stdout.write(redact.terminal(piece))
        sys.stdout.flush()

    def read() -> str:
        line = input("\n> ") if at_terminal else sys.stdin.readline()
        if not at_terminal and not line:
            raise EOFError
        return line.rstrip("\n")

    options: dict[str, float | int] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    talk = Talk(opened, say=typer.echo, stream=stream, options=options, system=system)
    if at_terminal:
        bare = ", /adapter none the bare model" if opened.active else ""
        typer.echo(f"{opened.title()} answers; /help lists the commands{bare}, Ctrl-D leaves")
    converse(talk, read)
