"""The process in which chat templates run: a model's template is code made by someone else, and the sandbox alone does not stop a loop.

    standard input    one line of JSON {"template", "specials", "now"}, then lines {"jobs": [{"messages", "tools", ...}]}
    standard output   one line for the template, then one line for each job: {"text"} or {"error", "kind"}

Limits: 2 s of processor time a render (the kernel's alarm ends the process, also inside C code and also when nobody listens any
more), 256 MiB over the size at start, 1,000,000 characters of output, no file may be written.  The environment is the one transformers
gives templates: immutable sandbox, trim_blocks, lstrip_blocks, loop controls, tojson, raise_exception, strftime_now, `{% generation %}`
accepted and ignored.
Run with `python -m halfbyte.data.template_worker`; imports neither torch nor transformers.

Source: https://github.com/huggingface/transformers/blob/main/src/transformers/utils/chat_template_utils.py
"""

import datetime
import json
import resource
import signal
import sys
import time
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

SECONDS = 2.0
MEMORY_BYTES = 256 * 2**20
OUTPUT_CHARACTERS = 1_000_000


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` renders what stands inside; our labels do not need the marks."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Any) -> str:
        return str(caller())


class _Namespace(jinja2.utils.Namespace):
    """A namespace that takes no underscore names."""

    def __init__(*args: Any, **attributes: Any) -> None:
        jinja2.utils.Namespace.__init__(*args, **attributes)
        for name in dict(*args[1:], **attributes):
            _plain_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _plain_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _plain_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not store the name {name!r}")


class _Dict:
    """What `dict(...)` in a template calls: makes a dict and offers nothing else to walk to."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment(now: datetime.datetime) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment chat templates are written for; `now` is what strftime_now tells."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals.update(raise_exception=_raise_exception, strftime_now=now.strftime, dict=_Dict(), namespace=_Namespace)
    return made


def _set_limits() -> None:
    """Memory, files and core dumps; after all imports, so that the size at start is the size of the empty worker."""
    if sys.platform == "linux":  # elsewhere the address space of a fresh process is no measure
        with open("/proc/self/statm") as about:
            size = int(about.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _render(template: jinja2.Template, specials: dict[str, str], job: dict[str, Any]) -> dict[str, str]:
    """One reply."""
    parts: list[str] = []
    length = 0
    try:
        given = {"tools": None, "documents": None, **specials, **job}
        for part in template.generate(**given):
            length += len(part)
            if length > OUTPUT_CHARACTERS:
                return {"kind": "size", "error": f"more than {OUTPUT_CHARACTERS:,} characters"}
            parts.append(part)
        return {"text": "".join(parts)}
    except MemoryError:
        return {"kind": "memory", "error": f"more than {MEMORY_BYTES // 2**20} MiB"}
    except RecursionError:
        return {"kind": "template", "error": "the template calls itself without end"}
    except (
        jinja2.exceptions.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        ArithmeticError,
        OverflowError,
    ) as fault:
        return {"kind": "template", "error": f"{fault}"[:500] or type(fault).__name__}


def _answer(reply: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    time.localtime()  # read the time zone file while files may still be opened
    setup = json.loads(sys.stdin.readline())
    _set_limits()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        template = environment(datetime.datetime.fromisoformat(setup["now"])).from_string(setup["template"])
    except (jinja2.exceptions.TemplateError, RecursionError, MemoryError, ValueError, OverflowError) as fault:
        line = getattr(fault, "lineno", None)
        _answer({"kind": "syntax", "error": (f"line {line}: " if line else "") + (str(fault)[:500] or type(fault).__name__)})
        return 1
    signal.setitimer(signal.ITIMER_PROF, 0)
    _answer({"text": ""})
    for line in sys.stdin:
        for job in json.loads(line)["jobs"]:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            reply = _render(template, setup["specials"], job)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _answer(reply)
    return 0


if __name__ == "__main__":
    sys.exit(main())
