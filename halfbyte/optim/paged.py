"""Optimizer state that lives in host memory and visits the device for the update of its parameter.

    host (pinned) --copy--> device --update--> device --copy--> host

One parameter's state is on the device at a time, so the device holds no optimizer state between steps.  All copies are queued on the
current stream, hence ordered with the update; nothing here waits.  On the CPU host and device are the same memory, so paging changes
nothing there and says so once.  It does not use CUDA managed memory (https://github.com/bitsandbytes-foundation/bitsandbytes does),
whose eviction is the driver's and whose paging is lost on a state restore.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def host_copy(tensor: Tensor) -> Tensor:
    """`tensor` in pinned host memory; the tensor itself when it already is in host memory."""
    return tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


@contextmanager
def resident(state: dict[str, Tensor], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield `state` on `device`; what was changed there is written back to host memory afterwards.  `step` stays where it is."""
    if all(value.device == device for value in state.values()):
        yield state
        return
    visiting = {key: value if key == "step" else value.to(device, non_blocking=True) for key, value in state.items()}
    yield visiting
    for key, value in visiting.items():
        if key != "step":
            state[key].copy_(value, non_blocking=True)
