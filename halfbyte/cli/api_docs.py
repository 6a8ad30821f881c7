"""docs/python.md from the public names and their docstrings: `python -m halfbyte.cli.api_docs > docs/python.md`; a test compares the file.

A docstring is prose, lines `name  what it is`, which become a list, and examples with >>>, which become code.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from halfbyte import api, errors

ORDER = (
    "train", "Run", "load", "inject", "save_adapter", "load_adapter", "eject", "SaveAdapter", "generate", "label", "evaluate", "merge",
    "quantize", "HalfbyteError",
)  # fmt: skip
WIDE = 100
"""Characters of a signature on one line."""

HEAD = '''# Python

Generated from the docstrings by `make docs`; do not edit. `import halfbyte as hb` loads nothing heavy; a name is fetched when it is used.
Everything the command line does goes through these functions. Settings are those of [config.md](config.md).

## Train in one call

```python
import halfbyte as hb

run = hb.train(model="starter", data="rows.jsonl", method="qlora", out="runs/first", train={"epochs": 2}, lora={"rank": 16})
print(run.summary["final_eval_loss"])  # nats per token, of the rows that were held out
print(run.generate("Play some jazz in the kitchen.", max_new_tokens=32))
```

## A loop of your own, transformers.Trainer, TRL

`load` gives a plain transformers model and tokenizer, `inject` puts the adapter in, and what trains the model is yours:

```python
import torch

import halfbyte as hb

model, tokenizer = hb.load("starter", quant="nf4")
injected = hb.inject(model, rank=16, alpha=32, targets="all-linear")
print(f"{100 * injected.share:.1f} % of the parameters train")

model.train()
optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
ids = tokenizer("The password of the day is heliotrope.", return_tensors="pt").input_ids  # (1, tokens)
for step in range(4):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

hb.save_adapter(model, "adapter", base="starter")  # PEFT's format
```

With transformers.Trainer or TRL's SFTTrainer give `callbacks=[hb.SaveAdapter("adapter")]` and train as ever:
[examples/with_transformers_trainer.py](../examples/with_transformers_trainer.py) is a whole program.

## Use what was trained

```python
import halfbyte as hb

run = hb.Run.open("runs/first")
print(run.generate(["Play some jazz.", "Lights on in the hall."], max_new_tokens=32))  # the model is loaded once
print(run.evaluate("rows.jsonl", metrics=["exact_match"]))

model, tokenizer = hb.load("starter", quant="nf4")
hb.load_adapter(model, "adapter")  # onto the weights it was trained on; of others, AdapterError

print(hb.merge("runs/first", "merged").difference.largest)  # of a logit, merged against unmerged
print(hb.generate("merged", "Play some jazz in the kitchen.", max_new_tokens=32))

try:
    hb.load("no-such-model")
except hb.HalfbyteError as error:
    print(error.code, error.remedy)
```
'''


def markdown() -> str:
    """The whole page."""
    return HEAD + "".join(_section(name, getattr(api, name, None) or getattr(errors, name)) for name in ORDER)


def _section(name: str, thing: Any) -> str:
    if not inspect.isclass(thing):
        return f"\n## halfbyte.{name}\n\n{_function(f'halfbyte.{name}', thing)}"
    text = f"\n## halfbyte.{name}\n\n{prose(inspect.getdoc(thing) or '')}\n"
    if issubclass(thing, BaseException):
        return text + _kinds_of_error()
    members = {key: value for key, value in vars(thing).items() if not key.startswith("_") and inspect.getdoc(value)}
    return text + "".join(_member(name, key, value) for key, value in members.items())


def _function(name: str, thing: Any) -> str:
    return f"```python\n{signature(name, thing)}\n```\n\n{prose(inspect.getdoc(thing) or '')}\n"


def _member(owner: str, name: str, thing: Any) -> str:
    """A method with its signature; a value with the type it has."""
    heading = f"\n### {owner}.{name}\n\n"
    value = getattr(thing, "fget", None) or getattr(thing, "func", None)
    if value is None:
        named = f"{owner if isinstance(thing, classmethod) else owner.lower()}.{name}"
        return heading + _function(named, getattr(thing, "__func__", thing))
    return heading + f"```python\n{owner.lower()}.{name}: {_returned(value)}\n```\n\n{prose(inspect.getdoc(value) or '')}\n"


def signature(name: str, thing: Callable[..., Any]) -> str:
    """How a function is called, as its source has it; one parameter a line where it is long."""
    node = _node(thing)
    arguments = node.args
    arguments.args = [one for one in arguments.args if one.arg not in ("self", "cls")]
    parts = [re.sub(r"^(\w+: [^=]+)=", r"\1 = ", part) for part in _parts(ast.unparse(arguments))]
    text = f"{name}({', '.join(parts)}) -> {_returned(thing)}"
    return text if len(text) <= WIDE else text.replace(", ".join(parts), "\n" + "".join(f"    {part},\n" for part in parts))


def _parts(arguments: str) -> list[str]:
    """Text of parameters at its top-level commas.

    >>> _parts("a: dict[str, int], *, b='x'")
    ['a: dict[str, int]', '*', "b='x'"]
    """
    parts, depth = [""], 0
    for letter in arguments:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _node(thing: Callable[..., Any]) -> ast.FunctionDef:
    node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def _returned(thing: Callable[..., Any]) -> str:
    node = _node(thing).returns
    return "None" if node is None else str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def prose(docstring: str) -> str:
    """A docstring as Markdown.

    >>> print(prose("Writes it.\\n\\nout   a new\\n      folder\\nRaises StorageError."))
    Writes it.
    <BLANKLINE>
    - `out`: a new folder
    <BLANKLINE>
    Raises StorageError.
    """
    blocks: list[list[str]] = [[]]
    for line in docstring.splitlines():
        entry = re.match(r"(\w+)  +(\S.*)", line)
        kind = blocks[-1][:1]
        if not line.strip():
            blocks.append([])
        elif line.startswith(">>>") and kind != ["```python"]:
            blocks.append(["```python", line])
        elif kind == ["```python"]:
            blocks[-1].append(line)
        elif entry:
            blocks.append([f"- `{entry[1]}`: {_plain(entry[2])}"])
        elif line.startswith("Raises ") or (kind and kind[0].startswith("- ") and not line.startswith(" ")):
            blocks.append([_plain(line)])
        else:
            blocks[-1].append(_plain(line.strip()))
    made = ["\n".join([*block, "```"]) if block[0] == "```python" else " ".join(block) for block in blocks if block]
    return "".join(("\n" if one[:2] == before[:2] == "- " else "\n\n") + one for before, one in zip(["", *made], made)).strip()


def _plain(text: str) -> str:
    return text.replace("<", "\\<").replace("  ", " ")


def _kinds_of_error() -> str:
    """Each kind of error, what it means, its exit code on the command line."""
    rows = "".join(
        f"| {'of these ' * (kind.__base__ is not errors.HalfbyteError)}`{kind.__name__}` | {prose(kind.__doc__ or '')} "
        f"| {'130, 143' if kind is errors.Interrupted else kind.exit_code} |\n"
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, errors.HalfbyteError) and kind is not errors.HalfbyteError
    )
    return f"\n| kind, in `halfbyte.errors` | when | exit code of the command line |\n|---|---|--:|\n{rows}"


if __name__ == "__main__":
    print(markdown(), end="")
