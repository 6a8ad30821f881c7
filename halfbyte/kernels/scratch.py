"""Large temporary buffers of CPU kernels, kept between calls: a page touched for the first time costs several times a used one.

    with borrowed((rows, columns), torch.bfloat16, device) as buffer:    # holds what the last call left in it
        ...

One buffer is kept, as large as the largest asked for so far; a second caller at the same time gets one of its own.  Other devices have
PyTorch's caching allocator, which does this already.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_kept: list[Tensor] = []


@contextmanager
def borrowed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """A tensor of arbitrary contents for the length of the `with`; nothing may refer to it afterwards."""
    if device.type != "cpu":
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    size = math.prod(shape) * dtype.itemsize
    try:
        buffer = _kept.pop()  # one step: two threads never hold the same
    except IndexError:
        buffer = torch.empty(0, dtype=torch.uint8)
    if buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8)
    try:
        yield buffer[:size].view(dtype).view(shape)
    finally:
        if not _kept or _kept[0].numel() < buffer.numel():
            _kept[:] = [buffer]
