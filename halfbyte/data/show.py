"""An example as text, cut where training begins and ends, for `halfbyte data show` to colour."""

from typing import Any

from halfbyte.data.tokenize import IGNORED, Example


def segments(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, trained) stretches of an example, as the tokenizer decodes them; no text can move the cursor or colour the terminal."""
    made: list[tuple[str, bool]] = []
    run: list[int] = []
    trained = False
    for token, label in zip(example.input_ids, example.labels):
        if run and (label != IGNORED) != trained:
            made.append((_decode(run, tokenizer), trained))
            run = []
        trained = label != IGNORED
        run.append(token)
    if run:
        made.append((_decode(run, tokenizer), trained))
    return made


def printable(text: str) -> str:
    """The text with control characters, but for line ends and tabs, written out.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join(mark if mark.isprintable() or mark in "\n\t" else repr(mark)[1:-1] for mark in text)


def _decode(ids: list[int], tokenizer: Any) -> str:
    return printable(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
