"""Keep secrets and terminal commands out of what is printed or written for people to read.

`secrets(text)` blanks what looks like a key: tokens of known services, passwords in URLs, `token=...` pairs; `within(values)` does so in
what is about to be written as JSON or YAML.  `terminal(text)` drops escape sequences and control characters, so that text from a data
file or a model cannot recolour the screen, move the cursor, or set the window title.

What this is not: a proof that no secret is left.  A password without a name beside it looks like any other word.
"""

import re
from typing import Any

BLANK = "<hidden>"
_TOKENS = re.compile(  # long, with a capital or a digit, in a path too; a folder called hf_models stays: its path is read back
    r"\b(?:hf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{20,}|sk-(?:[a-z0-9]+-){0,3}(?=[a-z_]*[A-Z0-9])[A-Za-z0-9_]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{12,}|github_pat_[A-Za-z0-9_]{12,}|glpat-[A-Za-z0-9_-]{12,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{30,}|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*)"
)
_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_NAMED = re.compile(
    r"((?:api[_-]?key|access[_-]?key|secret|password|passwd)[\"']?\s*[=:]\s*[\"']?)([^\s\"'&,;}]{6,})"
    r"|(token[\"']?\s*[=:]\s*[\"']?)((?=[^\s\"'&]*\d)[\w./+-]{8,})",
    re.IGNORECASE,
)
_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[P^_X][^\x1b]*(?:\x1b\\)?|\x1b\[[0-?]*[ -/]*[@-~]|\x1b.|\x9b[0-?]*[ -/]*[@-~]"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def secrets(text: str) -> str:
    """`text` with everything that looks like a secret replaced.

    >>> secrets("cloned https://me:pass1234@host/x with HF_TOKEN=hf_AbCdEfGhIjKl0123456789")
    'cloned https://<hidden>@host/x with HF_TOKEN=<hidden>'
    """
    return _NAMED.sub(lambda found: (found[1] or found[3]) + BLANK, _IN_URL.sub(BLANK, _TOKENS.sub(BLANK, text)))


def within(values: Any) -> Any:
    """Nested lists and mappings as JSON has them, every text in them blanked; for what is written as JSON or YAML, because in the finished
    file a blank would take the escape of a quote with it.

    >>> within({"prompt": 'curl "https://x?api_key=abcdef1"', "api_key": "abcdef1", "steps": [3]})
    {'prompt': 'curl "https://x?api_key=<hidden>"', 'api_key': '<hidden>', 'steps': [3]}
    """
    if isinstance(values, dict):
        return {secrets(key): _under(key, value) for key, value in values.items()}
    if isinstance(values, list):
        return [within(value) for value in values]
    return secrets(values) if isinstance(values, str) else values


def _under(key: str, value: Any) -> Any:
    """A text is blanked for its name too."""
    named = secrets(f"{key}={value}") if isinstance(value, str) else ""
    return named.removeprefix(f"{key}=") if named.startswith(f"{key}=") else within(value)


def terminal(text: str) -> str:
    r"""`text` without escape sequences and control characters; line ends and tabs stay.

    >>> terminal("a\x1b[31mred\x1b[0m\x07 line\r\nnext")
    'ared line\nnext'
    """
    return _CONTROLS.sub("", _ESCAPES.sub("", text))
