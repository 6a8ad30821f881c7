"""`halfbyte plan`: will it fit, with which method and settings, before anything is loaded."""

from pathlib import Path
from typing import Annotated

import typer

_POLICY = Annotated[
    str | None,
    typer.Option("--policy", metavar="keep|recompute_mlp|recompute|offload", help="What the backward pass finds kept; else what fits."),
]
_DOWNLOAD = Annotated[
    bool, typer.Option("--allow-download", help="Fetch a Hub id's config and tokenizer, no weights; else nothing is fetched.")
]


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_CONFIG_JSON", help="A config.json, a model folder, starter or a GGUF file; reads no weights.")
    ],
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="Rows to train on, for their lengths and number.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="A card by name, e.g. 'RTX 4090' or H100.")] = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", metavar="SIZE", help="A card by its memory: 24 as sold, or 22.5GiB as it stands.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", metavar="qlora|lora|full", help="Plan this method only; else all.")] = None,
    rank: Annotated[int, typer.Option("--rank", help="Rank of the adapters.")] = 16,
    targets: Annotated[str, typer.Option("--targets", help="all-linear, or module names with commas between.")] = "all-linear",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", help="Longest row; else the model's limit, at most 1024.")
    ] = None,
    micro_batch_size: Annotated[int | None, typer.Option("--micro-batch-size", metavar="N", help="Rows at once; else what fits.")] = None,
    policy: _POLICY = None,
    state: Annotated[str | None, typer.Option("--state", metavar="float32|int8", help="Optimizer state; else what fits.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")] = False,
    page: Annotated[str | None, typer.Option("--page", metavar="FILE", help="Write the answer as a page of its own as well.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine at the model's widths first, for the times; kept in the cache folder.")
    ] = False,
    allow_download: _DOWNLOAD = False,
) -> None:
    """Say whether training fits, with all methods side by side: memory term by term, the settings that fit, what to change.

    The exit code is 7 where nothing fits.

    Looks at the model's config.json alone and answers in a second; for this machine, or for a card that need not be here.
    """
    from halfbyte.cli.terminal import say
    from halfbyte.errors import DoesNotFitError
    from halfbyte.plan.answer import answer, as_dict
    from halfbyte.plan.question import ask
    from halfbyte.plan.text import plan_text

    question = ask(
        model, data=data, gpu=gpu, gpu_memory=gpu_memory, method=method, rank=rank, targets=targets, max_tokens=max_tokens,
        micro_batch_size=micro_batch_size, policy=policy, state=state, calibrate=calibrate,
        allow_download=allow_download,
    )  # fmt: skip
    if calibrate:
        from halfbyte.plan.rates import measure, require_idle

        require_idle()
        measure(question.shape, question.base.dtype)
    given = answer(question)
    if json:
        from json import dumps

        say(dumps(as_dict(given), indent=1))
    else:
        say(plan_text(given))
    if page is not None:
        from halfbyte.plan.page import write

        write(Path(page), given)
    if not given.ranking:
        raise typer.Exit(DoesNotFitError.exit_code)
