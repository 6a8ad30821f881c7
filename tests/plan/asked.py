"""`halfbyte plan` on a model's config, as the tests ask it."""

import io
from contextlib import redirect_stderr, redirect_stdout

from halfbyte.cli.main import run

SMALL = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
"""The config of a Llama of 135M parameters."""


def plan(*words: object) -> tuple[int, str, str]:
    """Exit code, and what was written to stdout and to stderr."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = run(["plan", *map(str, words)])
    return code, out.getvalue(), err.getvalue()
