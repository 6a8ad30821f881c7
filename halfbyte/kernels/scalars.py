"""Small functions of one number that CPU kernels are made of: bfloat16 as bits, and an exponential that becomes vector code.

exp:  e^x = 2^k e^r,  k = round(x / ln 2),  r = x - k ln 2 in two parts;  e^r by the Taylor polynomial to r^7, error below 2 units in
the last place of float32 over the whole range; 0 below -87.3, infinity above 88.72, NaN stays.  The library's exp is a call per
number; this is 15 instructions for 16 numbers.
Source of the two-part ln 2: W. J. Cody, W. Waite, Software Manual for the Elementary Functions, 1980.
"""

import numpy as np

from halfbyte.kernels.native import inline, inline_fused

_INV_LN2 = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / f) for f in (2, 6, 24, 120, 720, 5040))
_LOWEST, _HIGHEST = np.float32(-87.33654), np.float32(88.72283)
_ONE = np.float32(1)
_INF = np.float32(np.inf)


@inline
def widen(bits):  # type: ignore[no-untyped-def]
    """The float32 of a bfloat16's 16 bits; exact."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inline
def narrow(value):  # type: ignore[no-untyped-def]
    """The bits of the nearest bfloat16, ties to even; every NaN is 0x7FC0, for rounding its bits up could end at infinity or at -0."""
    wide = np.float32(value)
    bits = wide.view(np.uint32)
    rounded = np.uint16((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16))
    return rounded if wide == wide else np.uint16(0x7FC0)


@inline_fused
def exp(x):  # type: ignore[no-untyped-def]
    """e^x of a float32."""
    held = min(max(x, _LOWEST), _HIGHEST)
    shifted = held * _INV_LN2 + _ROUND
    k = shifted - _ROUND
    r = (held - k * _LN2_HIGH) - k * _LN2_LOW
    p = _ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * (_C6 + r * _C7))))))
    # two halves of the power, so that 2^128 is never formed
    half = np.int32(k) >> np.int32(1)
    rest = np.int32(k) - half
    a = np.uint32((half + np.int32(127)) << np.int32(23)).view(np.float32)
    b = np.uint32((rest + np.int32(127)) << np.int32(23)).view(np.float32)
    y = p * a * b
    y = np.float32(0) if x < _LOWEST else y
    y = _INF if x > _HIGHEST else y
    return x if x != x else y


@inline_fused
def exp_below(x):  # type: ignore[no-untyped-def]
    """e^x of a float32 of at most 88, in fewer steps: a softmax subtracts its largest first.  Below -87.3 it stays at 1e-38; NaN stays."""
    held = _LOWEST if x < _LOWEST else x
    shifted = held * _INV_LN2 + _ROUND
    k = shifted - _ROUND
    r = (held - k * _LN2_HIGH) - k * _LN2_LOW
    p = _ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))
    # k stands in the low bits of `shifted`: pushed up into the exponent it is 2^k
    return p * np.uint32((np.float32(shifted).view(np.uint32) << np.uint32(23)) + np.uint32(0x3F800000)).view(np.float32)
