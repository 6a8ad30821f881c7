"""Which vector instructions kernels are made for: avx512 (with its 16-bit part), avx2 (with fused multiply-add), or plain."""

from functools import cache

from halfbyte.kernels import object_code

_NAMED = {"haswell": "avx2", "x86-64-v3": "avx2", "znver3": "avx2", "skylake-avx512": "avx512", "x86-64-v4": "avx512", "znver4": "avx512"}
LEVELS = ("avx512", "avx2", "plain")


@cache
def short_products() -> bool:
    """Products of bfloat16 pairs summed in float32 (vdpbf16ps) can be used."""
    return level() == "avx512" and "+avx512bf16" in object_code.processor()[1].split(",")


@cache
def level() -> str:
    """One of LEVELS, for this machine or for the processor that NUMBA_CPU_NAME and NUMBA_CPU_FEATURES ask for."""
    name, features = object_code.processor()
    held = set(features.split(","))
    if {"+avx512f", "+avx512bw", "+avx512vl"} <= held:
        return "avx512"
    if {"+avx2", "+fma"} <= held:
        return "avx2"
    return "plain" if features else _NAMED.get(name, "plain")
