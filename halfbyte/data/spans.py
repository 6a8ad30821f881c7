"""Which stretches of a rendered conversation the model itself must write: each answer and the text that ends it.

Idea: the same conversation is rendered twice, once as it is (R) and once with one private-use character before and one after each
answer (M).  If M without these characters equals R, the template took the answer as it is and the characters show where it stands.

    R   ...assistant\\nHello!<|im_end|>\\n            M   ...assistant\\n(Hello!)<|im_end|>\\n

Templates trim, split off reasoning, or rewrite history.  Then the marks of that answer are tried one by one further inside: behind
leading line ends or spaces, behind <think> or </think>, in the reasoning field, in the tool calls.  The first place whose render is
R plus the mark counts.  If none is, the row is refused: nothing is guessed, no token is counted and no marker is searched.

The end: the special token which the template writes behind a final answer, taken in when it follows the answer directly (or, behind
a tool call, as the first after it).  The start: the answer's first character.  Text that the template adds on its own (an empty
<think></think>) is not the answer's; when the answer brings reasoning or tool calls, all from the end of the generation prompt on is
trained, and what the generation prompt supplies never is.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.data.faults import Problem, shown
from halfbyte.data.samples import Conversation, Message
from halfbyte.data.template_process import RenderFault

Span = tuple[int, int]
RenderAll = Callable[[Sequence[dict[str, Any]]], list[str | RenderFault]]
MARKS = 0xF0000  # first private-use plane
PLAIN_OPEN, PLAIN_CLOSE = "\U00100000", "\U00100001"
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")


@dataclass(frozen=True)
class Turns:
    """What a template writes around answers.

    prompt   what it adds when asked for a generation prompt
    stops    what may end an answer
    aside    what it puts between the generation prompt and a plain final answer, such as an empty <think></think>
    fits     does the generation prompt stand before a plain final answer?
    """

    prompt: str
    stops: tuple[str, ...]
    aside: str = ""
    fits: bool = True


@dataclass(frozen=True)
class _Slot:
    """A text of a message: its way through the message's dict, and the text."""

    way: tuple[str | int, ...]
    text: str


def learn(render_all: RenderAll, tokens: Sequence[str], specials: dict[str, Any]) -> Turns:
    """Render small conversations of unique words and look at what stands before and after the answers."""
    ask, answer = {"role": "user", "content": "qfirst"}, {"role": "assistant", "content": "afirst"}
    more = [{"role": "user", "content": "qsecond"}, {"role": "assistant", "content": "asecond"}]
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "nfirst", "arguments": {"kfirst": "vfirst"}}}],
    }
    asked, prompted, one, two, called = render_all(
        [
            job([ask]),
            job([ask], prompt=True),
            job([ask, answer]),
            job([ask, answer, *more]),
            job([ask, call]),
        ]
    )
    prompt = prompted[len(asked) :] if isinstance(asked, str) and isinstance(prompted, str) and prompted.startswith(asked) else ""
    if (
        not prompt and isinstance(prompted, str) and isinstance(one, str) and isinstance(asked, str)
    ):  # the text without prompt ends in a stop, as with phi-3
        shared = _common_prefix(prompted, one)
        prompt = prompted[len(_common_prefix(asked, prompted)) :] if shared == prompted else ""
    stops: list[str] = []
    for text, word in ((one, "afirst"), (two, "asecond"), (called, "vfirst")):
        if isinstance(text, str) and word in text:
            tail = text[text.rindex(word) + len(word) :]
            first = _first_special(tail, tokens, direct=word != "vfirst")
            if first and first not in stops:
                stops.append(first)
    aside, fits = "", True
    if prompt and isinstance(one, str) and "afirst" in one:
        at = one.rfind(prompt, 0, one.index("afirst"))
        fits = at >= 0
        aside = one[at + len(prompt) : one.index("afirst")] if fits else ""
    eos = specials.get("eos_token")
    ends = {*stops, *([eos] if isinstance(eos, str) and eos else [])}
    return Turns(prompt, tuple(sorted(ends, key=lambda text: (-len(text), text))), aside, fits)


def find(
    render_all: RenderAll, turns: Turns, tokens: Sequence[str], conversations: Sequence[Conversation], train_on: str
) -> list[tuple[str, list[Span], list[Span], str] | Problem]:
    """(text, spans, plain stretches, stop text) of each conversation, or why it cannot be used."""
    found: list[tuple[str, list[Span], list[Span], str] | Problem] = []
    texts = render_all([job(_dicts(one), one.tools) for one in conversations])
    wanted = [wanted_messages(one, train_on) for one in conversations]
    marked = render_all([_marked_job(one, which) for one, which in zip(conversations, wanted)])
    for conversation, which, text, with_marks in zip(conversations, wanted, texts, marked):
        if isinstance(text, RenderFault):
            found.append(_refused(conversation, text.words))
        elif _PRIVATE.search(text):
            found.append(_lost(conversation, "characters of the private-use planes, which are needed as marks"))
        else:
            found.append(_one(render_all, turns, tokens, conversation, which, text, with_marks, train_on))
    return found


def wanted_messages(conversation: Conversation, train_on: str) -> list[int]:
    """Numbers of the messages that are trained."""
    answers = [number for number, message in enumerate(conversation.messages) if message.role == "assistant"]
    if train_on == "last-assistant":
        answers = answers[-1:]
    return [number for number in answers if conversation.messages[number].trained]


def _one(
    render_all: RenderAll,
    turns: Turns,
    tokens: Sequence[str],
    conversation: Conversation,
    wanted: list[int],
    text: str,
    with_marks: str | RenderFault,
    train_on: str,
) -> tuple[str, list[Span], list[Span], str] | Problem:
    places = _places(text, with_marks, wanted) or _search(render_all, conversation, wanted, text)
    if isinstance(places, Problem):
        return places
    plain = _plain(render_all, tokens, conversation, text)
    if isinstance(plain, Problem):
        return plain
    spans: list[Span] = []
    stop, before = "", 0
    for number, (start, end, inside) in zip(wanted, places):
        message = conversation.messages[number]
        begin = _start(text, start, before, turns, inside)
        if begin is None:
            return _lost(conversation, f"messages[{number}]: no generation prompt before the reasoning or tool call")
        close, stop = _close(text, end, turns, calls=bool(message.extra.get("tool_calls")))
        spans.append((begin, close))
        before = close
    return text, [(0, len(text))] if train_on == "all" else spans, plain, stop


def _start(text: str, start: int, before: int, turns: Turns, inside: bool) -> int | None:
    """Where training starts: `start`, moved back to the end of the generation prompt for reasoning and tool calls, never inside it."""
    if not turns.prompt:
        return None if inside else start
    at = text.rfind(turns.prompt, before, start + len(turns.prompt))
    if at < 0:
        return None if inside else start
    end = at + len(turns.prompt)
    return end if inside or end > start else start


def _close(text: str, end: int, turns: Turns, *, calls: bool) -> tuple[int, str]:
    """Where training ends, and the stop text: directly behind the answer, or the first behind a tool call."""
    if not turns.stops:
        return end, ""
    pattern = "|".join(map(re.escape, turns.stops))
    match = re.compile(pattern).search(text, end) if calls else re.compile(rf"\s*({pattern})").match(text, end)
    return (match.end(), match[0].strip()) if match else (end, "")


def _places(text: str, marked: str | RenderFault, wanted: list[int]) -> list[tuple[int, int, bool]] | None:
    """Places of all answers from one render with all marks; None when it does not hold for every answer."""
    if isinstance(marked, RenderFault) or _PRIVATE.sub("", marked) != text:
        return None
    marks = list(_PRIVATE.finditer(marked))
    if [ord(mark[0]) - MARKS for mark in marks] != [one for number in wanted for one in (2 * number, 2 * number + 1)]:
        return None
    at = [mark.start() - count for count, mark in enumerate(marks)]
    return [(at[2 * one], at[2 * one + 1], False) for one in range(len(wanted))]


def _search(render_all: RenderAll, conversation: Conversation, wanted: list[int], text: str) -> list[tuple[int, int, bool]] | Problem:
    """Places of all answers, each mark tried by itself at all its places, outermost first."""
    places: list[tuple[int, int, bool]] = []
    for number in wanted:
        slots = list(_slots(conversation.messages[number]))
        if not slots:
            return _lost(conversation, f"messages[{number}] is empty")
        starts = [(slot, at) for slot in slots for at in _starts(slot.text)]
        ends = [(slot, at) for slot in reversed(slots) for at in _ends(slot.text)]
        renders = render_all([job(_with_mark(conversation, number, slot, at), conversation.tools) for slot, at in starts + ends])
        at = [_mark_at(made, text) for made in renders]
        start = next((count for count in range(len(starts)) if at[count] is not None), None)
        end = next((count for count in range(len(starts), len(at)) if at[count] is not None), None)
        if start is None or end is None:
            return _lost(
                conversation, f"messages[{number}]: {shown(conversation.messages[number].content)} does not stand once in the rendered text"
            )
        first, last = at[start], at[end]
        assert first is not None and last is not None
        if last < first or (places and first < places[-1][1]):
            return _lost(conversation, f"messages[{number}]: its end comes before its start in the rendered text")
        slot, offset = starts[start]
        places.append((first, last, slot.way != ("content",) or _reasons(slot.text[:offset], text[:first])))
    return places


def _reasons(left_out: str, before: str) -> bool:
    """Does the answer bring reasoning, opened by a tag that the template has written again just before the mark?"""
    tag = re.search(r"(<[^<>/\s]+>)\s*$", left_out)
    return tag is not None and before.rstrip().endswith(tag[1])


def _slots(message: Message) -> Iterator[_Slot]:
    """The texts of a message in the order in which templates write them: reasoning, content, tool calls."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.extra.get(name), str) and message.extra[name].strip():
            yield _Slot((name,), message.extra[name])
            break
    if message.content.strip():
        yield _Slot(("content",), message.content)
    calls = message.extra.get("tool_calls")
    for number, call in enumerate(calls if isinstance(calls, list) else []):
        yield from _texts(call, ("tool_calls", number))


def _texts(value: Any, way: tuple[str | int, ...]) -> Iterator[_Slot]:
    """Names and argument values of a tool call, its name first."""
    if isinstance(value, str) and value and way[-1] not in ("type", "id"):
        yield _Slot(way, value)
    elif isinstance(value, dict):
        for name in sorted(value, key=lambda one: one not in ("function", "name")):
            yield from _texts(value[name], (*way, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, (*way, number))


def _starts(text: str) -> list[int]:
    """Places for the first mark, outermost first: the start, behind line ends, behind spaces, behind <think>, behind </think>."""
    places = [0, len(text) - len(text.lstrip("\n")), len(text) - len(text.lstrip())]
    for tag in re.finditer(r"</?[^<>\s]+>\s*", text):
        places.append(tag.end())
    return sorted({place for place in places if place < len(text)})


def _ends(text: str) -> list[int]:
    """Places for the last mark, outermost first: the end, before line ends, before spaces."""
    return sorted({len(text), len(text.rstrip("\n")), len(text.rstrip())}, reverse=True)


def _mark_at(marked: str | RenderFault, text: str) -> int | None:
    """Where the only mark of a render stands, if the render is `text` plus this mark."""
    if isinstance(marked, RenderFault):
        return None
    at = marked.find(chr(MARKS))
    return at if at >= 0 and marked[:at] + marked[at + 1 :] == text else None


def _with_mark(conversation: Conversation, number: int, slot: _Slot, at: int) -> list[dict[str, Any]]:
    """The conversation with a mark inside one text of one message."""
    messages = _dicts(conversation)
    messages[number] = _put(messages[number], slot.way, slot.text[:at] + chr(MARKS) + slot.text[at:])
    return messages


def _put(value: Any, way: Sequence[str | int], text: str) -> Any:
    """A copy of a nested value with `text` at the end of `way`."""
    if not way:
        return text
    copy: Any = list(value) if isinstance(value, list) else dict(value)
    copy[way[0]] = _put(value[way[0]], way[1:], text)
    return copy


def _marked_job(conversation: Conversation, wanted: list[int]) -> dict[str, Any]:
    """The conversation with a mark around the content of each answer."""
    messages = _dicts(conversation)
    for number in wanted:
        message = conversation.messages[number]
        if len(list(_slots(message))) == 1 and message.content.strip():
            messages[number]["content"] = chr(MARKS + 2 * number) + message.content + chr(MARKS + 2 * number + 1)
    return job(messages, conversation.tools)


def _plain(render_all: RenderAll, tokens: Sequence[str], conversation: Conversation, text: str) -> list[Span] | Problem:
    """Stretches of the rendered text that spell a special token because a message says so."""
    if not tokens:
        return []
    pattern = re.compile("|".join(map(re.escape, tokens)))
    messages = _dicts(conversation)
    if not any(pattern.search(one) for one in _strings([messages, conversation.tools])):
        return []
    marked = render_all([job(_mark_tokens(messages, pattern), _mark_tokens(conversation.tools, pattern))])[0]
    if isinstance(marked, RenderFault) or marked.replace(PLAIN_OPEN, "").replace(PLAIN_CLOSE, "") != text:
        return _lost(conversation, "the text of a special token, which the template treats in a way of its own")
    spans: list[Span] = []
    at, opened = 0, None
    for part in re.split(f"([{PLAIN_OPEN}{PLAIN_CLOSE}])", marked):
        if part == PLAIN_OPEN:
            opened = at
        elif part == PLAIN_CLOSE:
            if opened is None:
                return _lost(conversation, "the text of a special token that the template takes apart")
            spans.append((opened, at))
            opened = None
        else:
            at += len(part)
    return spans if opened is None else _lost(conversation, "the text of a special token that the template takes apart")


def _mark_tokens(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda match: PLAIN_OPEN + match[0] + PLAIN_CLOSE, value)
    if isinstance(value, dict):
        return {name: inner if name == "role" else _mark_tokens(inner, pattern) for name, inner in value.items()}
    return [_mark_tokens(inner, pattern) for inner in value] if isinstance(value, list) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _first_special(tail: str, tokens: Sequence[str], *, direct: bool) -> str:
    """The special token that comes first in `tail`; with `direct`, only white space may stand before it."""
    if not tokens:
        return ""
    pattern = "|".join(map(re.escape, tokens))
    match = re.match(rf"\s*({pattern})", tail) if direct else re.search(f"({pattern})", tail)
    return match[1] if match else ""


def _common_prefix(one: str, other: str) -> str:
    length = next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:length]


def _dicts(conversation: Conversation) -> list[dict[str, Any]]:
    return [message.as_dict() for message in conversation.messages]


def job(messages: Sequence[dict[str, Any]], tools: list[Any] | None = None, *, prompt: bool = False) -> dict[str, Any]:
    """What the template is given, reasoning under all names that templates read."""
    named = []
    for one in messages:
        reasoning = next((one[name] for name in ("reasoning_content", "thinking", "reasoning") if one.get(name) is not None), None)
        named.append(one if reasoning is None else {"thinking": reasoning, **one, "reasoning_content": reasoning})
    return {"messages": named, "tools": tools, "add_generation_prompt": prompt}


def _refused(conversation: Conversation, words: str) -> Problem:
    return _problem("E-DATA-063", conversation, shown(words, 200))


def _lost(conversation: Conversation, found: str) -> Problem:
    return _problem("E-DATA-064", conversation, found)


def _problem(code: str, conversation: Conversation, found: str) -> Problem:
    return Problem(code, conversation.place, found=found, field="messages")
