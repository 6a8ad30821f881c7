"""Halfbyte: fine-tune large language models with LoRA and QLoRA on the hardware you have.

    import halfbyte as hb

    run = hb.train(model="starter", data="rows.jsonl", method="qlora", out="runs/first")
    print(run.generate("..."))

Importing this package starts nothing: a name is fetched from `halfbyte.api` when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.api import Run, evaluate, generate, inject, load, load_adapter, merge, quantize, save_adapter, train
    from halfbyte.errors import HalfbyteError
    from halfbyte.models.trainer_callback import SaveAdapter

_HOMES = {
    **dict.fromkeys(
        ("Run", "evaluate", "generate", "inject", "load", "load_adapter", "merge", "quantize", "save_adapter", "train"), "halfbyte.api"
    ),
    "HalfbyteError": "halfbyte.errors",
    "SaveAdapter": "halfbyte.models.trainer_callback",
}

__all__ = [
    "HalfbyteError",
    "Run",
    "SaveAdapter",
    "evaluate",
    "generate",
    "inject",
    "load",
    "load_adapter",
    "merge",
    "quantize",
    "save_adapter",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
