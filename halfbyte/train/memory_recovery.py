"""Out of memory: do the same optimizer step again with half the micro-batch, and stay there.

The loss is a sum over tokens, so a smaller micro-batch changes memory and time but not the gradient.  The second attempt starts from the
same random state and with all of the first one's tensors freed: an exception keeps the frames it went through alive, and those keep
activations, so nothing is retried inside an `except` block (https://github.com/pytorch/pytorch/issues/18853).  Rows are never left out;
a single row that does not fit ends the run with its number and length.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from halfbyte import host
from halfbyte.data.batches import Batch
from halfbyte.errors import DoesNotFitError
from halfbyte.log import logger
from halfbyte.train.state import capture_rng, restore_rng
from halfbyte.units import bytes_text

T = TypeVar("T")


def split(window: Sequence[Batch], size: int) -> list[Batch]:
    """The window's micro-batches cut to at most `size` rows each, in the same order, without padding that no row of a part needs."""
    return [part for batch in window for part in _cut(batch, size)]


def _cut(batch: Batch, size: int) -> list[Batch]:
    count, width = batch.input_ids.shape
    if count <= size:
        return [batch]
    real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    if batch.segment_ids is not None:
        real = (batch.segment_ids >= 0).long()
    # a packed row holds several data rows: as many as it has segments
    held = [1] * count if batch.segment_ids is None else (batch.segment_ids.amax(1) + 1).tolist()
    parts = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        width = int(real[start:stop].sum(1).max())
        fields = {
            name: value[start:stop] if value.ndim == 1 else value[start:stop, :width]
            for name, value in vars(batch).items()
            if isinstance(value, Tensor)
        }
        parts.append(replace(batch, **fields, rows=batch.rows[sum(held[:start]) : sum(held[:stop])]))
    return parts


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class MicroBatchSize:
    """The micro-batch size in use, and the retrying of a piece of work with smaller ones.  `size` 0 means: as the batches come."""

    def __init__(self, size: int = 0) -> None:
        self.size = size

    def run(self, work: Callable[[list[Batch]], T], window: Sequence[Batch], *, step: int, on_change: Callable[[str], None]) -> T:
        """`work(window)`, with halved micro-batches after each out-of-memory; `work` must leave no trace when it raises.

        Raises DoesNotFitError when one row at a time does not fit.
        """
        random_state = capture_rng()
        while True:
            parts = split(window, self.size) if self.size else list(window)
            try:
                return work(parts)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not host.is_out_of_memory(error):
                    raise
            # the error and its frames are gone here
            free_memory()
            restore_rng(random_state)
            largest = max(part.input_ids.shape[0] for part in parts)
            if largest <= 1:
                raise _does_not_fit(parts, step)
            self.size = (largest + 1) // 2
            on_change(f"out of memory at step {step}: micro-batch {largest} -> {self.size}, the same step again")


def _does_not_fit(parts: Sequence[Batch], step: int) -> DoesNotFitError:
    longest = max(parts, key=lambda part: part.input_ids.shape[1])
    total, available = host.memory_bytes()
    logger().info("out of memory with one row at a time")
    return DoesNotFitError(
        "one row at a time must fit into memory",
        code="E-FIT-301",
        place=f"step {step}, row {longest.rows[0]}",
        found=f"{longest.input_ids.shape[1]} tokens in the longest row; this process uses {bytes_text(host.rss_bytes())}",
        expected=f"{bytes_text(available)} available of {bytes_text(total)}",
        remedy=f"set data.max_tokens below {longest.input_ids.shape[1]}, or train.activations: recompute, or method: qlora",
        nothing_done="The newest checkpoint is as it was; no row was left out.",
    )
