"""Sixteen float32 at a time, for native kernels: a numba type and the few operations that the compiler does not find by itself.

    values = load16(x, i);  table = times(load16(codebook, 0), splat(scale));  total = fused(look_up(table, indices), values, total)

Everything is written in LLVM's own vectors and becomes AVX-512, AVX2, SSE or NEON as the processor has it.  What differs is the look-up
of 16 levels, which LLVM has no instruction for:

| processor | 16 float32 levels             | 16 levels of 16 bits                        | rank among 15 thresholds      |
|-----------|-------------------------------|---------------------------------------------|-------------------------------|
| AVX-512   | vpermps                       | vpermw, 32 at a time                        | 4 steps of a binary search    |
| AVX2      | two vpermps and a blend       | two vpshufb (low and high bytes), interleaved | 15 comparisons, added       |
| any other | 15 selections over index bits | the same                                    | 15 comparisons, added         |

All three give the same bits.  Importing this imports numba: only functions marked native(lazy=True) may, when called.

Source: https://www.intel.com/content/www/us/en/docs/intrinsics-guide (vpermps, vpermw, vpshufb)
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, register_model

from halfbyte.kernels import instructions

intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic  # drops the first argument, which a type checker cannot see
_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_F32, 16), ir.VectorType(_I32, 16)


class Vector(types.Type):
    """16 float32, 16 int32 or others of one width in registers."""

    def __init__(self, name: str, machine: ir.Type) -> None:
        self.machine = machine
        super().__init__(name=name)


floats16, ints16 = Vector("floats16", _FLOATS), Vector("ints16", _INTS)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.machine)


def _made(result: Any, arguments: tuple[Any, ...], build: Callable[..., Any]) -> tuple[Any, Any]:
    """A typed intrinsic from `build(builder, argument types, *arguments)`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        made = build(builder, signature.args, *values)
        return context.get_dummy_value() if result is types.void else made

    return result(*arguments), generate


# ---- constants and memory


def _constant(kind: ir.Type, value: Any, count: int = 16) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, count), [value] * count)


def _order(lanes: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)


def _read(builder: ir.IRBuilder, pointer: Any, index: Any, kind: ir.Type) -> Any:
    return builder.load(builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer()), align=1)


def _write(builder: ir.IRBuilder, pointer: Any, index: Any, value: Any) -> None:
    builder.store(value, builder.bitcast(builder.gep(pointer, [index]), value.type.as_pointer()), align=1)


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [one.type for one in arguments]), name)
    return builder.call(function, arguments)


@intrinsic
def load16(typing_context: Any, pointer: Any, index: Any) -> Any:
    """16 numbers of a float32 or bfloat16 pointer from `index` on, as float32."""

    def build(builder: ir.IRBuilder, kinds: Any, address: Any, at: Any) -> Any:
        if kinds[0].dtype == types.float32:
            return _read(builder, address, at, _FLOATS)
        short = builder.zext(_read(builder, address, at, ir.VectorType(_I16, 16)), _INTS)
        return builder.bitcast(builder.shl(short, _constant(_I32, 16)), _FLOATS)

    return _made(floats16, (pointer, types.int64), build)


@intrinsic
def bytes16(typing_context: Any, pointer: Any, index: Any) -> Any:
    """16 bytes from `index` on, each as an int32."""
    return _made(
        ints16, (pointer, types.int64),
        lambda builder, kinds, address, at: builder.zext(_read(builder, address, at, ir.VectorType(_I8, 16)), _INTS),
    )  # fmt: skip


# ---- arithmetic


@intrinsic
def splat(typing_context: Any, value: Any) -> Any:
    """16 times the same float32."""

    def build(builder: ir.IRBuilder, kinds: Any, one: Any) -> Any:
        first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), one, ir.Constant(_I32, 0))
        return builder.shuffle_vector(first, first, _order([0] * 16))

    return _made(floats16, (types.float32,), build)


@intrinsic
def times(typing_context: Any, a: Any, b: Any) -> Any:
    return _made(floats16, (floats16, floats16), lambda builder, kinds, x, y: builder.fmul(x, y))


@intrinsic
def plus(typing_context: Any, a: Any, b: Any) -> Any:
    return _made(floats16, (floats16, floats16), lambda builder, kinds, x, y: builder.fadd(x, y))


@intrinsic
def fused(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, fused where the processor can (only for sums, whose order is free)."""
    return _made(
        floats16, (floats16, floats16, floats16), lambda builder, kinds, x, y, z: _call(builder, "llvm.fmuladd.v16f32", _FLOATS, x, y, z)
    )


@intrinsic
def total(typing_context: Any, a: Any) -> Any:
    """The sum of the 16 numbers."""

    def build(builder: ir.IRBuilder, kinds: Any, x: Any) -> Any:
        for half in (8, 4, 2, 1):
            x = builder.fadd(x, builder.shuffle_vector(x, x, _order([(lane + half) % 16 for lane in range(16)])))
        return builder.extract_element(x, ir.Constant(_I32, 0))

    return _made(types.float32, (floats16,), build)


@intrinsic
def magnitude_bits(typing_context: Any, a: Any) -> Any:
    """The bit patterns without their signs: ordered as the magnitudes are, NaN above all."""
    return _made(
        ints16, (floats16,), lambda builder, kinds, x: builder.and_(builder.bitcast(x, _INTS), _constant(_I32, 0x7FFFFFFF))
    )


@intrinsic
def larger(typing_context: Any, a: Any, b: Any) -> Any:
    def build(builder: ir.IRBuilder, kinds: Any, x: Any, y: Any) -> Any:
        return builder.select(builder.icmp_signed(">", x, y), x, y)

    return _made(ints16, (ints16, ints16), build)


@intrinsic
def largest(typing_context: Any, a: Any) -> Any:
    """The largest of 16 int32, as the float32 with those bits."""

    def build(builder: ir.IRBuilder, kinds: Any, x: Any) -> Any:
        for half in (8, 4, 2, 1):
            other = builder.shuffle_vector(x, x, _order([(lane + half) % 16 for lane in range(16)]))
            x = builder.select(builder.icmp_signed(">", x, other), x, other)
        return builder.bitcast(builder.extract_element(x, ir.Constant(_I32, 0)), _F32)

    return _made(types.float32, (ints16,), build)


@intrinsic
def high_nibbles(typing_context: Any, a: Any) -> Any:
    return _made(ints16, (ints16,), lambda builder, kinds, x: builder.lshr(x, _constant(_I32, 4)))


# ---- rounding


def _bfloat16_bits(builder: ir.IRBuilder, x: Any) -> Any:
    """<16 x float> -> <16 x i32>, the low 16 bits those of the nearest bfloat16, ties to even; NaN is torch's 0x7FC0."""
    bits = builder.bitcast(x, _INTS)
    odd = builder.and_(builder.lshr(bits, _constant(_I32, 16)), _constant(_I32, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, _constant(_I32, 0x7FFF)), odd), _constant(_I32, 16))
    return builder.select(builder.fcmp_unordered("uno", x, x), _constant(_I32, 0x7FC0), rounded)


@intrinsic
def rounded_bf16(typing_context: Any, a: Any) -> Any:
    """The nearest bfloat16 of each, as float32."""

    def build(builder: ir.IRBuilder, kinds: Any, x: Any) -> Any:
        return builder.bitcast(builder.shl(_bfloat16_bits(builder, x), _constant(_I32, 16)), _FLOATS)

    return _made(floats16, (floats16,), build)


# ---- the look-up of 16 levels


def _halves(builder: ir.IRBuilder, x: Any) -> tuple[Any, Any]:
    size = x.type.count // 2
    return tuple(builder.shuffle_vector(x, x, _order([size * half + lane for lane in range(size)])) for half in range(2))


def _joined(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    return builder.shuffle_vector(a, b, _order(list(range(2 * a.type.count))))


def _bit(builder: ir.IRBuilder, indices: Any, bit: int) -> Any:
    kind, count = indices.type.element, indices.type.count
    return builder.icmp_unsigned("!=", builder.and_(indices, _constant(kind, bit, count)), _constant(kind, 0, count))


def _select(builder: ir.IRBuilder, table: Any, indices: Any, lanes: int) -> Any:
    """table[indices] by 15 selections; `lanes` indices."""
    level = [builder.shuffle_vector(table, table, _order([which] * lanes)) for which in range(16)]
    for bit in (1, 2, 4, 8):
        on = _bit(builder, indices, bit)
        level = [builder.select(on, level[k + 1], level[k]) for k in range(0, len(level), 2)]
    return level[0]


def _pick(builder: ir.IRBuilder, table: Any, indices: Any) -> Any:
    """<16 x float>[<16 x i32>]; only the low 4 bits of an index are looked at."""
    level = instructions.level()
    if level == "avx512":
        return _call(builder, "llvm.x86.avx512.permvar.sf.512", _FLOATS, table, indices)
    if level != "avx2":
        return _select(builder, table, indices, 16)
    parts = []
    low, high = _halves(builder, table)
    for part in _halves(builder, indices):
        a, b = (_call(builder, "llvm.x86.avx2.permps", low.type, half, part) for half in (low, high))
        parts.append(builder.select(_bit(builder, part, 8), b, a))
    return _joined(builder, *parts)


@intrinsic
def look_up(typing_context: Any, table: Any, indices: Any) -> Any:
    """table[indices], 16 of 16; only the low 4 bits of an index are looked at."""
    return _made(floats16, (floats16, ints16), lambda builder, kinds, levels, index: _pick(builder, levels, index))


@intrinsic
def rank16(typing_context: Any, values: Any, thresholds: Any) -> Any:
    """How many of the 15 rising thresholds (lane 15 is not looked at) lie below each value; none for NaN."""

    def build(builder: ir.IRBuilder, kinds: Any, x: Any, steps: Any) -> Any:
        def step(rank: Any, threshold: Any, size: int) -> Any:
            above = builder.fcmp_ordered(">", x, threshold)
            return builder.select(above, builder.add(rank, _constant(_I32, size)), rank)

        rank = _constant(_I32, 0)
        if instructions.level() != "avx512":
            for which in range(15):
                rank = step(rank, builder.shuffle_vector(steps, steps, _order([which] * 16)), 1)
            return rank
        rank = step(rank, builder.shuffle_vector(steps, steps, _order([7] * 16)), 8)
        for size in (4, 2, 1):
            rank = step(rank, _pick(builder, steps, builder.add(rank, _constant(_I32, size - 1))), size)
        return rank

    return _made(ints16, (floats16, floats16), build)


@intrinsic
def store_pairs(typing_context: Any, pointer: Any, index: Any, order: Any, ranks: Any) -> Any:
    """8 bytes from `index` on: order[rank] of 16, two to a byte, the first in the high half; `order` holds int32 bits."""

    def build(builder: ir.IRBuilder, kinds: Any, address: Any, at: Any, levels: Any, rank: Any) -> Any:
        # a level's number is below 16: as float32 bits it is a denormal, which a permutation leaves alone
        codes = builder.bitcast(_pick(builder, levels, rank), ir.VectorType(_I64, 8))
        pairs = builder.or_(builder.shl(codes, _constant(_I64, 4, 8)), builder.lshr(codes, _constant(_I64, 32, 8)))
        _write(builder, address, at, builder.trunc(pairs, ir.VectorType(_I8, 8)))

    return _made(types.void, (pointer, types.int64, floats16, ints16), build)


def _nibbles(builder: ir.IRBuilder, packed: Any, lanes: int) -> Any:
    """<lanes/2 x i8> -> <lanes x i8>, high nibble first."""
    half = lanes // 2
    high, low = builder.lshr(packed, _constant(_I8, 4, half)), builder.and_(packed, _constant(_I8, 15, half))
    return builder.shuffle_vector(high, low, _order([lane // 2 + half * (lane % 2) for lane in range(lanes)]))


def _short_look_up(builder: ir.IRBuilder, table: Any, packed: Any) -> Any:
    """<16 x i32> of which the low 16 bits count, <16 x i8> packed -> <32 x i16>."""
    shorts = builder.trunc(table, ir.VectorType(_I16, 16))
    level = instructions.level()
    if level == "avx512":
        wide = builder.zext(packed, _INTS)
        # in each 32 bits: the high nibble below, the whole byte above; bit 4 chooses between two equal halves of the table
        index = builder.or_(builder.lshr(wide, _constant(_I32, 4)), builder.shl(wide, _constant(_I32, 16)))
        twice = builder.shuffle_vector(shorts, shorts, _order([lane % 16 for lane in range(32)]))
        return _call(builder, "llvm.x86.avx512.permvar.hi.512", twice.type, twice, builder.bitcast(index, twice.type))
    indices = _nibbles(builder, packed, 32)
    if level != "avx2":
        return _select(builder, shorts, builder.zext(indices, ir.VectorType(_I16, 32)), 32)
    both = builder.bitcast(shorts, ir.VectorType(_I8, 32))
    parts = []
    for which in range(2):
        tables = builder.shuffle_vector(both, both, _order([2 * (lane % 16) + which for lane in range(32)]))
        parts.append(_call(builder, "llvm.x86.avx2.pshuf.b", tables.type, tables, indices))
    joined = builder.shuffle_vector(*parts, _order([lane // 2 + 32 * (lane % 2) for lane in range(64)]))
    return builder.bitcast(joined, ir.VectorType(_I16, 32))


def _store_32(builder: ir.IRBuilder, kind: Any, address: Any, at: Any, levels: Any, source: Any, begin: Any) -> None:
    """out[at : at + 32] = levels[nibbles of 16 bytes]."""
    bytes_ = _read(builder, source, begin, ir.VectorType(_I8, 16))
    if kind.dtype == types.uint16:
        _write(builder, address, at, _short_look_up(builder, builder.bitcast(levels, _INTS), bytes_))
        return
    for half, part in enumerate(_halves(builder, _nibbles(builder, bytes_, 32))):
        value = _pick(builder, levels, builder.zext(part, _INTS))
        _write(builder, address, builder.add(at, ir.Constant(_I64, 16 * half)), value)


@intrinsic
def store_looked_up(typing_context: Any, out: Any, index: Any, table: Any, packed: Any, start: Any) -> Any:
    """out[index : index + 32] = table[nibbles of the 16 bytes packed[start :]]; a bfloat16 `out` takes the low 16 bits of the table."""

    def build(builder: ir.IRBuilder, kinds: Any, address: Any, at: Any, levels: Any, source: Any, begin: Any) -> None:
        _store_32(builder, kinds[0], address, at, levels, source, begin)

    return _made(types.void, (out, types.int64, floats16, packed, types.int64), build)


@intrinsic
def store_looked_up_64(typing_context: Any, out: Any, index: Any, table: Any, packed: Any, start: Any) -> Any:
    """The same for 64 elements in 32 bytes; with AVX-512 the even and the odd ones are looked up apart and put together afterwards."""

    def build(builder: ir.IRBuilder, kinds: Any, address: Any, at: Any, levels: Any, source: Any, begin: Any) -> None:
        if kinds[0].dtype != types.uint16 or instructions.level() != "avx512":
            for half in range(2):
                to, first = builder.add(at, ir.Constant(_I64, 32 * half)), builder.add(begin, ir.Constant(_I64, 16 * half))
                _store_32(builder, kinds[0], address, to, levels, source, first)
            return
        shorts = builder.trunc(builder.bitcast(levels, _INTS), ir.VectorType(_I16, 16))
        twice = builder.shuffle_vector(shorts, shorts, _order([lane % 16 for lane in range(32)]))
        whole = builder.zext(_read(builder, source, begin, ir.VectorType(_I8, 32)), twice.type)
        above = builder.lshr(whole, _constant(_I16, 4, 32))
        even, odd = (_call(builder, "llvm.x86.avx512.permvar.hi.512", twice.type, twice, index) for index in (above, whole))
        for half in range(2):
            lanes = [16 * half + lane // 2 + 32 * (lane % 2) for lane in range(32)]
            _write(builder, address, builder.add(at, ir.Constant(_I64, 32 * half)), builder.shuffle_vector(even, odd, _order(lanes)))

    return _made(types.void, (out, types.int64, floats16, packed, types.int64), build)


@intrinsic
def as_stored(typing_context: Any, out: Any, table: Any) -> Any:
    """A table of float32 as `store_looked_up` wants it for `out`: bits of the nearest bfloat16, or as it is."""

    def build(builder: ir.IRBuilder, kinds: Any, address: Any, levels: Any) -> Any:
        short = kinds[0].dtype == types.uint16
        return builder.bitcast(_bfloat16_bits(builder, levels), _FLOATS) if short else levels

    return _made(floats16, (out, floats16), build)
