"""Text to token ids with the stretch of text that each token covers.

The ids are those of the tokenizer without added special tokens (the template writes its own).  Offsets come from a copy of the
tokenizer without post-processor, since some post-processors trim the space off a token's stretch.  A stretch that must stay plain
though it spells a special token is encoded by a second copy that knows no special tokens.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from halfbyte.data.faults import NOTHING
from halfbyte.errors import UnsupportedError

Span = tuple[int, int]
GUARDS = ("\n", " ", "a", "0", ".")


class Encoder:
    """Encodes rendered texts with one tokenizer; the tokenizer itself is not changed."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UnsupportedError(
                "training needs a tokenizer that tells which text each token covers",
                code="E-UNSUP-061",
                place=type(tokenizer).__name__,
                found="a tokenizer without the tokenizers library behind it",
                expected="a tokenizer.json in the model's folder",
                remedy="convert the tokenizer to tokenizer.json",
                nothing_done=NOTHING,
            )
        settings = json.loads(backend.to_str())
        settings.update(post_processor=None, truncation=None, padding=None)
        self.normal = Tokenizer.from_str(json.dumps(settings))
        self.without_specials = Tokenizer.from_str(json.dumps(settings))
        self.without_specials.encode_special_tokens = True
        self.specials = {token for token, added in self.normal.get_added_tokens_decoder().items() if added.special}
        self.identity = json.dumps(settings, sort_keys=True)

    def encode_all(self, texts: Sequence[str], plain: Sequence[Sequence[Span]]) -> list[tuple[list[int], list[Span]] | None]:
        """(ids, (start, end) of each id) of each text; None where a plain stretch cannot be kept plain."""
        easy = self.normal.encode_batch([text if not stretches else "" for text, stretches in zip(texts, plain)], add_special_tokens=False)
        return [
            (made.ids, made.offsets) if not stretches else self._in_pieces(text, stretches)
            for text, stretches, made in zip(texts, plain, easy)
        ]

    def _in_pieces(self, text: str, plain: Sequence[Span]) -> tuple[list[int], list[Span]] | None:
        """Encode a text piece by piece, the plain stretches without special tokens."""
        ids: list[int] = []
        offsets: list[Span] = []
        at = 0
        for start, end in [*plain, (len(text), len(text))]:
            for made, begins in (
                (self._piece(self.normal, text[at:start], first=at == 0), at),
                (self._spelt(text[start:end], first=start == 0), start),
            ):
                if made is None:
                    return None
                ids += made[0]
                offsets += [(begins + low, begins + high) for low, high in made[1]]
            at = end
        return ids, offsets

    def _spelt(self, piece: str, *, first: bool) -> tuple[list[int], list[Span]] | None:
        """Encode the text of a special token without that token; a model that knows the text as one of its pieces gets it in two."""
        whole = self._piece(self.without_specials, piece, first=first)
        if whole is None or self.specials.isdisjoint(whole[0]):
            return whole
        head = self._piece(self.without_specials, piece[:1], first=first)
        tail = self._piece(self.without_specials, piece[1:], first=False)
        if head is None or tail is None or not self.specials.isdisjoint([*head[0], *tail[0]]):
            return None
        return [*head[0], *tail[0]], [*head[1], *((low + 1, high + 1) for low, high in tail[1])]

    @staticmethod
    def _piece(tokenizer: Tokenizer, piece: str, *, first: bool) -> tuple[list[int], list[Span]] | None:
        """Encode a piece from the middle of a text behind a guard character, so that nothing is put before it as at a text's start."""
        if not piece:
            return [], []
        if first:
            made = tokenizer.encode(piece, add_special_tokens=False)
            return made.ids, made.offsets
        for guard in GUARDS:
            made = tokenizer.encode(guard + piece, add_special_tokens=False)
            behind = [number for number, (_, high) in enumerate(made.offsets) if high > len(guard)]
            if behind == list(range(len(made.ids) - len(behind), len(made.ids))) and all(
                made.offsets[number][0] >= len(guard) for number in behind
            ):
                return [made.ids[number] for number in behind], [
                    (low - 1, high - 1) for low, high in (made.offsets[number] for number in behind)
                ]
        return None


def labels_of(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span], ignored: int = -100) -> list[int]:
    """Each id inside a span as its own label, -100 elsewhere.

    A token that covers any character of a span belongs to it, so a token over the border of prompt and answer belongs to the answer.
    A token that covers no character belongs to the character at its place.
    """
    labels = [ignored] * len(ids)
    waiting = iter(sorted(spans))
    span = next(waiting, None)
    for number, (low, high) in enumerate(offsets):
        while span is not None and span[1] <= low:
            span = next(waiting, None)
        if span is not None and max(high, low + 1) > span[0]:
            labels[number] = ids[number]
    return labels


def class_tokens(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text that is classified, with what the tokenizer puts around it; none of an empty one."""
    return list(tokenizer(text, verbose=False).input_ids) if text.strip() else []
