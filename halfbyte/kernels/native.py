"""CPU kernels as Python functions over pointers: compiled once by numba, kept as object code, run by torch's own threads.

    @native("x: T*, y: T*, columns: i64, factor: f32", T=("bf16", "f32"))
    def scale(x, y, columns, factor, first, last):            # rows first..last; two more arguments than the signature
        for i in range(first * columns, last * columns):
            store(y, i, load(x, i) * factor)

    scale(rows, x, y, columns, 2.0)                           # all rows, split over torch.get_num_threads() threads

T is one type per call, taken from the dtype of the first tensor named so.  bf16 arrives as its 16 bits: `load` widens to float32 and
`store` rounds to nearest even.  A kernel allocates nothing, raises nothing, keeps nothing.

Why not numba's own door.  (1) It compiles in every process, for its cache is read with pickle.  Here the optimized code is one object
file per kernel and type in the cache folder, under a name that holds the sources, the versions and the processor; a warm start imports
llvmlite alone.  (2) Its threads would stand beside torch's, which wait by spinning on the same cores.  A kernel is entered through the
OpenMP library that torch has loaded, so it runs on the very threads that ran the matrix product before it.  Where there is no such
library (it is looked for under Linux) plain threads share the rows.

Where the code is kept and when it is trusted: object_code.py.  Sources: https://numba.readthedocs.io, https://llvmlite.readthedocs.io
"""

import ctypes
import re
import struct
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from halfbyte.kernels.object_code import load_object

TYPES = {
    "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64,
    "u8": torch.uint8, "i8": torch.int8, "i32": torch.int32, "i64": torch.int64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_LLVM = {"i64": "i64", "f32": "float", "f64": "double"}
_NUMBA = {"bf16": "uint16", "f32": "float32", "f64": "float64", "u8": "uint8", "i8": "int8", "i32": "int32", "i64": "int64"}
_CALLS = re.compile(r"^declare .*?@(?!llvm\.)\"?([\w.]+)", re.MULTILINE)
_DEFINED = re.compile(r'^define .*?@("[^"]+"|[\w.$]+)\(', re.MULTILINE)
MATHS = frozenset({"memcpy", "memset", "memmove", "expf", "exp", "logf", "log", "sqrtf", "sqrt", "tanhf", "tanh", "powf", "fmodf"})
Function = TypeVar("Function", bound=Callable[..., Any])
SMALL = 1 << 14  # elements: below it waking a second thread costs more than it saves

_inlined: list[tuple[Callable[..., Any], set[str] | bool]] = []


def inline(function: Function) -> Function:
    """Mark a function that kernels may call; it is compiled into each of them, its own sums in their order whatever the kernel's are."""
    _inlined.append((function, False))
    return function


def inline_fused(function: Function) -> Function:
    """`inline` for functions whose products and sums may be fused into one instruction; never reordered."""
    _inlined.append((function, {"contract"}))
    return function


def load(pointer: Any, index: Any) -> Any:
    """pointer[index] as float32 (float64 stays)."""
    raise NotImplementedError("inside kernels only")


def store(pointer: Any, index: Any, value: Any) -> None:
    """pointer[index] = value, rounded to nearest even where the pointer is narrower."""
    raise NotImplementedError("inside kernels only")


class Native:
    """One kernel in all its types; call it with the number of items (rows, blocks) and the arguments of its signature.

    lazy  `function` returns the kernel when called: for kernels that need numba's own tools at hand
    fast  sums may be reordered and products fused: for sums over rows, never where bits must agree with another program's
    apart  what the kernel writes lies in no other tensor of the call: without it a loop over more than about four tensors asks so
           many questions about overlap that the compiler leaves it scalar
    """

    def __init__(self, function: Callable[..., Any], signature: str, types: tuple[str, ...], fast: bool, lazy: bool, apart: bool) -> None:
        self.function, self.types, self.fast, self.lazy, self.apart = function, types, fast, lazy, apart
        self.parameters = [tuple(part.strip() for part in item.split(":")) for item in signature.split(",")]
        self.name = f"{function.__module__.removeprefix('halfbyte.kernels.')}.{function.__name__}"
        # what a call looks at, worked out once: (name, wanted dtype; None for T and for numbers; what the number is)
        self._plan = [(name, TYPES.get(typed[:-1]) if typed.endswith("*") else None, typed) for name, typed in self.parameters]
        self._entries: dict[str, tuple[int, Any]] = {}
        self.__doc__ = function.__doc__

    def __call__(self, count: int, *arguments: Any, work: int | None = None) -> None:
        """Run items 0..count; `work` is about how many elements all of them have (default: those of the largest tensor).

        Tensors must be contiguous and on the CPU; what their shapes must be is the caller's to check.
        """
        _run(*self._prepared(count, arguments, work))

    def bind(self, count: int, *arguments: Any, work: int | None = None) -> "Bound":
        """The call of `__call__`, made ready: run again and again on the same tensors, or on others that are put in their places."""
        entry, slots, threads = self._prepared(count, arguments, work)
        return Bound(entry, slots, threads, {name: place + 3 for place, (name, *_) in enumerate(self._plan)}, arguments)

    def _prepared(self, count: int, arguments: tuple[Any, ...], work: int | None) -> tuple[tuple[int, Any], list[int], int]:
        """(the kernel for these types, its 64-bit arguments, how many threads)."""
        kind, slots, largest, of_kind = "", [count, 0, 0], 0, None
        for (name, wanted, typed), value in zip(self._plan, arguments, strict=True):
            if typed == "i64":
                slots.append(int(value))
                continue
            if typed in _LLVM:
                slots.append(_slot(typed, value))
                continue
            if value is None:
                slots.append(0)
                continue
            if wanted is None:
                if of_kind is None:
                    kind, of_kind = _NAMES[value.dtype], value.dtype
                wanted = of_kind
            if value.dtype != wanted or not value.is_contiguous() or not value.is_cpu:
                raise TypeError(f"{self.name}: {name} must be contiguous {wanted} on the CPU, found {value.dtype} {value.stride()}")
            largest = max(largest, value.numel())
            slots.append(value.data_ptr())
        entry = self._entries.get(kind)
        if entry is None:
            entry = self._entries[kind] = self._build(kind)
        return entry, slots, min(torch.get_num_threads(), count) if (largest if work is None else work) > SMALL else 1

    def _build(self, kind: str) -> tuple[int, Any]:
        if kind and kind not in self.types:
            raise TypeError(f"{self.name} is not made for {kind}, but for {', '.join(self.types)}")
        return load_object(f"{self.name}.{kind}" if kind else self.name, lambda: self._compile(kind))

    def _compile(self, kind: str) -> str:
        """The kernel's optimized LLVM assembly with its two doors."""
        from numba import njit, types

        _teach_numba()
        scalars = {name: getattr(types, numba_name) for name, numba_name in _NUMBA.items()}
        typed = [
            types.CPointer(scalars[kind if text == "T*" else text[:-1]]) if text.endswith("*") else scalars[text]
            for _, text in self.parameters
        ]
        signature = types.void(*typed, types.int64, types.int64)
        flags = {"reassoc", "nsz", "arcp", "contract"} if self.fast else False
        kernel = self.function() if self.lazy else self.function
        made = cast(Any, njit)(
            signature, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath=flags,
            pipeline_class=_compiler(self.apart),
        )(kernel)
        code = made.inspect_llvm(made.signatures[0])
        foreign = set(_CALLS.findall(code)) - MATHS
        if foreign:
            raise TypeError(f"{self.name} calls {', '.join(sorted(foreign))}: a kernel allocates nothing and raises nothing")
        called = next(name for name in _DEFINED.findall(code) if self.function.__name__ in name or self.lazy)
        return code + _doors(called, [text for _, text in self.parameters])


def native(
    signature: str, *, T: tuple[str, ...] = (), fast: bool = False, lazy: bool = False, apart: bool = False
) -> Callable[[Callable[..., Any]], Native]:
    """Make a kernel of a function; see the module.  Types: u8 i8 i32 i64 f32 f64 bf16, `*` for a pointer, T for one of several."""
    return lambda function: Native(function, signature, T, fast, lazy, apart)


@cache
def _compiler(apart: bool) -> Any:
    """numba's compiler, which has no option of its own for `apart`."""
    from numba.core.compiler import Compiler, CompilerBase, DefaultPassBuilder

    class Apart(CompilerBase):
        def define_pipelines(self) -> list[Any]:
            self.state.flags.noalias = True
            return [DefaultPassBuilder.define_nopython_pipeline(self.state)]

    return Apart if apart else Compiler


def _slot(typed: str, value: Any) -> int:
    """The bits of a floating-point number."""
    if typed == "f32":
        return int.from_bytes(struct.pack("<f", value), "little")
    if typed == "f64":
        return int.from_bytes(struct.pack("<d", value), "little")
    return int(value)


def _doors(called: str, typed: list[str]) -> str:
    """LLVM assembly: `range(slots, first, last)`, and `share(slots)` that each thread of a team enters.

    slots   count, address of omp_get_thread_num, address of omp_get_num_threads, then the arguments, 64 bits each
    """
    lines = []
    names = []
    for index, text in enumerate(typed):
        at, value = f"%p{index}", f"%v{index}"
        kind = "ptr" if text.endswith("*") else _LLVM[text]
        lines += [f"  {at} = getelementptr i64, ptr %slots, i64 {index + 3}", f"  {value} = load {kind}, ptr {at}"]
        names.append(f"{kind} {value}")
    loads, passed = "\n".join(lines), ", ".join([*names, "i64 %first", "i64 %last"])
    return f"""
define void @halfbyte_range(ptr %slots, i64 %first, i64 %last) {{
  %result = alloca [4 x i64]
  %failure = alloca ptr
{loads}
  %status = call i32 @{called}(ptr %result, ptr %failure, {passed})
  ret void
}}
define void @halfbyte_share(ptr %slots) {{
  %count = load i64, ptr %slots
  %at1 = getelementptr i64, ptr %slots, i64 1
  %number = load ptr, ptr %at1
  %at2 = getelementptr i64, ptr %slots, i64 2
  %size = load ptr, ptr %at2
  %me = call i32 %number()
  %all = call i32 %size()
  %i = zext i32 %me to i64
  %n = zext i32 %all to i64
  %a = mul i64 %count, %i
  %first = sdiv i64 %a, %n
  %j = add i64 %i, 1
  %b = mul i64 %count, %j
  %last = sdiv i64 %b, %n
  call void @halfbyte_range(ptr %slots, i64 %first, i64 %last)
  ret void
}}
"""


def _openmp_in(maps: str) -> str:
    """Path of GNU's OpenMP library in a text like /proc/self/maps, torch's own where there are several; empty where there is none."""
    found = re.findall(r"^\S+ \S+ \S+ \S+ \S+ +(/.*/libgomp[^/\n]*\.so[^/\n]*)$", maps, re.MULTILINE)
    return next((path for path in found if "/torch" in path), found[0] if found else "")


@cache
def _team() -> tuple[Any, int, int]:
    """(GOMP_parallel, address of omp_get_thread_num, of omp_get_num_threads) of the library torch has loaded; None where there is none."""
    maps = Path("/proc/self/maps")
    found = _openmp_in(maps.read_text()) if maps.is_file() else ""
    if not found:
        return None, 0, 0
    library = ctypes.CDLL(found)
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    asked = (library.omp_get_thread_num, library.omp_get_num_threads)
    number, size = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in asked)
    return library.GOMP_parallel, number, size


def _run(entry: tuple[int, Any], slots: list[int], threads: int) -> None:
    _enter(entry, _packed(slots, threads), slots[0], threads)


def _packed(slots: list[int], threads: int) -> Any:
    """The arguments as the kernel reads them."""
    if threads > 1:
        _, slots[1], slots[2] = _team()
    return (ctypes.c_int64 * len(slots))(*slots)


def _enter(entry: tuple[int, Any], packed: Any, count: int, threads: int) -> None:
    share, run_range = entry
    if threads <= 1:
        run_range(packed, 0, count)
        return
    parallel = _team()[0]
    if parallel is not None:
        parallel(share, packed, threads, 0)
        return
    edges = [count * part // threads for part in range(threads + 1)]
    helpers = [threading.Thread(target=run_range, args=(packed, edges[part], edges[part + 1])) for part in range(1, threads)]
    for helper in helpers:
        helper.start()
    run_range(packed, edges[0], edges[1])
    for helper in helpers:
        helper.join()


class Bound:
    """A kernel with its arguments in place: calling it costs two microseconds, for nothing is looked at again.

    It keeps the tensors it was made with; `point` and `set` put another tensor or number into a place, which the caller has checked.
    """

    def __init__(self, entry: tuple[int, Any], slots: list[int], threads: int, places: dict[str, int], held: tuple[Any, ...]) -> None:
        self._entry, self._count, self._threads = entry, slots[0], threads
        self._packed, self._places, self._held = _packed(slots, threads), places, held

    def __call__(self) -> None:
        _enter(self._entry, self._packed, self._count, self._threads)

    def point(self, name: str, tensor: torch.Tensor) -> None:
        """Another tensor of the same type, contiguous and on the CPU; the caller keeps it alive."""
        self._packed[self._places[name]] = tensor.data_ptr()

    def set(self, name: str, number: int) -> None:
        """Another whole number."""
        self._packed[self._places[name]] = number


_taught = 0


def _teach_numba() -> None:
    """Let numba compile `load`, `store` and everything marked `inline` so far."""
    global _taught
    from numba import types
    from numba.extending import overload, register_jitable

    from halfbyte.kernels.scalars import narrow, widen

    if _taught == 0:

        @overload(load)
        def _load(pointer: Any, index: Any) -> Any:
            def widened(pointer: Any, index: Any) -> Any:
                return widen(pointer[index])

            def plain(pointer: Any, index: Any) -> Any:
                return pointer[index]

            return widened if pointer.dtype == types.uint16 else plain

        @overload(store)
        def _store(pointer: Any, index: Any, value: Any) -> Any:
            def narrowed(pointer: Any, index: Any, value: Any) -> Any:
                pointer[index] = narrow(value)

            def plain(pointer: Any, index: Any, value: Any) -> Any:
                pointer[index] = value

            return narrowed if pointer.dtype == types.uint16 else plain

    for function, flags in _inlined[_taught:]:
        # said for each: numba would hand the calling kernel's flags down, and reordering undoes the rounding steps of `exp`
        register_jitable(fastmath=flags)(function)
    _taught = len(_inlined)
