"""GGUF headers against the reference writer and reader; damaged ones fail fast, without memory."""

import struct
import time
from pathlib import Path

import gguf
import numpy
import pytest

from halfbyte.errors import ModelError
from halfbyte.formats.gguf import TENSOR_TYPES, read_header


def write(path: Path) -> bytes:
    """A small file with every kind of value."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "grüße")
    writer.add_array("a.words", ["x", "yy", ""])
    writer.add_array("a.numbers", list(range(100)))
    writer.add_tensor("one", numpy.arange(96, dtype=numpy.float32).reshape(3, 32))
    writer.add_tensor("two", numpy.zeros((4, 36), dtype=numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_the_header_is_what_the_reference_reader_finds(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    assert ours.keys["general.architecture"] == "llama" and ours.keys["a.text"] == "grüße" and ours.keys["a.words"] == ["x", "yy", ""]
    assert ours.keys["a.u32"] == 7 and ours.keys["a.bool"] is True and ours.keys["a.numbers"] == 100
    for mine, tensor in zip(ours.tensors, theirs.tensors, strict=True):
        assert (mine.name, list(mine.shape), mine.type) == (tensor.name, tensor.shape.tolist(), tensor.tensor_type.name)
        assert (ours.data_start + mine.offset, mine.nbytes) == (tensor.data_offset, tensor.n_bytes)


def test_block_sizes_are_those_of_the_reference() -> None:
    for number, (name, elements, size) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (elements, size))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    whole = write(path)
    end = read_header(path)
    last = max(end.data_start + tensor.offset + tensor.nbytes for tensor in end.tensors)
    for length in [*range(0, end.data_start, 3), last - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="E-MODEL-020"):
            read_header(path)


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    """Any header of one changed byte is read or refused with the one error; 600 of them take no time."""
    path = tmp_path / "m.gguf"
    whole = bytearray(write(path))
    generator = numpy.random.default_rng(0)
    began = time.monotonic()
    for place in generator.integers(0, read_header(path).data_start, 600):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(generator.integers(0, 8))
        path.write_bytes(changed)
        try:
            read_header(path)
        except ModelError as fault:
            assert fault.code == "E-MODEL-020"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<IQQ", 3, 1 << 60, 1), struct.pack("<IQQ", 3, 1, 1 << 60), struct.pack("<IQQQ", 3, 0, 1, 1 << 62),
        struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 1 << 61), struct.pack("<IQQ", 9, 0, 0),
        struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 1 << 62, 1 << 62, 0, 0),
        struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 77),
    ],
)
def test_a_header_that_promises_too_much_fails_at_once(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + body + b"\0" * 25)
    began = time.monotonic()
    with pytest.raises(ModelError, match="E-MODEL-020"):
        read_header(path)
    assert time.monotonic() - began < 5
