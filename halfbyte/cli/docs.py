"""docs/cli.md from the command tree itself: `python -m halfbyte.cli.docs > docs/cli.md`; a test compares the file."""

from typing import Any

from halfbyte.cli.main import command

HEAD = """# Commands

Generated from the program by `make docs`; do not edit. Exit codes: 0 ok, 1 a bug, 2 bad input, 3 environment, 4 resume refused,
5 storage, 6 numeric, 7 out of memory, 130 and 143 stopped by Ctrl-C and SIGTERM. `--debug` anywhere on the line shows the traceback.
`halfbyte --version` prints the version.
"""


def markdown() -> str:
    """The whole page."""
    return HEAD + "".join(_section(words, node) for words, node in _leaves(command(), ("halfbyte",)))


def _leaves(node: Any, words: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    """(command line words, command) of every command that does something, in the order of the help text."""
    children = getattr(node, "commands", None)
    if children is None:
        return [(words, node)]
    return [leaf for name, child in children.items() for leaf in _leaves(child, (*words, name))]


def _section(words: tuple[str, ...], node: Any) -> str:
    """One command: usage, text, arguments and options."""
    arguments = [one for one in node.params if one.param_type_name == "argument"]
    options = [one for one in node.params if one.param_type_name == "option" and one.name != "help"]
    usage = " ".join([*words, *(_usage(one) for one in arguments), "[options]" if options else ""]).rstrip()
    text = "\n".join(line.strip() for line in (node.help or "").splitlines())
    rows = [f"| `{_cell(_usage(one))}` | {_cell(one.help)} | |" for one in arguments]
    rows += [f"| `{_cell(_option(one))}` | {_cell(one.help)} | {_default(one)} |" for one in options]
    table = "\n| | | default |\n|---|---|---|\n" + "\n".join(rows) + "\n" if rows else ""
    return f"\n## {' '.join(words)}\n\n```\n{usage}\n```\n\n{text}\n{table}"


def _usage(argument: Any) -> str:
    shown = argument.metavar or argument.name.upper()
    return shown if argument.required or shown.startswith("[") else f"[{shown}]"


def _option(option: Any) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    return f"{names} {option.metavar or ''}".strip()


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def _default(option: Any) -> str:
    value = option.default
    return "" if value is None or value is False or value == "" else f"`{value}`"


if __name__ == "__main__":
    print(markdown(), end="")
