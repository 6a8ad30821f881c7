"""16-level look-up with AVX-512: a whole table in one register, 32 elements per permutation.

    table   = codebook * absmax          <16 x float>, for bfloat16 rounded to nearest even at once
    indices = high and low nibbles of 16 bytes, interleaved
    out     = vpermw (bfloat16) or two vpermps (float32)

The scale is applied to 16 levels per block instead of to every element.  numba compiles it from LLVM's own instructions, so no
compiler is needed where the program runs; a machine without AVX-512 takes the portable loop of `cpu.py`, with the same bits.

Source: https://www.intel.com/content/www/us/en/docs/intrinsics-guide (vpermw, vpermps)
"""

from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

GROUP = 32  # elements per step
_F32, _I8, _I16, _I32 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)


@cache
def missing() -> str:
    """Why this cannot be used here; empty when it can."""
    if getattr(config, "CPU_NAME", None) or getattr(config, "CPU_FEATURES", None):
        return "NUMBA_CPU_NAME or NUMBA_CPU_FEATURES restricts the instruction set"
    features = binding.get_host_cpu_features()
    lacking = [name for name in ("avx512f", "avx512bw") if not features.get(name)]
    return f"the CPU lacks {', '.join(lacking)}" if lacking else ""


def _constant(kind: ir.Type, value: int, count: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, count), [value] * count)


def _order(values: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(values)), values)


def _load(builder: ir.IRBuilder, pointer: Any, kind: ir.Type) -> Any:
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)


def _indices(builder: ir.IRBuilder, pointer: Any) -> Any:
    """<32 x i8>: the nibbles of 16 bytes, high nibble first."""
    packed = _load(builder, pointer, ir.VectorType(_I8, 16))
    high, low = builder.lshr(packed, _constant(_I8, 4, 16)), builder.and_(packed, _constant(_I8, 15, 16))
    return builder.shuffle_vector(high, low, _order([lane // 2 + 16 * (lane % 2) for lane in range(32)]))


def _bfloat16_table(builder: ir.IRBuilder, table: Any) -> Any:
    """<16 x float> -> <32 x i16>: bits of the nearest bfloat16, ties to even; the upper half is never looked at."""
    bits = builder.bitcast(table, ir.VectorType(_I32, 16))
    odd = builder.and_(builder.lshr(bits, _constant(_I32, 16, 16)), _constant(_I32, 1, 16))
    rounded = builder.lshr(builder.add(builder.add(bits, _constant(_I32, 0x7FFF, 16)), odd), _constant(_I32, 16, 16))
    short = builder.trunc(rounded, ir.VectorType(_I16, 16))
    return builder.shuffle_vector(short, short, _order([lane % 16 for lane in range(32)]))


def _permute(builder: ir.IRBuilder, name: str, table: Any, indices: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(table.type, [table.type, indices.type]), f"llvm.x86.avx512.permvar.{name}.512"
    )
    return builder.call(function, [table, indices])


def _store_bfloat16(builder: ir.IRBuilder, table: Any, indices: Any, out: Any) -> None:
    wide = builder.zext(indices, ir.VectorType(_I16, 32))
    value = _permute(builder, "hi", table, wide)
    builder.store(value, builder.bitcast(out, value.type.as_pointer()), align=1)


def _store_float32(builder: ir.IRBuilder, table: Any, indices: Any, out: Any) -> None:
    for half in range(2):
        lanes = builder.shuffle_vector(indices, indices, _order([16 * half + lane for lane in range(16)]))
        value = _permute(builder, "sf", table, builder.zext(lanes, ir.VectorType(_I32, 16)))
        target = builder.gep(out, [ir.Constant(ir.IntType(64), 64 * half)])
        builder.store(value, builder.bitcast(target, value.type.as_pointer()), align=1)


@intrinsic
def unpack_groups(typing_context: Any, codebook: Any, scale: Any, packed: Any, start: Any, out: Any, at: Any, groups: Any) -> Any:
    """unpack_groups(codebook f32[16], scale f32, packed u8[], first byte, out f32[] or u16[], first element, groups of 32)."""
    size = out.dtype.bitwidth // 8

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        def data(which: int) -> Any:
            array = context.make_array(signature.args[which])(context, builder, arguments[which])
            return builder.bitcast(array.data, _I8.as_pointer())

        levels = _load(builder, data(0), ir.VectorType(_F32, 16))
        one = builder.insert_element(ir.Constant(ir.VectorType(_F32, 16), ir.Undefined), arguments[1], ir.Constant(_I32, 0))
        table = builder.fmul(levels, builder.shuffle_vector(one, one, _order([0] * 16)))
        table = _bfloat16_table(builder, table) if size == 2 else table
        source = builder.gep(data(2), [arguments[3]])
        wide = ir.Constant(ir.IntType(64), size)
        target = builder.gep(data(4), [builder.mul(arguments[5], wide)])
        with cgutils.for_range(builder, arguments[6]) as loop:
            indices = _indices(builder, builder.gep(source, [builder.mul(loop.index, ir.Constant(ir.IntType(64), GROUP // 2))]))
            here = builder.gep(target, [builder.mul(loop.index, ir.Constant(ir.IntType(64), GROUP * size))])
            (_store_bfloat16 if size == 2 else _store_float32)(builder, table, indices, here)
        return context.get_dummy_value()

    return types.void(codebook, types.float32, packed, types.int64, out, types.int64, types.int64), generate
