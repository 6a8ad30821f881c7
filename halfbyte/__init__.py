"""Halfbyte: fine-tune large language models with LoRA and QLoRA on the hardware you have.

    import halfbyte as hb

    run = hb.train(model="starter", data="rows.jsonl", method="qlora", out="runs/first")
    print(run.generate("..."))

Importing this package starts nothing: a name is fetched from `halfbyte.api` when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.api import (
        Run,
        SaveAdapter,
        eject,
        evaluate,
        generate,
        inject,
        label,
        load,
        load_adapter,
        merge,
        quantize,
        save_adapter,
        train,
    )
    from halfbyte.errors import HalfbyteError

_HOMES = {
    **dict.fromkeys(
        (
            "Run", "SaveAdapter", "eject", "evaluate", "generate", "inject", "label", "load", "load_adapter", "merge", "quantize",
            "save_adapter", "train",
        ),
        "halfbyte.api",
    ),
    "HalfbyteError": "halfbyte.errors",
}

__all__ = [
    "HalfbyteError",
    "Run",
    "SaveAdapter",
    "eject",
    "evaluate",
    "generate",
    "inject",
    "label",
    "load",
    "load_adapter",
    "merge",
    "quantize",
    "save_adapter",
    "train",
]


def _public(name: str) -> Any:
    return getattr(import_module(_HOMES[name]), name)


class _CallablePackage(ModuleType):
    """`halfbyte.train` and `halfbyte.evaluate` are packages and public functions: the package can be called."""

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return _public(self.__name__.rpartition(".")[2])(*positional, **named)


class _Door(ModuleType):
    """This package; when the import system binds a sub-package that has a public function's name, it becomes callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}; it has {', '.join(__all__)}")
    return _public(name)


def __dir__() -> list[str]:
    return sorted(__all__)
