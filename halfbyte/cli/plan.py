"""`halfbyte plan`: will it fit, with which method and settings, before anything is loaded."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte import env
from halfbyte.cli.train import split_settings

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL_OR_CONFIG_JSON [CONFIG.yaml] [key=value]...",
        help="A config.json, a model folder, starter or a GGUF file; reads no weights. Then settings, as `halfbyte train` takes them.",
    ),
]
Rows = Annotated[str | None, typer.Option("--data", metavar="FILE", help="Rows to train on, for their lengths and number.")]
Gpu = Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="A card by name, e.g. 'RTX 4090' or H100.")]
GpuMemory = Annotated[
    str | None, typer.Option("--gpu-memory", metavar="SIZE", help="A card by its memory: 24 as sold, or 22.5GiB as it stands.")
]
Method = Annotated[str | None, typer.Option("--method", metavar="qlora|lora|full", help="Plan this method only; else all.")]
Rank = Annotated[int | None, typer.Option("--rank", metavar="R", help="Rank of the adapters; 16 unless given.")]
Targets = Annotated[
    str | None, typer.Option("--targets", metavar="NAMES", help="Module names with commas between; all-linear unless given.")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", metavar="N", help="Longest row; else the model's limit, at most 1024.")]
MicroBatchSize = Annotated[int | None, typer.Option("--micro-batch-size", metavar="N", help="Rows at once; else what fits.")]
Policy = Annotated[
    str | None,
    typer.Option("--policy", metavar="keep|recompute_mlp|recompute|offload", help="What the backward pass finds kept; else what fits."),
]
State = Annotated[str | None, typer.Option("--state", metavar="float32|int8", help="Optimizer state; else what fits.")]
Json = Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")]
Page = Annotated[str | None, typer.Option("--page", metavar="FILE", help="Write the answer as a page of its own as well.")]
Calibrate = Annotated[
    bool,
    typer.Option("--calibrate", help="Measure the rates of this machine first, for the times; kept in the cache. Not quant.calibrate."),
]
Download = Annotated[
    bool, typer.Option("--allow-download", help="Fetch a Hub id's config and tokenizer, no weights; else nothing is fetched.")
]


def model_and_settings(words: list[str]) -> tuple[str | None, Path | None, list[str]]:
    """The model, a settings file and the key=value words; a file is one by its ending, and what is there under its name is no setting.

    >>> model_and_settings(["starter", "run.yaml", "lora.rank=32"])
    ('starter', PosixPath('run.yaml'), ['lora.rank=32'])
    """

    def is_model(word: str) -> bool:
        return not word.endswith((".yaml", ".yml")) and ("=" not in word or env.at_home(word).exists())

    model = next((word for word in words if is_model(word)), None)
    rest = list(words)
    if model is not None:
        rest.remove(model)
    return model, *split_settings(rest)


def plan(
    words: Words,
    data: Rows = None,
    gpu: Gpu = None,
    gpu_memory: GpuMemory = None,
    method: Method = None,
    rank: Rank = None,
    targets: Targets = None,
    max_tokens: MaxTokens = None,
    micro_batch_size: MicroBatchSize = None,
    policy: Policy = None,
    state: State = None,
    json: Json = False,
    page: Page = None,
    calibrate: Calibrate = False,
    allow_download: Download = False,
) -> None:
    """Say whether training fits, with all methods side by side: memory term by term, the settings that fit, what to change.

    The exit code is 7 where nothing fits. An option and its setting are the same: --rank 8 is lora.rank=8; with
    --micro-batch-size the rows of a step are the next multiple of it.

    Looks at the model's config.json alone and answers in a second; for this machine, or for a card that need not be here.
    """
    from halfbyte.cli.terminal import say
    from halfbyte.errors import DoesNotFitError
    from halfbyte.plan.answer import answer, as_dict
    from halfbyte.plan.question import ask
    from halfbyte.plan.text import plan_text

    model, file, settings = model_and_settings(words)
    question = ask(
        model, file=file, settings=settings, data=data, gpu=gpu, gpu_memory=gpu_memory, method=method, rank=rank, targets=targets,
        max_tokens=max_tokens, micro_batch_size=micro_batch_size, policy=policy, state=state, calibrate=calibrate,
        allow_download=allow_download,
    )  # fmt: skip
    if calibrate:
        from halfbyte.plan.rates import measure, require_idle

        require_idle()
        measure(question.shape, question.base.dtype, question.threads)
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
