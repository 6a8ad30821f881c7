"""bfloat16 as the upper half of a float32, for numba, which does not know the type."""

import numpy as np
from numba import njit


@njit(inline="always")
def widen(bits: np.uint16) -> np.float32:
    """The float32 of a bfloat16's 16 bits; exact."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(inline="always")
def narrow(value: np.float32) -> np.uint16:
    """The bits of the nearest bfloat16, ties to even.  `value` is finite or infinite, not NaN."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((np.uint64(bits) + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
