"""Every rule a data file can break, and the one block in which all breaches of a file are told.

A `Problem` is one breach at one place.  `Problems` collects them over a whole file, lets `skip_bad_rows` rows go, and raises one
`DataError` that shows the first 20.  The rules are a table, so that each code stands for exactly one rule.
It does not read files.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from halfbyte.errors import DataError

SHOWN = 20
NOTHING = "Nothing was trained."


@dataclass(frozen=True)
class Rule:
    """What must hold, what is allowed, and what to do about a breach."""

    rule: str
    expected: str
    remedy: str


RULES: dict[str, Rule] = {
    # the file
    "E-DATA-001": Rule("the data file must exist", "a path to a file or folder", "check the path"),
    "E-DATA-002": Rule("the data file must be readable", "a file this user may read", "change its permissions (chmod u+r FILE)"),
    "E-DATA-003": Rule(
        "data must be a regular file or a folder", "a file or a folder, not a pipe, socket or device", "write the data to a file first"
    ),
    "E-DATA-004": Rule(
        "a data folder must hold a training file",
        "train.jsonl, train.json, train.csv, train.tsv or train.parquet in the folder",
        "name the file itself, or rename the training file to train.jsonl",
    ),
    "E-DATA-005": Rule("a pattern must match at least one file", "one or more files", "check the pattern"),
    "E-DATA-006": Rule(
        "the kind of file must be known",
        "a name that ends in .jsonl, .json, .csv, .tsv or .parquet",
        "convert the file, or rename it if only the ending is wrong",
    ),
    "E-DATA-007": Rule(
        "archives and compressed files are not read",
        "an uncompressed .jsonl, .json, .csv, .tsv or .parquet",
        "unpack it first (gunzip FILE, unzip FILE)",
    ),
    "E-DATA-008": Rule("a data file must hold rows", "at least one row", "check that the export finished"),
    "E-DATA-009": Rule(
        "a data file must not change while it is read",
        "the same size and time before and after",
        "wait until the writer has finished, then start again",
    ),
    "E-DATA-010": Rule("text must be UTF-8", "UTF-8", "convert it: iconv -f LATIN1 -t UTF-8 FILE > NEW"),
    "E-DATA-011": Rule("text must be UTF-8", "UTF-8 without a UTF-16 or UTF-32 mark", "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    "E-DATA-012": Rule(
        "a text file must not hold NUL bytes", "text", "check that this is a text file; remove the bytes: tr -d '\\000' < FILE > NEW"
    ),
    "E-DATA-013": Rule(
        "a line must not be longer than 16 MiB", "at most 16,777,216 bytes", "split the row, or check for missing line ends"
    ),
    # JSON
    "E-DATA-020": Rule(
        "each line must be valid JSON", "one JSON object per line", "repair the line, or let it go with data.skip_bad_rows=N"
    ),
    "E-DATA-021": Rule(
        "the last line must be complete", "a closed JSON object and a line end", "the file may be half-copied; copy it again"
    ),
    "E-DATA-022": Rule(
        "each row must be an object with named fields",
        'an object such as {"prompt": "...", "completion": "..."}',
        "write each row as an object",
    ),
    "E-DATA-023": Rule("a name must not stand twice in one object", "each name once", "remove one of the two"),
    "E-DATA-024": Rule("numbers must be finite", "a number, not NaN or Infinity", "remove the value or write it as text"),
    "E-DATA-025": Rule("whole numbers must fit 64 bits", "a number between -2^63 and 2^63 - 1", "write it as text"),
    "E-DATA-026": Rule("values must not nest deeper than 64 levels", "at most 64 levels", "flatten the row"),
    "E-DATA-027": Rule(
        "text must not hold half a surrogate pair", "whole characters", "write the character itself, or both halves of its pair"
    ),
    "E-DATA-028": Rule("text must not hold the NUL character", "text without \\u0000", "remove the character"),
    # tables
    "E-DATA-030": Rule(
        "a table must be separated by commas", "a header of comma-separated names", "save the file with commas (.csv), or with tabs as .tsv"
    ),
    "E-DATA-031": Rule(
        "each line of a table must have as many cells as the header",
        "as many cells as the header has names",
        "quote cells that hold a comma or a line end",
    ),
    "E-DATA-032": Rule(
        "the first line of a table must name its columns", "each name once, none empty, such as prompt,completion", "add a header line"
    ),
    "E-DATA-033": Rule("quotes must be closed", 'each " with its partner; a quote inside a cell is doubled', "close the quote"),
    "E-DATA-034": Rule("a parquet file must be whole", "a parquet file", "copy it again"),
    # the shape
    "E-DATA-040": Rule(
        "the rows must have a known shape",
        "prompt and completion | messages | conversations | instruction and output | text | text and label | input_ids",
        "rename the fields, or name them: data.text_field=..., for labels data.label_field=... too",
    ),
    "E-DATA-041": Rule("all rows must have the same shape", "one shape per file", "split the file, or convert the rows"),
    "E-DATA-042": Rule(
        "preference pairs cannot be trained by this program", "rows with one answer", "keep the chosen answer as completion"
    ),
    "E-DATA-043": Rule("a field must not be missing or null", "text", "fill it in, or remove the row"),
    "E-DATA-044": Rule("a field must be text", "text", "write it in quotes"),
    "E-DATA-045": Rule("a role must be known", "system, user, assistant, tool", "correct the role"),
    "E-DATA-046": Rule(
        "messages must be a list of objects with role and content",
        '[{"role": "user", "content": "..."}, ...]',
        "write each message as an object with role and content",
    ),
    "E-DATA-047": Rule(
        "content parts must be text",
        'text, or parts {"type": "text", "text": "..."}',
        "images, sound and video are not supported; remove these parts",
    ),
    "E-DATA-048": Rule("a conversation must have a user message", "at least one user message", "add the question"),
    "E-DATA-049": Rule(
        "a conversation must not end with a user message",
        "an assistant or tool message at the end",
        "remove the last message or add the answer",
    ),
    "E-DATA-050": Rule(
        "a conversation may have one system message, and it comes first",
        "no or one system message, at the start",
        "join the system messages",
    ),
    "E-DATA-051": Rule("tools must be a list of objects", "a list of JSON-schema objects", "see the chat template of the model"),
    "E-DATA-052": Rule(
        "token numbers must be whole and in the vocabulary",
        "a list of whole numbers between 0 and the vocabulary's size",
        "tokenize again with this model's tokenizer",
    ),
    "E-DATA-053": Rule(
        "labels must be -100 or the token at the same place",
        "as many labels as tokens, each -100 or equal to its token",
        "do not shift the labels; the loss does that once",
    ),
    "E-DATA-054": Rule("a label must be text or a whole number", "text or a whole number", "correct the label"),
    "E-DATA-055": Rule("a label must be one of the model's labels", "one of model.labels", "correct the label, or add it to model.labels"),
    "E-DATA-056": Rule("the shape's fields must be there", "the fields of the shape", "rename the fields, or choose another data.shape"),
    # labels and lengths
    "E-DATA-060": Rule(
        "at least 95 % of the rows must have something to learn", "an assistant text in each row", "remove the rows without an answer"
    ),
    "E-DATA-061": Rule(
        "at least one row must be left to train on", "one row or more", "raise data.max_tokens, or see why rows were dropped"
    ),
    "E-DATA-062": Rule(
        "no row may be longer than data.max_tokens when data.long_rows=refuse",
        "at most data.max_tokens tokens",
        "raise data.max_tokens, or choose data.long_rows=drop or cut-prompt",
    ),
    "E-DATA-063": Rule(
        "the chat template must take every conversation",
        "a conversation in the order the template knows",
        "correct the order of the roles, or give another template with --template",
    ),
    "E-DATA-064": Rule(
        "the assistant's text must be found in the rendered conversation",
        "the text of each assistant message, once",
        "remove the row, or give another template with --template",
    ),
    "E-DATA-065": Rule(
        "a stop token must be trained, or the model never stops",
        "a template that closes each answer with a token of the tokenizer",
        "give a template that ends each answer with the tokenizer's end token with --template",
    ),
    "E-DATA-066": Rule("a row must not hold more than 10 million tokens", "at most 10,000,000 tokens", "split the row"),
    "E-DATA-067": Rule("duplicate rows are refused in strict mode", "each row once", "remove the duplicates, or leave out data.strict"),
    "E-DATA-068": Rule(
        "evaluation rows must not be training rows in strict mode", "no row in both", "remove them from one of the two files"
    ),
    "E-DATA-069": Rule(
        "special tokens in text must stay plain text",
        "text that can be encoded without its special token",
        "remove the special token's text from the row",
    ),
    "E-DATA-070": Rule(
        "the packed or cut data must hold exactly the tokens that came in",
        "equal counts",
        "this is a bug of the program; please report it with the file",
    ),
    # data sets on a hub
    "E-DATA-086": Rule("a hub data set must be named owner/name", "hub:owner/name or hub:owner/name:split", "correct the name"),
    "E-DATA-087": Rule(
        "the hub data set must be reachable", "a public data set of data files, and a network", "download the files and name them instead"
    ),
    # checks over the file
    "E-DATA-085": Rule(
        "evaluation rows must leave rows to train on", "fewer evaluation rows than rows", "lower data.eval_rows, or give data.eval_path"
    ),
}


@dataclass(frozen=True)
class Problem:
    """One breach: which rule, where (file, line, unit "line" or "row", field), what was found; the rule's own words unless overridden."""

    code: str
    file: str
    line: int = 0
    field: str = ""
    found: str = ""
    expected: str = ""
    remedy: str = ""
    unit: str = "line"

    @property
    def place(self) -> str:
        where = self.file + (f" {self.unit} {self.line:,}" if self.line else "")
        return where + (f", field {self.field}" if self.field else "")


def error_of(problem: Problem, *, found: str = "") -> DataError:
    """The error of one problem."""
    rule = RULES[problem.code]
    return DataError(
        rule.rule,
        code=problem.code,
        place=problem.place,
        found=found or problem.found,
        expected=problem.expected or rule.expected,
        remedy=problem.remedy or rule.remedy,
        nothing_done=NOTHING,
    )


class Problems:
    """Collects the problems of a file; a row with problems is a bad row, and `skip_bad_rows` of them may go."""

    def __init__(self, skip_bad_rows: int = 0) -> None:
        self.allowed = skip_bad_rows
        self.found: list[Problem] = []

    def add(self, problem: Problem) -> None:
        self.found.append(problem)

    @property
    def bad_rows(self) -> int:
        """Number of different rows with a problem."""
        return len({(problem.file, problem.line) for problem in self.found})

    def settle(self) -> list[str]:
        """A note for skipped rows, or the error of all problems when more rows are bad than may go."""
        if not self.found:
            return []
        if self.bad_rows > self.allowed:
            files = list(dict.fromkeys(problem.file for problem in self.found))
            raise combined(sorted(self.found, key=lambda problem: (files.index(problem.file), problem.line)))
        lines = ", ".join(f"{line:,}" for line in sorted({problem.line for problem in self.found})[:SHOWN])
        return [
            f"{self.bad_rows} bad rows of {self.found[0].file} skipped ({self.found[0].unit} {lines}): {RULES[self.found[0].code].rule}"
        ]


def combined(problems: Iterable[Problem]) -> DataError:
    """One error for all problems: the first in full, then the others, at most 20 in all."""
    every = list(problems)
    first, rest = every[0], every[1:]
    if not rest:
        return error_of(first)
    alike = all(problem.code == first.code for problem in rest)
    lines = [first.found]
    for problem in rest[: SHOWN - 1]:
        at = problem.place if problem.file != first.file else problem.place[len(problem.file) :].strip()
        lines.append(f"also {at}: {problem.found}" + ("" if alike else f" ({problem.code}: {RULES[problem.code].rule})"))
    if len(every) > SHOWN:
        lines.append(f"and {len(every) - SHOWN:,} more")
    count = len({(problem.file, problem.line) for problem in every})
    lines.append(f"{len(every):,} problems in {count:,} row{'s' if count > 1 else ''}")
    return error_of(first, found="\n".join(lines))


def shown(value: object, limit: int = 80) -> str:
    """A value as short text without control characters, so that no data can move the cursor or colour the terminal.

    >>> shown("a\\x1b[31m")
    '"a\\\\x1b[31m"'
    """
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    text = "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"
