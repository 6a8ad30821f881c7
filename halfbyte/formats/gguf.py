"""The header of a GGUF file, read with limits: what is in it, and whether the file can be trusted to a converter.

    "GGUF" | version u32 | tensor count u64 | key count u64 | keys ... | tensor infos ... | padding | tensor bytes

All arithmetic is done in Python integers against the size of the file, so a header that promises more than the file holds is
refused before anything is allocated.  Tensor bytes are not read here: models/source.py hands a checked file to transformers.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (layout, types, alignment),
https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py (block sizes).
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from halfbyte.errors import ModelError

MAX_KEYS = 10_000
MAX_TENSORS = 50_000
MAX_STRING_BYTES = 1 << 20
MAX_ARRAY_ITEMS = 4_000_000
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

# type number: (name, elements per block, bytes per block)
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: name, shape (slowest dimension last, as in the file), type name, first byte and size in bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What the file says about itself; arrays longer than 64 items are kept as their length only."""

    version: int
    keys: dict[str, object]
    tensors: tuple[GgufTensor, ...]
    data_start: int


def read_header(path: Path) -> GgufHeader:
    """The checked header of the GGUF file at `path`; raises ModelError where the file is not whole or not GGUF."""
    with path.open("rb") as file:
        return _Reader(path, file).header()


class _Reader:
    """A cursor over the file that never reads past its end."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size

    def fail(self, found: str, expected: str) -> ModelError:
        return ModelError(
            "a GGUF file must be whole and well formed", code="E-MODEL-020", place=f"{self.path.name} byte {self.file.tell():,}",
            found=found, expected=expected, remedy="copy or download the file again and compare its size",
        )  # fmt: skip

    def take(self, count: int) -> bytes:
        left = self.size - self.file.tell()
        if count > left:
            raise self.fail(f"{left:,} bytes left", f"{count:,} more bytes")
        return self.file.read(count)

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def count(self, form: str, limit: int, what: str) -> int:
        found = self.number(form)
        if found > limit:
            raise self.fail(f"{found:,} {what}", f"at most {limit:,}")
        return found

    def string(self) -> str:
        raw = self.take(self.count("<Q", MAX_STRING_BYTES, "bytes in a string"))
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> object:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth == 0:
            return self.array()
        if kind not in _SCALARS:
            raise self.fail(f"value type {kind}", "a type of the GGUF specification, arrays not nested")
        form = _SCALARS[kind]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def array(self) -> object:
        kind = self.number("<I")
        items = self.count("<Q", MAX_ARRAY_ITEMS, "items in an array")
        if kind in _SCALARS:
            width = struct.calcsize(_SCALARS[kind])
            raw = self.take(items * width)
            return list(struct.unpack(f"<{items}{_SCALARS[kind][1]}", raw)) if items <= 64 else items
        kept = [self.value(kind, depth=1) for _ in range(items)]
        return kept if items <= 64 else items

    def header(self) -> GgufHeader:
        magic = self.take(4) if self.size >= 4 else b""
        if magic != b"GGUF":
            raise self.fail(f"the first bytes {magic!r}", "b'GGUF'")
        version = self.number("<I")
        if version not in (2, 3):
            raise self.fail(f"version {version}", "version 2 or 3")
        tensor_count = self.count("<Q", MAX_TENSORS, "tensors")
        key_count = self.count("<Q", MAX_KEYS, "keys")
        keys: dict[str, object] = {}
        for _ in range(key_count):
            name = self.string()
            if name in keys:
                raise self.fail(f"the key {name!r} twice", "each key once")
            keys[name] = self.value(self.number("<I"))
        return self.tensors(version, keys, tensor_count)

    def tensors(self, version: int, keys: dict[str, object], count: int) -> GgufHeader:
        listed = [self.tensor() for _ in range(count)]
        alignment = keys.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment > 1 << 16 or alignment % 8:
            raise self.fail(f"alignment {alignment!r}", "a multiple of 8 up to 65,536")
        start = -(-self.file.tell() // alignment) * alignment
        for tensor in listed:
            if tensor.offset % alignment or start + tensor.offset + tensor.nbytes > self.size:
                end = start + tensor.offset + tensor.nbytes
                raise self.fail(f"the file ends at {self.size:,} bytes", f"{end:,} bytes, where tensor {tensor.name} ends")
        if len({tensor.name for tensor in listed}) != len(listed):
            raise self.fail("a tensor name twice", "each tensor once")
        return GgufHeader(version, keys, tuple(listed), start)

    def tensor(self) -> GgufTensor:
        name = self.string()
        rank = self.count("<I", MAX_DIMENSIONS, "dimensions")
        shape = tuple(self.number("<Q") for _ in range(rank))
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in TENSOR_TYPES:
            raise self.fail(f"tensor type {kind} of {name}", "a tensor type of the GGUF specification")
        type_name, per_block, block_bytes = TENSOR_TYPES[kind]
        elements = 1
        for extent in shape:
            elements *= extent
        if not shape or elements <= 0 or shape[0] % per_block:
            raise self.fail(f"shape {shape} of {name} in {type_name}", f"a first dimension that is a multiple of {per_block}")
        return GgufTensor(name, shape, type_name, offset, elements // per_block * block_bytes)
