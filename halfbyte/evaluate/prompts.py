"""Conversations that wait for an answer, and rows that have one, as tokens.

A prompt has exactly the tokens it would have in training: the conversation is rendered with a stand-in answer, encoded as a training row
is (text that spells a special token stays text), and cut before the first token of the answer.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from halfbyte.data.encoding import Encoder, labels_of
from halfbyte.data.faults import Problem, error_of
from halfbyte.data.samples import Conversation, Message
from halfbyte.data.templates import Template
from halfbyte.data.tokenize import IGNORED, Example
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
STAND_IN = "A"


def prompt_tokens(template: Template, tokenizer: "PreTrainedTokenizerBase", talks: Sequence[Messages]) -> list[list[int]]:
    """Tokens of each conversation up to where the model is to speak.  Raises DataError when the template refuses one."""
    for talk in talks:
        for one in talk:
            require_text(str(one["content"]))
    conversations = [
        Conversation((*(Message(str(one["role"]), str(one["content"])) for one in talk), Message("assistant", STAND_IN)), "the prompt")
        for talk in talks
    ]
    rendered = []
    for made in template.spans_of(conversations, "last-assistant"):
        if isinstance(made, Problem):
            raise error_of(made)
        rendered.append(made)
    found = []
    encoded = Encoder(tokenizer).encode_all([one.text for one in rendered], [one.plain for one in rendered])
    for text, tokens in zip(rendered, encoded):
        if tokens is None:
            raise DataError(
                "a prompt that spells a special token must be encodable as plain text",
                code="E-DATA-081",
                place="the prompt",
                found=text.text[:200],
                remedy="write the special token in another way",
            )
        ids, offsets = tokens
        found.append(ids[: first_trained(labels_of(ids, offsets, text.spans))])
    return found


def require_text(prompt: str) -> None:
    """Raise DataError for a text that no tokenizer can take: bytes of a terminal that are not UTF-8 arrive as half characters."""
    half = next((index for index, letter in enumerate(prompt) if "\ud800" <= letter <= "\udfff"), None)
    if half is not None:
        raise DataError(
            "a prompt must be whole characters",
            code="E-DATA-083",
            place="the prompt",
            found=f"half a character at position {half:,}: {prompt[max(0, half - 10) : half + 10]!a}",
            remedy="write it in UTF-8",
            nothing_done="Nothing was generated.",
        )


def prompt_of(example: Example) -> list[int]:
    """The tokens of a row before its first trained one."""
    return example.input_ids[: first_trained(example.labels)]


def first_trained(labels: Sequence[int]) -> int:
    """Index of the first label; the length where there is none."""
    return next((index for index, label in enumerate(labels) if label != IGNORED), len(labels))
