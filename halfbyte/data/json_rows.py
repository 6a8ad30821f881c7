"""JSON lines and JSON files to numbered rows, stricter than the json module.

Refused with line and column: invalid JSON, a cut-off last line, NaN and Infinity, names that stand twice, whole numbers beyond
64 bits, more than 64 levels, lines over 16 MiB, text that is not UTF-8, NUL and half surrogate pairs.  Accepted with a note: a byte
order mark, a JSON array in a .jsonl file, JSON lines in a .json file, an object with one list of rows.  Blank lines are skipped.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.data.faults import Problem, Problems, error_of, shown

Numbered = list[tuple[int, dict[str, Any]]]
Read = tuple[Numbered, list[str], str]  # numbered rows, notes, what the numbers count: "line" or "row"
LINE_LIMIT = 16 * 2**20
DEPTH_LIMIT = 64
_LONG_NUMBER = re.compile(r"\d{19}")
_WIDE_MARKS = ((b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
_SPACE = re.compile(r"[ \t\n\r]*")


class _Refused(Exception):
    """A value the json module would take and we do not: (code, what was found)."""


def read_lines(file: Path, problems: Problems, max_rows: int | None) -> Read:
    """Rows of a .jsonl file."""
    notes: list[str] = []
    rows: Numbered = []
    with open(file, "rb") as opened:
        head = opened.read(4096)
        marked = check_encoding(file, head)
        opened.seek(3 if marked else 0)
        if marked:
            notes.append(f"{file} starts with a byte order mark; it was skipped")
        if head[3 if marked else 0 :].lstrip()[:1] == b"[":
            notes.append(f"{file} is a JSON array, not JSON lines; it was read as rows")
            rows, unit = _array(file, opened.read(), problems, max_rows)
            return rows, notes, unit
        for number, raw in enumerate(_lines(opened), 1):
            if max_rows is not None and len(rows) >= max_rows:
                break
            if len(raw) > LINE_LIMIT:
                problems.add(Problem("E-DATA-013", str(file), number, found=f"more than {LINE_LIMIT:,} bytes"))
                continue
            text = decode_text(file, number, raw, problems)
            if text is not None and text.strip():
                row = _row(file, number, text.rstrip("\r\n"), problems, last=not raw.endswith(b"\n"))
                if row is not None:
                    rows.append((number, row))
    return rows, notes, "line"


def _lines(opened: Any) -> Iterator[bytes]:
    """Lines as bytes; of a line over the limit only its first LINE_LIMIT + 1 bytes are kept."""
    while raw := opened.readline(LINE_LIMIT + 1):
        yield raw
        while len(raw) > LINE_LIMIT and not raw.endswith(b"\n"):
            raw = opened.readline(LINE_LIMIT + 1)
            if not raw:
                return


def read_whole(file: Path, problems: Problems, max_rows: int | None) -> Read:
    """Rows of a .json file: an array of objects, or one object that holds one."""
    raw = file.read_bytes()
    notes: list[str] = []
    if check_encoding(file, raw[:4096]):
        raw = raw[3:]
        notes.append(f"{file} starts with a byte order mark; it was skipped")
    first = raw.lstrip()[:1]
    if first == b"[":
        rows, unit = _array(file, raw, problems, max_rows)
        return rows, notes, unit
    if first == b"{" and _is_lines(raw):
        notes.append(f"{file} holds one JSON object per line; it was read as JSON lines")
        more, said, unit = read_lines(file, problems, max_rows)
        return more, notes + [note for note in said if note not in notes], unit
    text = decode_text(file, 1, raw, problems)
    if text is None or not text.strip():
        return [], notes, "line"
    whole = _row(file, 1, text, problems, last=False)
    if whole is None:
        return [], notes, "line"
    lists = [name for name, value in whole.items() if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)]
    if len(lists) == 1 and "messages" not in lists and "conversations" not in lists:
        notes.append(f"{file} is one object; its field {lists[0]} was read as rows")
        return list(enumerate(whole[lists[0]][:max_rows], 1)), notes, "row"
    return [(1, whole)], notes, "line"


def _is_lines(raw: bytes) -> bool:
    """Does the first line close its object, with another object after it?"""
    lines = [line for line in raw.split(b"\n", 64) if line.strip()][:2]
    return len(lines) == 2 and lines[0].rstrip().endswith(b"}") and lines[1].lstrip().startswith(b"{")


def check_encoding(file: Path, head: bytes) -> bool:
    """True when a UTF-8 byte order mark stands first; refuses UTF-16 and UTF-32."""
    for mark, name in _WIDE_MARKS:
        if head.startswith(mark):
            raise error_of(
                Problem("E-DATA-011", str(file), 1, found=f"looks like {name}", remedy=f"convert it: iconv -f {name} -t UTF-8 FILE > NEW")
            )
    if len(head) >= 4 and (head[1:2] == b"\0" or head[0:1] == b"\0") and head.count(b"\0") * 3 >= len(head):
        name = "UTF-16" if head.count(b"\0") * 2 <= len(head) + 1 else "UTF-32"
        raise error_of(
            Problem(
                "E-DATA-011",
                str(file),
                1,
                found=f"looks like {name} without its mark",
                remedy=f"convert it: iconv -f {name} -t UTF-8 FILE > NEW",
            )
        )
    return head.startswith(b"\xef\xbb\xbf")


def decode_text(file: Path, line: int, raw: bytes, problems: Problems) -> str | None:
    """The text of bytes that start on `line`; None, with a problem noted, when they are not UTF-8 or hold NUL."""
    if b"\0" in raw:
        problems.add(Problem("E-DATA-012", str(file), line, found=f"a NUL byte at column {raw.index(0) + 1:,}"))
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as fault:
        inside = line + raw[: fault.start].count(b"\n")
        column = fault.start - (raw.rfind(b"\n", 0, fault.start) + 1) + 1
        near = raw[max(0, fault.start - 12) : fault.start + 12].decode("latin-1")
        problems.add(
            Problem("E-DATA-010", str(file), inside, found=f"byte 0x{raw[fault.start]:02x} at column {column:,}, near {shown(near)}")
        )
        return None


def _row(file: Path, line: int, text: str, problems: Problems, *, last: bool) -> dict[str, Any] | None:
    """The object in `text`, or None with a problem noted; `last` says that no line end follows."""
    try:
        value = _decoder(text).decode(text)
        _check(value, text)
    except json.JSONDecodeError as fault:
        problems.add(_json_problem(file, line, text, fault, last))
        return None
    except _Refused as refusal:
        problems.add(Problem(refusal.args[0], str(file), line, field=refusal.args[2], found=refusal.args[1]))
        return None
    except RecursionError:
        problems.add(Problem("E-DATA-026", str(file), line, found="hundreds of levels"))
        return None
    if not isinstance(value, dict):
        problems.add(Problem("E-DATA-022", str(file), line, found=shown(value)))
        return None
    return value


def _json_problem(file: Path, line: int, text: str, fault: json.JSONDecodeError, last: bool) -> Problem:
    cut = fault.pos >= len(text.rstrip()) or fault.msg.startswith("Unterminated")
    near = shown(text[max(0, fault.pos - 20) : fault.pos + 20])
    if last and cut:
        return Problem("E-DATA-021", str(file), line, found=f"the text ends at column {len(text) + 1:,}: {near}")
    words = fault.msg if fault.msg.startswith(("Expecting", "Extra", "Invalid", "Unterminated", "Illegal")) else "invalid JSON"
    return Problem("E-DATA-020", str(file), line + fault.lineno - 1, found=f"column {fault.colno:,}: {words}, near {near}")


def _array(file: Path, raw: bytes, problems: Problems, max_rows: int | None) -> tuple[Numbered, str]:
    """Objects of a JSON array, each with the line it starts on; with its row number where all stand on one line."""
    text = decode_text(file, 1, raw, problems)
    if text is None:
        return [], "line"
    unit = "line" if "\n" in text.strip() else "row"
    rows: Numbered = []
    decoder = _decoder(text)
    position = text.index("[") + 1
    line, counted, number = 1, 0, 0
    while True:
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        if text[position : position + 1] == "]" or (max_rows is not None and len(rows) >= max_rows):
            return rows, unit
        line, counted, number = line + text.count("\n", counted, position), position, number + 1
        at = line if unit == "line" else number
        try:
            value, position = decoder.raw_decode(text, position)
            _check(value, text)
            if isinstance(value, dict):
                rows.append((at, value))
            else:
                problems.add(Problem("E-DATA-022", str(file), at, found=shown(value), unit=unit))
            position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position += text[position] == ","
        except json.JSONDecodeError as fault:
            problems.add(_json_problem(file, 1, text, fault, last=True))
            return rows, unit
        except _Refused as refusal:
            problems.add(Problem(refusal.args[0], str(file), at, refusal.args[2], refusal.args[1], unit=unit))
            return rows, unit
        except RecursionError:
            problems.add(Problem("E-DATA-026", str(file), at, found="hundreds of levels", unit=unit))
            return rows, unit


def _decoder(text: str) -> json.JSONDecoder:
    whole_number = _int_64 if _LONG_NUMBER.search(text) else None
    return json.JSONDecoder(object_pairs_hook=_once, parse_constant=_finite, parse_int=whole_number, parse_float=_finite_float)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused("E-DATA-023", f"{shown(twice)} stands {names.count(twice)} times", twice)
    return made


def _finite(word: str) -> Any:
    raise _Refused("E-DATA-024", word, "")


def _finite_float(word: str) -> float:
    value = float(word)
    if value in (float("inf"), float("-inf")):
        raise _Refused("E-DATA-024", word, "")
    return value


def _int_64(word: str) -> int:
    if len(word) > 20 or not -(2**63) <= int(word) < 2**63:
        raise _Refused("E-DATA-025", shown(word, 40), "")
    return int(word)


def _check(value: Any, text: str) -> None:
    """Depth, NUL and half surrogates; each looked for only where the text can hold it."""
    if text.count("[") + text.count("{") > DEPTH_LIMIT:
        _check_depth(value, 1)
    if "\\u" in text:
        _check_text(value, "")


def _check_depth(value: Any, depth: int) -> None:
    if isinstance(value, (dict, list)):
        if depth > DEPTH_LIMIT:
            raise _Refused("E-DATA-026", f"more than {DEPTH_LIMIT} levels", "")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, depth + 1)


def _check_text(value: Any, path: str) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise _Refused("E-DATA-028", f"\\u0000 at character {value.index(chr(0)) + 1:,}", path)
        half = re.search("[\ud800-\udfff]", value)
        if half:
            raise _Refused("E-DATA-027", f"\\u{ord(half[0]):04x} at character {half.start() + 1:,}", path)
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_text(name, f"{path}.{name}".lstrip("."))
            _check_text(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_text(inner, f"{path}[{number}]")
