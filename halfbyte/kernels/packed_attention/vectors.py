"""Vector code for attention on the CPU: a small matrix product kept in registers, and the passes over a row of scores.

    transpose  WIDTH x WIDTH numbers
    multiply   c[m, n] (+)= sum_k a[m, k] b[k, n]     ROWS x COLUMNS sums live in registers; one row of b is read per k, a is broadcast
    row_dot    sum of products
    row_max    largest visible score of a row
    row_exp    s <- exp(s - shift) where visible, 0 elsewhere; returns the sum
    row_grad   s <- p = exp(s - lse),  d <- p (d - delta) (1 - (s / cap)^2)
    row_cap    s <- cap tanh(s / cap)

Written in LLVM's own instructions, because a compiler left to itself vectorizes these loops only for some lengths.  LLVM cuts the
vectors to what the processor has; the width asked for only decides how many registers the product takes.  Everything is float32;
an address is a pointer and an offset in elements.  exp is the formula of `kernels/scalars.py` for vectors.  Kernels
that use it cannot be `fast`: a compiler that may reorder sums takes the rounding by 1.5 * 2^23 away.

Source: https://llvm.org/docs/LangRef.html; the register block: K. Goto, R. van de Geijn, Anatomy of High-Performance Matrix
Multiplication, 2008
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from halfbyte.kernels.packed_attention.layout import COLUMNS, ROWS, SCORES, WIDTH

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _INTEGERS = ir.VectorType(_F32, WIDTH), ir.VectorType(_I32, WIDTH)
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_ROUND = 12582912.0  # 1.5 * 2^23
_LOWEST, _HIGHEST = -87.0, 88.0  # below: 0; 88 only keeps the exponent in range, for no score is above its row's logsumexp
Values = list[Any]
_intrinsic: Any = intrinsic  # takes one argument more than the function that kernels call


def _number(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * WIDTH)


def _integer(value: int) -> ir.Constant:
    return ir.Constant(_INTEGERS, [value] * WIDTH)


def _splat(builder: ir.IRBuilder, value: Any) -> Any:
    kind = _VECTOR if value.type == _F32 else _INTEGERS
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTEGERS, [0] * WIDTH))


def _at(builder: ir.IRBuilder, pointer: Any, *offsets: Any) -> Any:
    total = offsets[0]
    for offset in offsets[1:]:
        total = builder.add(total, offset)
    return builder.gep(pointer, [total])


def _load(builder: ir.IRBuilder, place: Any) -> Any:
    return builder.load(builder.bitcast(place, _VECTOR.as_pointer()), align=4)


def _store(builder: ir.IRBuilder, value: Any, place: Any) -> None:
    builder.store(value, builder.bitcast(place, _VECTOR.as_pointer()), align=4)


def _muladd(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a * b + c; fused where the processor can, for the sums here are nobody else's bits."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{WIDTH}f32"), [a, b, c])


def _repeat(builder: ir.IRBuilder, count: Any, start: Values, body: Callable[[Any, Values], Values]) -> Values:
    """Values after `count` (may be 0 or less) rounds of `values = body(i, values)`."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_I64)
    index.add_incoming(ir.Constant(_I64, 0), before)
    values = [builder.phi(value.type) for value in start]
    for phi, value in zip(values, start, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
    builder.position_at_end(inside)
    for phi, value in zip(values, body(index, values), strict=True):
        phi.add_incoming(value, builder.block)
    index.add_incoming(builder.add(index, ir.Constant(_I64, 1)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def _exp(builder: ir.IRBuilder, x: Any) -> Any:
    """e^x for x <= 88, 0 below -87; NaN stays."""
    held = builder.select(builder.fcmp_ordered("<", x, _number(_LOWEST)), _number(_LOWEST), x)
    held = builder.select(builder.fcmp_ordered(">", held, _number(_HIGHEST)), _number(_HIGHEST), held)
    k = builder.fsub(builder.fadd(builder.fmul(held, _number(_LOG2E)), _number(_ROUND)), _number(_ROUND))
    r = _muladd(builder, k, _number(-_LN2_LOW), _muladd(builder, k, _number(-_LN2_HIGH), held))
    p = _number(1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = _muladd(builder, p, r, _number(factor))
    # NaN: k is NaN, its integer is undefined; the last selection puts the NaN back
    exponent = builder.shl(builder.fptosi(builder.select(builder.fcmp_ordered("ord", k, k), k, _number(0)), _INTEGERS), _integer(23))
    y = builder.bitcast(builder.add(builder.bitcast(p, _INTEGERS), exponent), _VECTOR)
    y = builder.select(builder.fcmp_ordered("<", x, _number(_LOWEST)), _number(0), y)
    return builder.select(builder.fcmp_ordered("ord", x, x), y, x)


def _visible(builder: ir.IRBuilder, index: Any, low: Any, high: Any) -> Any:
    """Which lanes of vector `index` hold columns low <= c < high."""
    first = builder.trunc(builder.mul(index, ir.Constant(_I64, WIDTH)), _I32)
    columns = builder.add(_splat(builder, first), ir.Constant(_INTEGERS, list(range(WIDTH))))
    low, high = (_splat(builder, builder.trunc(edge, _I32)) for edge in (low, high))
    return builder.and_(builder.icmp_signed(">=", columns, low), builder.icmp_signed("<", columns, high))


def _across(builder: ir.IRBuilder, vector: Any, join: Callable[[Any, Any], Any]) -> Any:
    """All lanes joined, halves first."""
    half = WIDTH
    while half > 1:
        half //= 2
        order = ir.Constant(_INTEGERS, [(lane + half) % WIDTH for lane in range(WIDTH)])
        vector = join(vector, builder.shuffle_vector(vector, vector, order))
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _larger(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """A NaN in `b` is passed over: exp(NaN - max) brings it back."""
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


def _made(signature: Any, body: Callable[..., Any]) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        result = body(builder, *arguments)
        return context.get_dummy_value() if result is None else result

    return signature, generate


_P, _N, _F = types.CPointer(types.float32), types.int64, types.float32


def _multiply(rows_apart: int) -> Any:
    """A product whose rows of `a` lie `rows_apart` elements apart: known when compiled, so that they need no registers."""

    @_intrinsic
    def multiply(_: Any, room: Any, a: Any, next_a: Any, b: Any, next_b: Any, c: Any, next_c: Any, depth: Any, keep: Any) -> Any:
        def body(build: Any, room: Any, a: Any, next_a: Any, b: Any, next_b: Any, c: Any, next_c: Any, depth: Any, keep: Any) -> None:
            wide = COLUMNS // WIDTH
            left, right, out = (build.gep(room, [offset]) for offset in (a, b, c))
            places = [
                [build.gep(out, [build.add(build.mul(next_c, ir.Constant(_I64, m)), ir.Constant(_I64, n * WIDTH))]) for n in range(wide)]
                for m in range(ROWS)
            ]
            kept = build.icmp_signed("!=", keep, ir.Constant(_I64, 0))
            start = [build.select(kept, _load(build, place), _number(0)) for row in places for place in row]

            def step(k: Any, sums: Values) -> Values:
                here, there = build.gep(left, [build.mul(k, next_a)]), build.gep(right, [build.mul(k, next_b)])
                row = [_load(build, build.gep(there, [ir.Constant(_I64, n * WIDTH)])) for n in range(wide)]
                made = []
                for m in range(ROWS):
                    factor = _splat(build, build.load(build.gep(here, [ir.Constant(_I64, m * rows_apart)])))
                    made += [_muladd(build, factor, row[n], sums[m * wide + n]) for n in range(wide)]
                return made

            for place, value in zip([place for row in places for place in row], _repeat(build, depth, start, step), strict=True):
                _store(build, value, place)

        return _made(types.void(_P, _N, _N, _N, _N, _N, _N, _N, _N), body)

    return multiply


multiply_columns: Any = _multiply(1)  # rows of a are columns in memory: transposed scores
multiply_rows: Any = _multiply(SCORES)  # rows of a are rows of a block of scores, of queries or of gradients


@_intrinsic
def transpose(_: Any, room: Any, source: Any, next_source: Any, target: Any, next_target: Any) -> Any:
    """target[d, r] = source[r, d] for WIDTH rows and columns: blocks of half the size change places, then of a quarter, to 1."""

    def body(build: Any, room: Any, source: Any, next_source: Any, target: Any, next_target: Any) -> None:
        def line(start: Any, apart: Any, number: int) -> Any:
            return _at(build, room, start, build.mul(apart, ir.Constant(_I64, number)))

        rows = [_load(build, line(source, next_source, number)) for number in range(WIDTH)]
        step = WIDTH // 2
        while step:
            upper = ir.Constant(_INTEGERS, [WIDTH + (lane ^ step) if lane & step else lane for lane in range(WIDTH)])
            lower = ir.Constant(_INTEGERS, [WIDTH + lane if lane & step else lane ^ step for lane in range(WIDTH)])
            for one in range(WIDTH):
                if not one & step:
                    a, b = rows[one], rows[one | step]
                    rows[one], rows[one | step] = build.shuffle_vector(a, b, upper), build.shuffle_vector(a, b, lower)
            step //= 2
        for number, row in enumerate(rows):
            _store(build, row, line(target, next_target, number))

    return _made(types.void(_P, _N, _N, _N, _N), body)


@_intrinsic
def row_dot(_: Any, room: Any, a: Any, b: Any, vectors: Any) -> Any:
    """sum_c a[c] b[c] over whole vectors."""

    def body(build: Any, room: Any, a: Any, b: Any, vectors: Any) -> Any:
        def step(i: Any, total: Values) -> Values:
            first = build.mul(i, ir.Constant(_I64, WIDTH))
            return [_muladd(build, _load(build, _at(build, room, a, first)), _load(build, _at(build, room, b, first)), total[0])]

        (total,) = _repeat(build, vectors, [_number(0)], step)
        return _across(build, total, build.fadd)

    return _made(_F(_P, _N, _N, _N), body)


@_intrinsic
def row_max(_: Any, room: Any, at: Any, vectors: Any, low: Any, high: Any) -> Any:
    """Largest of columns low <= c < high; -inf where there is none."""

    def body(build: Any, room: Any, at: Any, vectors: Any, low: Any, high: Any) -> Any:
        def step(i: Any, best: Values) -> Values:
            seen = _load(build, _at(build, room, at, build.mul(i, ir.Constant(_I64, WIDTH))))
            return [_larger(build, best[0], build.select(_visible(build, i, low, high), seen, _number(float("-inf"))))]

        (best,) = _repeat(build, vectors, [_number(float("-inf"))], step)
        return _across(build, best, lambda a, b: _larger(build, a, b))

    return _made(_F(_P, _N, _N, _N, _N), body)


@_intrinsic
def row_exp(_: Any, room: Any, at: Any, vectors: Any, low: Any, high: Any, shift: Any) -> Any:
    """s <- exp(s - shift) for low <= c < high, else 0; returns the sum."""

    def body(build: Any, room: Any, at: Any, vectors: Any, low: Any, high: Any, shift: Any) -> Any:
        less = _splat(build, shift)

        def step(i: Any, total: Values) -> Values:
            place = _at(build, room, at, build.mul(i, ir.Constant(_I64, WIDTH)))
            p = _exp(build, build.fsub(_load(build, place), less))
            p = build.select(_visible(build, i, low, high), p, _number(0))
            _store(build, p, place)
            return [build.fadd(total[0], p)]

        (total,) = _repeat(build, vectors, [_number(0)], step)
        return _across(build, total, build.fadd)

    return _made(_F(_P, _N, _N, _N, _N, _F), body)


@_intrinsic
def row_grad(_: Any, room: Any, s: Any, d: Any, vectors: Any, low: Any, high: Any, lse: Any, delta: Any, inverse_cap: Any) -> Any:
    """s <- p = exp(s - lse), d <- p (d - delta) (1 - (s inverse_cap)^2) for low <= c < high, else 0."""

    def body(build: Any, room: Any, s: Any, d: Any, vectors: Any, low: Any, high: Any, lse: Any, delta: Any, inverse_cap: Any) -> None:
        lse, delta, inverse = (_splat(build, value) for value in (lse, delta, inverse_cap))

        def step(i: Any, _: Values) -> Values:
            first = build.mul(i, ir.Constant(_I64, WIDTH))
            score, slope = (_at(build, room, at, first) for at in (s, d))
            seen, x = _visible(build, i, low, high), _load(build, score)
            p = _exp(build, build.fsub(x, lse))
            share = build.fmul(x, inverse)
            slopes = build.fsub(_number(1), build.fmul(share, share))
            ds = build.fmul(build.fmul(p, build.fsub(_load(build, slope), delta)), slopes)
            _store(build, build.select(seen, p, _number(0)), score)
            _store(build, build.select(seen, ds, _number(0)), slope)
            return []

        _repeat(build, vectors, [], step)

    return _made(types.void(_P, _N, _N, _N, _N, _N, _F, _F, _F), body)


@_intrinsic
def row_cap(_: Any, room: Any, at: Any, vectors: Any, cap: Any) -> Any:
    """s <- cap tanh(s / cap);  tanh|y| = (1 - e) / (1 + e),  e = exp(-2|y|)."""

    def body(build: Any, room: Any, at: Any, vectors: Any, cap: Any) -> None:
        whole = _splat(build, cap)

        def step(i: Any, _: Values) -> Values:
            place = _at(build, room, at, build.mul(i, ir.Constant(_I64, WIDTH)))
            x = _load(build, place)
            size = build.and_(build.bitcast(x, _INTEGERS), _integer(0x7FFFFFFF))
            sign = build.xor(build.bitcast(x, _INTEGERS), size)
            e = _exp(build, build.fmul(build.fdiv(build.bitcast(size, _VECTOR), whole), _number(-2)))
            y = build.fdiv(build.fmul(whole, build.fsub(_number(1), e)), build.fadd(_number(1), e))
            _store(build, build.bitcast(build.or_(build.bitcast(y, _INTEGERS), sign), _VECTOR), place)
            return []

        _repeat(build, vectors, [], step)

    return _made(types.void(_P, _N, _N, _F), body)


@_intrinsic
def take(_: Any, counter: Any) -> Any:
    """The next number; each is given to one thread only."""

    def body(build: Any, counter: Any) -> Any:
        return build.atomic_rmw("add", counter, ir.Constant(_I64, 1), "monotonic")

    return _made(_N(types.CPointer(types.int64)), body)
