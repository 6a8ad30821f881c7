"""How long the rows of a data file are, without loading transformers: an estimate for a plan.

Text is counted with the model's tokenizer.json where it is at hand, else as one token for CHARACTERS_PER_TOKEN characters.  What a chat
template adds is not known here and is allowed for: TEMPLATE_TOKENS a row and MESSAGE_TOKENS a message.  Training counts exactly.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.data.rows import Row, read_rows

CHARACTERS_PER_TOKEN = 3
TEMPLATE_TOKENS, MESSAGE_TOKENS = 32, 8


@dataclass(frozen=True)
class Lengths:
    """Estimated tokens of each row; `how` says how they were counted."""

    tokens: tuple[int, ...]
    how: str

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.tokens)


def texts_of(value: Any) -> list[str]:
    """All texts in a row, whatever its shape.

    >>> texts_of({"messages": [{"role": "user", "content": "hi"}], "n": 3})
    ['user', 'hi']
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for inner in value.values() for text in texts_of(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in texts_of(inner)]
    return []


def lengths(path: str, tokenizer: Path | None = None) -> Lengths:
    """Estimated lengths of the rows of a file; raises DataError for a file that cannot be read."""
    rows = read_rows(path).rows
    extra = [TEMPLATE_TOKENS + MESSAGE_TOKENS * _messages(row) for row in rows]
    joined = ["\n".join(texts_of(row.values)) for row in rows]
    if tokenizer is None:
        counts = [-(-len(text) // CHARACTERS_PER_TOKEN) for text in joined]
        how = f"one token for {CHARACTERS_PER_TOKEN} characters"
    else:
        from tokenizers import Tokenizer

        encode = Tokenizer.from_file(str(tokenizer)).encode_batch
        counts = [len(encoded.ids) for start in range(0, len(joined), 1000) for encoded in encode(joined[start : start + 1000])]
        how = "the model's tokenizer"
    return Lengths(tuple(count + more for count, more in zip(counts, extra, strict=True)), how)


def _messages(row: Row) -> int:
    lists = [value for value in row.values.values() if isinstance(value, list)]
    return max([len(one) for one in lists if one and isinstance(one[0], dict)], default=len(row.values))
