"""32 bfloat16 at a time, with products of pairs summed in float32: only where `instructions.short_products()`.

The same kind of thing as `vectors.py`, in 16 bits: one look-up and one instruction for the products serve 32 elements.
Source: https://www.intel.com/content/www/us/en/docs/intrinsics-guide (vpermw, vdpbf16ps)
"""

from typing import Any

from llvmlite import ir
from numba import types

from halfbyte.kernels.vectors import (
    _FLOATS,
    _I8,
    _I16,
    Vector,
    _bfloat16_bits,
    _call,
    _constant,
    _made,
    _order,
    _read,
    floats16,
    intrinsic,
)

_SHORTS = ir.VectorType(_I16, 32)
shorts32 = Vector("shorts32", _SHORTS)


class _BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


@intrinsic
def load32(typing_context: Any, pointer: Any, index: Any) -> Any:
    """32 numbers of 16 bits from `index` on, as they are."""
    return _made(shorts32, (pointer, types.int64), lambda builder, kinds, address, at: _read(builder, address, at, _SHORTS))


@intrinsic
def bytes32(typing_context: Any, pointer: Any, index: Any) -> Any:
    """32 bytes from `index` on, each as 16 bits."""
    return _made(
        shorts32, (pointer, types.int64),
        lambda builder, kinds, address, at: builder.zext(_read(builder, address, at, ir.VectorType(_I8, 32)), _SHORTS),
    )  # fmt: skip


@intrinsic
def above4(typing_context: Any, a: Any) -> Any:
    """The bits from the fifth on."""
    return _made(shorts32, (shorts32,), lambda builder, kinds, x: builder.lshr(x, _constant(_I16, 4, 32)))


@intrinsic
def twice_bf16(typing_context: Any, levels: Any) -> Any:
    """16 levels rounded to bfloat16, twice over, so that bit 4 of an index does not matter."""

    def build(builder: ir.IRBuilder, kinds: Any, x: Any) -> Any:
        shorts = builder.trunc(_bfloat16_bits(builder, x), ir.VectorType(_I16, 16))
        return builder.shuffle_vector(shorts, shorts, _order([lane % 16 for lane in range(32)]))

    return _made(shorts32, (floats16,), build)


@intrinsic
def look_up32(typing_context: Any, table: Any, indices: Any) -> Any:
    """table[indices], 32 of 32; only the low 5 bits of an index are looked at."""
    return _made(
        shorts32, (shorts32, shorts32),
        lambda builder, kinds, levels, index: _call(builder, "llvm.x86.avx512.permvar.hi.512", _SHORTS, levels, index),
    )  # fmt: skip


@intrinsic
def pair_products(typing_context: Any, sums: Any, a: Any, b: Any) -> Any:
    """sums[k] + a[2k] * b[2k] + a[2k + 1] * b[2k + 1] of bfloat16 numbers, in float32."""

    def build(builder: ir.IRBuilder, kinds: Any, held: Any, x: Any, y: Any) -> Any:
        kind = ir.VectorType(_BFloat(), 32)
        x, y = builder.bitcast(x, kind), builder.bitcast(y, kind)
        return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, held, x, y)

    return _made(floats16, (floats16, shorts32, shorts32), build)
