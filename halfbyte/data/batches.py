"""Examples or packed rows to batches, in an order that is a pure function of (seed, epoch).

    epoch e:   permutation of the items from a private generator
    window     the next `global_batch_size` items: one optimizer step; the last window of an epoch may be smaller and is kept
    batch      `micro_batch_size` items of a window, sorted by length so that little is padded; right padding

The cursor (epoch, step) is all that a resume needs.  Worker processes only collate: 0 and 2 give the same batches.
Padding is never found by its token number, since many models pad with their end token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from halfbyte.data.packing import Packed
from halfbyte.data.tokenize import IGNORED, Example


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens.

    input_ids       (B, T) int64
    labels          (B, T) int64, each the token at its own place or -100; for classification (B,), the class of each row
    attention_mask  (B, T) int64, 1 where a token is; None when no row is padded, or when rows are packed
    positions       (B, T) int64 for packed rows (restarting per sample, running on through padding), otherwise None
    segment_ids     (B, T) int64 for packed rows, -1 on padding, otherwise None
    rows            data row numbers
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    positions: Tensor | None
    segment_ids: Tensor | None
    rows: list[int]

    @property
    def trained_tokens(self) -> int:
        """Labels that the loss sums over: rows for classification, else all but those of first tokens, which nothing predicts."""
        wanted = self.labels if self.labels.ndim == 1 else self.labels[:, 1:]
        return int((wanted != IGNORED).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def model_inputs(batch: Batch) -> dict[str, Tensor | bool]:
    """Keyword arguments of a transformers model's forward for this batch (no labels).

    Packed rows go in as positions that restart, without a mask and without a cache: from these three, and only from them, transformers
    builds the block-diagonal mask that keeps the samples of a row apart.  With a cache it would not look at the positions.
    """
    inputs: dict[str, Tensor | bool] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.positions is not None:
        inputs["position_ids"] = batch.positions
    elif batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    return inputs


def collate(items: Sequence[Example | Packed], pad_id: int) -> Batch:
    """Pad items on the right to the longest of them."""
    width = max(len(item.input_ids) for item in items)

    def padded(lists: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*values, *[fill] * (width - len(values))] for values in lists], dtype=torch.int64)

    ids = padded([item.input_ids for item in items], pad_id)
    packed = [item for item in items if isinstance(item, Packed)]
    if packed:
        positions = padded(
            [[*item.positions, *range(item.positions[-1] + 1, item.positions[-1] + 1 + width - len(item.positions))] for item in packed], 0
        )
        labels = padded([item.labels for item in packed], IGNORED)
        rows = [row for item in packed for row in item.rows]
        return Batch(ids, labels, None, positions, padded([item.segment_ids for item in packed], -1), rows)
    examples = [item for item in items if isinstance(item, Example)]
    lengths = [len(item.input_ids) for item in examples]
    mask = None if min(lengths) == width else padded([[1] * length for length in lengths], 0)
    rows = [item.row for item in examples]
    classes = [item.label for item in examples if item.label is not None]
    if classes:
        return Batch(ids, torch.tensor(classes, dtype=torch.int64), mask, None, None, rows)
    labels = padded([[IGNORED, *item.labels[1:]] for item in examples], IGNORED)
    return Batch(ids, labels, mask, None, None, rows)


class _Windows(Dataset[list[Batch]]):
    """The windows of one epoch, collated on demand."""

    def __init__(self, items: Sequence[Example | Packed], windows: list[list[list[int]]], pad_id: int) -> None:
        self.items, self.windows, self.pad_id = items, windows, pad_id

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, step: int) -> list[Batch]:
        return [collate([self.items[number] for number in numbers], self.pad_id) for numbers in self.windows[step]]


class Batches:
    """Windows of batches, epoch by epoch, with a cursor that stands at the next window."""

    def __init__(
        self,
        items: Sequence[Example | Packed],
        *,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int,
        pad_id: int,
        workers: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.items, self.micro_batch_size, self.global_batch_size = items, micro_batch_size, global_batch_size
        self.seed, self.pad_id, self.workers, self.shuffle = seed, pad_id, workers, shuffle
        self._epoch, self._step = 0, 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, the last and smaller one counted."""
        return -(-len(self.items) // self.global_batch_size)

    def order(self, epoch: int) -> list[int]:
        """The items of an epoch in order: a pure function of (seed, epoch)."""
        if not self.shuffle:
            return list(range(len(self.items)))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return list(torch.randperm(len(self.items), generator=generator).tolist())

    def windows(self, epoch: int) -> list[list[list[int]]]:
        """Item numbers of each micro-batch of each window of an epoch."""
        order, made = self.order(epoch), []
        for start in range(0, len(order), self.global_batch_size):
            window = sorted(order[start : start + self.global_batch_size], key=lambda one: (len(self.items[one].input_ids), one))
            made.append([window[at : at + self.micro_batch_size] for at in range(0, len(window), self.micro_batch_size)])
        return made

    def epoch(self, epoch: int) -> Iterator[list[Batch]]:
        """Windows of an epoch from the cursor on: from its start, unless the cursor was loaded inside this epoch."""
        start = self._step if epoch == self._epoch else 0
        self._epoch, self._step = epoch, start
        windows = self.windows(epoch)[start:]
        loader = DataLoader(
            _Windows(self.items, windows, self.pad_id),
            batch_size=None,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(self.seed),  # otherwise iterating draws from the global generator
        )
        for window in loader:
            self._step += 1
            if self._step >= self.steps_per_epoch:
                self._epoch, self._step = epoch + 1, 0
            yield window

    def state_dict(self) -> dict[str, int]:
        """The cursor: the epoch and step that come next."""
        return {"epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Put the cursor back."""
        self._epoch, self._step = int(state["epoch"]), int(state["step"])
