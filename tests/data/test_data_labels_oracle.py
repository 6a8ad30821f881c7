"""Labels against an oracle that knows nothing of how they were found.

The oracle makes conversations of words that occur once, lets transformers render them, finds each answer with str.find, and takes the
stop token that the model's own config names.  Which characters are trained then says which tokens are, by the tokenizer's own offsets.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from halfbyte.config.data import DataConfig
from halfbyte.data.samples import Conversation, Message
from halfbyte.data.templates import Template, from_tokenizer
from halfbyte.data.tokenize import tokenize
from tests.data.conftest import ALL_SPECIALS, SPECIALS, dressed, words

CONFIG = DataConfig(path="none.jsonl", max_tokens=8192)
TRIMS = {"llama3", "llama3_1", "llama3_2", "gemma", "gemma3"}  # templates that trim every text
NO_SYSTEM = {"gemma"}
BETWEEN = [" ", " ", " ", " ", "\n", "\n\n", ", ", ". ", " 漢字 ", " é ", "! ", " 12 ", "\t", " - ", " 🙂 "]


@dataclass(frozen=True)
class Case:
    """Messages as a chat API takes them, and the numbers of the trained ones."""

    messages: list[dict[str, str]]

    def sample(self, number: int) -> Conversation:
        return Conversation(tuple(Message(one["role"], one["content"]) for one in self.messages), f"case {number}", number)


def cases(count: int, seed: int, *, system: bool) -> list[Case]:
    """Random conversations of 1 to 4 turns; no word occurs twice in one, one text in ten has white space around it."""
    chance = random.Random(seed)
    store = words(seed + 100, 6000)
    made = []
    for _ in range(count):
        left = iter(chance.sample(store, 120))

        def text(longest: int, left: Any = left) -> str:
            parts = [next(left)]
            for _ in range(chance.randint(0, longest)):
                parts += [chance.choice(BETWEEN), next(left)]
            whole = "".join(parts)
            return chance.choice(["", " ", "  "]) + whole + chance.choice([" ", "\n", ""]) if chance.random() < 0.1 else whole

        messages = [{"role": "system", "content": text(6)}] if system and chance.random() < 0.3 else []
        for _ in range(chance.randint(1, 4)):
            messages += [{"role": "user", "content": text(8)}, {"role": "assistant", "content": text(10)}]
        made.append(Case(messages))
    return made


def trained_characters(text: str, case: Case, name: str) -> np.ndarray:
    """Cumulative count of trained characters of a rendered text, by str.find."""
    flags = np.zeros(len(text) + 1, dtype=np.int64)
    stop = SPECIALS[name][2]
    for message in case.messages:
        if message["role"] != "assistant":
            continue
        content = message["content"].strip() if name in TRIMS else message["content"]
        assert text.count(content.strip()) == 1, "the oracle's own words must be unique"
        start = text.find(content)
        end = start + len(content)
        assert start >= 0 and text.startswith(stop, end), "the template must close an answer with the model's stop token"
        flags[start + 1: end + len(stop) + 1] = 1
    return np.cumsum(flags)


def expected_labels(counts: np.ndarray, ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
    """Tokens that cover at least one trained character; the very first token is no target."""
    labels = [token if counts[max(high, low + 1)] > counts[low] else -100 for token, (low, high) in zip(ids, offsets)]
    return [-100, *labels[1:]]


def check(tokenizer: Any, template: Template, name: str, made: list[Case]) -> int:
    """Compare all cases; the number of tokens compared."""
    result = tokenize([case.sample(number) for number, case in enumerate(made)], tokenizer, template, CONFIG)
    assert len(result.examples) == len(made)
    texts = tokenizer.apply_chat_template([case.messages for case in made], tokenize=False)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    tokens = 0
    for case, text, ids, offsets, example in zip(made, texts, encoded["input_ids"], encoded["offset_mapping"], result.examples):
        counts = trained_characters(text, case, name)
        assert example.input_ids == ids, (name, case)
        wanted = expected_labels(counts, ids, offsets)
        wrong = [number for number, (got, want) in enumerate(zip(example.labels, wanted)) if got != want]
        assert not wrong, (name, case, [(tokenizer.convert_ids_to_tokens(ids[at]), offsets[at]) for at in wrong])
        tokens += len(ids)
    return tokens


def run(kinds: dict[str, Callable[[str], Any]], count: int, name: str) -> dict[str, int]:
    """All tokenizers on one template with the same conversations."""
    made = cases(count, seed=sum(map(ord, name)), system=name not in NO_SYSTEM)
    return {kind: check(tokenizer := make(name), _template(tokenizer), name, made) for kind, make in kinds.items()}


def _template(tokenizer: Any) -> Template:
    return from_tokenizer(tokenizer)


@pytest.mark.parametrize("name", sorted(SPECIALS))
def test_labels_equal_the_character_oracle(name: str, backends: dict[str, Tokenizer]) -> None:
    """Ten public templates, three kinds of tokenizer, no wrong token.  # T8 T10 T11 T12 T13 T14"""
    tokens = run({kind: (lambda name, kind=kind: dressed(backends[kind], name)) for kind in backends}, 200, name)
    assert all(count > 5_000 for count in tokens.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SPECIALS))
def test_labels_equal_the_character_oracle_on_2000_conversations(name: str, backends: dict[str, Tokenizer]) -> None:
    """The full count of every template and kind of tokenizer."""
    run({kind: (lambda name, kind=kind: dressed(backends[kind], name)) for kind in backends}, 2_000, name)


def _starter_dressed(starter_tokenizer: Any, name: str) -> Any:
    import copy

    from tests.data.conftest import source_of

    made = copy.deepcopy(starter_tokenizer)
    begin, end, _ = SPECIALS[name]
    made.add_special_tokens({"additional_special_tokens": ALL_SPECIALS, "eos_token": end} | ({"bos_token": begin} if begin else {}))
    made.chat_template = source_of(name)
    return made


@pytest.mark.parametrize("name", sorted(SPECIALS))
def test_labels_of_the_starter_tokenizer_equal_the_oracle(name: str, starter_tokenizer: Any) -> None:
    """The starter's tokenizer under every template.  # T10"""
    run({"starter": lambda name: _starter_dressed(starter_tokenizer, name)}, 80, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SPECIALS))
def test_labels_of_the_starter_tokenizer_equal_the_oracle_on_2000_conversations(name: str, starter_tokenizer: Any) -> None:
    """The full count with the starter's tokenizer."""
    run({"starter": lambda name: _starter_dressed(starter_tokenizer, name)}, 2_000, name)
