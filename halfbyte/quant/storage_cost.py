"""Exact bytes of a tensor in a format, without making it: what a plan adds up.

nf4, fp4   ceil(n/2) + scales + codebook (64);  scales: 4 ceil(n/K), or with double quantization ceil(n/K) + 4 ceil(N/256) + 1024 + 4
int8       n + 4 rows
none       n times the width of the dtype

Experts, (E, O, I), are packed one by one and share the codebooks.  Imports no torch, so that a plan answers at once.
"""

from collections.abc import Sequence
from math import prod

NESTED_BLOCKSIZE = 256
CODEBOOK_BYTES, NESTED_CODEBOOK_BYTES = 16 * 4, 256 * 4
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


def bytes_of(shape: Sequence[int], format: str, blocksize: int = 64, double_quant: bool = True, dtype: str = "bfloat16") -> int:
    """Bytes of all buffers that a weight of `shape` takes in `format` ("nf4", "fp4", "int8" or "none", then in `dtype`).

    >>> bytes_of((4096, 4096), "nf4") * 8 / 4096**2       # bits per parameter
    4.12750244140625
    """
    count = prod(shape)
    if format == "none":
        return count * WIDTHS[dtype]
    if format == "int8":
        return count + 4 * (count // shape[-1])
    blocks = -(-count // blocksize)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) + NESTED_CODEBOOK_BYTES + 4 if double_quant else 4 * blocks
    return (count + 1) // 2 + scales + CODEBOOK_BYTES


def bytes_of_experts(shape: Sequence[int], format: str, blocksize: int = 64, double_quant: bool = True, dtype: str = "bfloat16") -> int:
    """Bytes of a fused weight (E, O, I): each expert by itself, the codebooks counted once."""
    count, *one = shape
    shared = 0 if format in ("none", "int8") else CODEBOOK_BYTES + (NESTED_CODEBOOK_BYTES if double_quant else 0)
    return count * (bytes_of(one, format, blocksize, double_quant, dtype) - shared) + shared
