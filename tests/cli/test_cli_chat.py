"""Chat: every slash command, and that a mistake never ends the conversation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli import chat
from halfbyte.errors import AdapterError


class FakeModel:
    """Stands for an opened model: answers with the number of messages it was given."""

    def __init__(self) -> None:
        self.adapter_names = ["first", "second"]
        self.active: str | None = "first"
        self.seen: list[list[dict[str, str]]] = []

    def reply(self, messages: list[dict[str, str]], *, stream: Callable[[str], None], **options: Any) -> str:
        self.seen.append([dict(message) for message in messages])
        stream(f"[{len(messages)}]")
        return f"answer {len(messages)}"

    def activate(self, name: str | None) -> None:
        if name not in (None, *self.adapter_names):
            raise AdapterError("no such adapter", code="E-ADAPT-999", found=str(name))
        self.active = name


def talk(*lines: str, system: str | None = None) -> tuple[chat.Talk, list[str], FakeModel]:
    said: list[str] = []
    model = FakeModel()
    held = chat.Talk(model, say=said.append, stream=said.append, system=system)  # type: ignore[arg-type]
    waiting = iter(lines)

    def read() -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    chat.converse(held, read)
    return held, said, model


def test_a_conversation_grows_and_empty_lines_are_passed_over() -> None:
    held, said, model = talk("one", "", "  ", "two", system="be brief")
    assert [len(messages) for messages in model.seen] == [2, 4]
    assert model.seen[0][0] == {"role": "system", "content": "be brief"}
    assert [turn["role"] for turn in held.turns] == ["user", "assistant"] * 2
    assert "".join(said).strip().replace("\n", "") == "[2][4]"


def test_undo_new_and_system() -> None:
    held, said, _ = talk("one", "two", "/undo", "/undo", "/undo")
    assert held.turns == [] and said[-1] == "nothing to take back"
    held, said, _ = talk("one", "/new")
    assert held.turns == [] and said[-1] == "new conversation"
    held, said, _ = talk("one", "/system", "/system Speak Latin.", "/system")
    assert held.system == "Speak Latin." and held.turns == [] and "no system message" in said and said[-1] == "Speak Latin."


def test_adapters_are_listed_and_switched() -> None:
    _, said, model = talk("/adapters", "/adapter none", "/adapters", "/adapter second")
    assert said[0] == "* first\n  second\n  none" and said[2] == "  first\n  second\n* none"
    assert model.active == "second"


def test_an_error_is_said_and_the_talk_goes_on(tmp_path: Path) -> None:
    _, said, model = talk(
        "/adapter third", "/bogus", "/sytem x", f"/save {tmp_path / 'no' / 'file.jsonl'}", "one", f"/save {tmp_path}", "two"
    )
    assert "no such adapter" in said[0]
    assert said[1].startswith("/bogus is no command.") and "did you mean /system?" in said[2]
    assert said[3] == "nothing to save yet"
    assert len(model.seen) == 2


def test_save_appends_a_row_in_the_messages_shape(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    talk("one", f"/save {path}", "/new", "two", f"/save {path}", system="s")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [[message["role"] for message in row["messages"]] for row in rows] == [["system", "user", "assistant"]] * 2


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_quit_ends_it(word: str) -> None:
    _, _, model = talk(word, "never asked")
    assert model.seen == []


def test_help_names_every_command() -> None:
    _, said, _ = talk("/help")
    assert all(name in said[0] for name in chat.COMMANDS)
