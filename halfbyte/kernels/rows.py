"""Tensors as rows of numbers that lie side by side, for CPU kernels: a slice of a wider tensor is read where it lies.

    (values, stride)   element i of row r is values[r * stride + i]
"""

from torch import Tensor


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """(one-dimensional view, elements from row to row) of x (..., H); a copy only where the rows do not lie at one distance."""
    width = x.shape[-1]
    stride, count = _distance(x)
    if x.numel() == 0 or stride is None or (x.stride(-1) != 1 and width > 1):
        return x.contiguous().reshape(-1), width
    return x.as_strided(((count - 1) * stride + width,), (1,)), stride


def _distance(x: Tensor) -> tuple[int | None, int]:
    """(elements from row to row, number of rows); None where there is no one distance."""
    stride, count = x.shape[-1], 1
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if size == 1:
            continue
        if count == 1:
            stride = step
        elif step != stride * count:
            return None, 0
        count *= size
    return stride, count
