"""Which rows are trained on, how they are read, cut and masked."""

from typing import Annotated, Literal

from pydantic import Field

from halfbyte.config.base import Auto, Count, Settings, Switch


class DataConfig(Settings):
    """The data."""

    path: str = Field(min_length=1)
    """A .jsonl, .json, .csv or .parquet file, a folder or glob of them, or hub:NAME."""
    eval_path: str | None = None
    """Held-out rows; without it some rows of `path` are held out."""
    eval_rows: Auto | Annotated[int, Field(ge=0)] = "auto"
    """Rows held out of `path`; auto is a tenth, at most 200; 0 holds none out."""
    shape: Literal["auto", "alpaca", "sharegpt", "messages", "prompt-completion", "text", "tokens", "classification"] = "auto"
    """What a row looks like; auto finds out by looking and says so."""
    max_tokens: Auto | Annotated[int, Field(ge=2)] = "auto"
    """Longest row in tokens; auto is the model's own limit, at most 1024."""
    long_rows: Literal["drop", "cut-prompt", "refuse"] = "drop"
    """What happens to a row over max_tokens: leave it out and count it, cut its prompt on the left, or stop."""
    packing: Switch = False
    """Put several samples into one row of max_tokens, without attention between them."""
    train_on: Literal["assistant", "last-assistant", "all"] = "assistant"
    """Which tokens carry a label: every assistant turn, the last one, or all tokens."""
    skip_bad_rows: Annotated[int, Field(ge=0)] = 0
    """Up to this many rows that cannot be read are left out and listed; 0 stops at the first."""
    max_rows: Count | None = None
    """Read no more than this many rows."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Processes that prepare batches; 0 prepares them in the training process."""
    strict: Switch = False
    """Refuse what is otherwise only noted: duplicate rows, held-out rows that are also trained on."""
    text_field: str = Field(default="text", min_length=1)
    """Column with the text, for the shapes text and classification."""
    label_field: str = Field(default="label", min_length=1)
    """Column with the label, for the shape classification."""
