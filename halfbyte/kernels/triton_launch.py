"""How Triton kernels are started: on the tensors' device, on its current stream, waiting for nothing.

Rules every kernel of this program keeps:

- row, block and element numbers are 64-bit from `tl.program_id(0).to(tl.int64)` on: a tensor may have more than 2^31 elements;
- 16-bit numbers are widened to fp32 when read, sums are kept in fp32, and there is one rounding when the result is stored;
- where bits must agree with another program, `exact` keeps the compiler from fusing a product and a sum into one rounding, and
  division and root are the correctly rounded ones (`tl.div_rn`, `tl.sqrt_rn`; `/` is an approximation);
- nothing is read back by the host, so that a launch never waits.

Triton compiles a kernel on its first use and keeps the result under ~/.triton (its own TRITON_CACHE_DIR).
Source: https://triton-lang.org
"""

from typing import Any

import torch
from torch import Tensor


def power_of_2(count: int) -> int:
    """The smallest power of two that is not below `count`; tiles have such sizes."""
    return 1 << max(count - 1, 0).bit_length()


def launch(
    kernel: Any, programs: int, *arguments: Tensor | int | float | None, warps: int = 4, exact: bool = False, **constants: Any
) -> None:
    """Run `programs` programs of a kernel on the device of its first argument; `constants` are its compile-time arguments."""
    if programs == 0:
        return
    first = arguments[0]
    assert isinstance(first, Tensor)
    with torch.cuda.device_of(first):  # Triton launches on the current device, which need not be the tensor's; without effect on a CPU
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=not exact, **constants)
