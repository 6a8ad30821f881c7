"""Independent oracles in NumPy: quantize and read back by the definition, element by element, sharing no code with the product."""

import numpy as np
import torch
from torch import Tensor


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, so that equality is equality of bits (and not of values, where -0 equals 0)."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(width)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def ranks(x: np.ndarray, codebook: np.ndarray, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """(index of every element, absmax of every block) of a float32 vector, block by block in a plain loop."""
    levels = np.sort(codebook, kind="stable")
    order = np.argsort(codebook, kind="stable")
    midpoints = ((levels[1:] + levels[:-1]) / np.float32(2)).astype(np.float32)
    indices, scales = [], []
    for start in range(0, len(x), blocksize):
        block = x[start : start + blocksize]
        top = np.abs(block).max()
        if len(block) == blocksize:
            scaled = block * (np.float32(1) / max(top, np.float32(1e-38)))
        else:
            top = max(top, np.float32(1e-38))
            scaled = block / top
        scales.append(top)
        indices += [order[sum(value > midpoints)] for value in scaled]
    return np.array(indices, np.uint8), np.array(scales, np.float32)


def look_up(packed: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Table look-up of 4-bit bytes: the law for shapes whose last size is no multiple of the block size."""
    table, scales, out = codebook.numpy(), absmax.numpy(), np.empty(numel, np.float32)
    for i in range(numel):
        byte = int(packed[i // 2])
        out[i] = table[byte >> 4 if i % 2 == 0 else byte & 15] * scales[i // blocksize]
    return torch.from_numpy(out).to(dtype)
