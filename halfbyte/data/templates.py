"""A model's chat template, run in a process of its own, and the stretches of the rendered text that are trained.

    rendered   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    spans                                                             [----------------)      the answer and the text that ends it

`Template.render` gives what transformers' apply_chat_template gives.  `Template.spans` adds the spans (see `spans.py`), found by
rendering marked copies, never by counting tokens of a prefix or by looking for markers among tokens.

A model without a chat template can still train on plain prompt and answer, or alpaca rows: the two small templates below.
"""

import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from halfbyte.data import spans as span_finding
from halfbyte.data.faults import NOTHING, Problem, error_of, shown
from halfbyte.data.samples import Conversation, Message
from halfbyte.data.template_process import RenderFault, TemplateProcess
from halfbyte.errors import ModelError

PLAIN = (
    "{% if add_bos %}{{ bos_token }}{% endif %}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
ALPACA = (
    "{% if add_bos %}{{ bos_token }}{% endif %}Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}\n\n"
    "{% else %}### Instruction:\n{{ message.content }}\n\n### Response:\n{% endif %}{% endfor %}"
)
WITHOUT_CHAT = {"prompt-completion": PLAIN, "alpaca": ALPACA}


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation: the text, the trained (start, end) stretches of it, the stretches that must stay plain text though they
    spell a special token, and the text that ends the last trained answer ("" when the template writes none)."""

    text: str
    spans: list[tuple[int, int]]
    plain: list[tuple[int, int]]
    stop: str


class Template:
    """A chat template with the special tokens of its tokenizer; `close` ends its process.

    source     the jinja text
    specials   names the template may use, e.g. {"bos_token": "<s>"}
    tokens     texts of all special tokens: what an answer may end with, and what must stay plain inside contents
    now        what strftime_now tells; kept, so that all rows and a resumed run are rendered at the same time
    plain      True for the built-in templates of models without one: conversations that were written as chats are refused
    """

    def __init__(
        self,
        source: str,
        specials: dict[str, Any],
        tokens: Iterable[str] = (),
        *,
        now: datetime.datetime | None = None,
        plain: bool = False,
    ) -> None:
        self.source, self.specials, self.plain = source, specials, plain
        self.tokens = tuple(
            sorted({*tokens, *(value for value in specials.values() if isinstance(value, str) and value)}, key=lambda one: (-len(one), one))
        )
        self.now = (now or datetime.datetime.now()).replace(microsecond=0)
        self.process = TemplateProcess(source, specials, self.now.isoformat())

    def close(self) -> None:
        """End the template's process."""
        self.process.close()

    def __enter__(self) -> "Template":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def identity(self) -> str:
        """All that decides what is rendered, but the time of day."""
        return json.dumps([self.source, self.specials, self.tokens, self.plain], sort_keys=True)

    @cached_property
    def tells_time(self) -> bool:
        """Does the template ask for the date?"""
        return "strftime_now" in self.source

    def render(
        self, messages: Sequence[Message] | Sequence[dict[str, Any]], add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The text of one conversation; raises DataError with the template's words when it refuses."""
        plain = [one.as_dict() if isinstance(one, Message) else one for one in messages]
        made = self.render_all([span_finding.job(plain, tools, prompt=add_generation_prompt)])[0]
        if isinstance(made, RenderFault):
            raise error_of(Problem("E-DATA-063", "the conversation", found=shown(made.words, 200)))
        return made

    def render_all(self, jobs: Sequence[dict[str, Any]]) -> list[str | RenderFault]:
        """Texts of many conversations; a RenderFault in place of one the template refuses.  ModelError when it breaks a limit."""
        try:
            return self.process.render(jobs)
        except RenderFault as fault:
            rule, code, expected = LIMIT_RULES[fault.kind]
            raise ModelError(
                rule,
                code=code,
                place=f"the chat template ({len(self.source):,} characters)",
                found=fault.words,
                expected=expected,
                remedy="give another template with --template FILE.jinja",
                nothing_done=NOTHING,
            ) from None

    def spans(self, messages: Sequence[Message], *, tools: list[Any] | None = None, train_on: str = "assistant") -> Rendered:
        """One conversation rendered, with its trained spans; raises DataError when the template refuses or a span cannot be established."""
        made = self.spans_of([Conversation(tuple(messages), "the conversation", tools=tools)], train_on)[0]
        if isinstance(made, Problem):
            raise error_of(made)
        return made

    def spans_of(self, conversations: Sequence[Conversation], train_on: str = "assistant") -> list[Rendered | Problem]:
        """Many conversations rendered, with spans; a Problem in place of each that the template refuses or whose spans are not certain."""
        found = span_finding.find(self.render_all, self.turns, self.tokens, conversations, train_on)
        return [one if isinstance(one, Problem) else Rendered(*one) for one in found]

    @cached_property
    def turns(self) -> "span_finding.Turns":
        """What the template writes around an answer, learnt from two small conversations."""
        return span_finding.learn(self.render_all, self.tokens, self.specials)


LIMIT_RULES = {
    "time": ("a chat template must render a conversation in 2 s", "E-MODEL-061", "less than 2 s"),
    "memory": ("a chat template must not take more than 256 MiB", "E-MODEL-062", "less than 256 MiB"),
    "size": ("a rendered conversation must not be longer than 1,000,000 characters", "E-MODEL-063", "at most 1,000,000 characters"),
    "syntax": ("a chat template must be valid Jinja", "E-MODEL-064", "a template that Jinja can read"),
}


def special_tokens(tokenizer: Any) -> list[str]:
    """Texts of a tokenizer's special tokens."""
    named = {str(token) for token in tokenizer.all_special_tokens}
    return sorted(named | {token.content for token in tokenizer.added_tokens_decoder.values() if token.special})


def from_tokenizer(
    tokenizer: Any, override_path: str | Path | None = None, *, shape: str = "messages", now: datetime.datetime | None = None
) -> Template:
    """The template of a tokenizer, or of a .jinja file; without either a plain one for `shape` prompt-completion and alpaca."""
    specials: dict[str, Any] = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    tokens = special_tokens(tokenizer)
    if override_path is not None:
        return Template(_read_template(Path(override_path)), specials, tokens, now=now)
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if source:
        return Template(source, specials, tokens, now=now)
    if shape not in WITHOUT_CHAT:
        raise ModelError(
            "a model must have a chat template to train on conversations",
            code="E-MODEL-065",
            place=str(tokenizer.name_or_path) or "the tokenizer",
            found="no chat template",
            expected="a chat_template of the tokenizer, or a file",
            remedy="give one with --template FILE.jinja, or train on prompt and completion",
            nothing_done=NOTHING,
        )
    if not tokenizer.eos_token:
        raise error_of(Problem("E-DATA-065", "the tokenizer", found="no end token"))
    ids = tokenizer("a").input_ids
    specials["add_bos"] = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return Template(WITHOUT_CHAT[shape], specials, tokens, now=now, plain=True)


def _read_template(path: Path) -> str:
    """The text of a template file; a byte order mark and Windows line ends do not become part of the prompt."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as fault:
        found = str(fault.strerror)
    except UnicodeDecodeError as fault:
        found = f"not UTF-8 at byte {fault.start:,}"
    raise ModelError(
        "the chat template must be a readable UTF-8 file",
        code="E-MODEL-066",
        place=str(path),
        found=found,
        expected="a .jinja file",
        remedy="check the path given with --template",
        nothing_done=NOTHING,
    )
