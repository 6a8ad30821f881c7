"""safetensors files: headers checked before use, indexes that stay in their folder, writes that leave old or new."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.errors import StorageError, WeightError
from halfbyte.formats import safetensors_io as io

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "b": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]}}


def _file(path: Path, header: object, data: bytes = bytes(25)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        name: torch.zeros(3, 5, dtype=kind) if index % 2 else torch.ones((), dtype=kind)
        for index, (name, kind) in enumerate(io.DTYPES.items())
    }
    tensors["empty"] = torch.zeros(0, 4)
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = io.read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"} and header.tensors.keys() == tensors.keys()
    for name, info in header.tensors.items():
        assert (info.dtype, info.shape) == (tensors[name].dtype, tuple(tensors[name].shape))


@pytest.mark.parametrize(
    "header,data",
    [
        (b"{", bytes(25)),
        (b"[]", b""),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
        (b'{"a":1,"a":2}', b""),
        (b"\xff\xfe{}", b""),
        (GOOD, bytes(24)),
        (GOOD, bytes(26)),
        ({**GOOD, "__metadata__": {"format": 1}}, bytes(25)),
        ({**GOOD, "__metadata__": []}, bytes(25)),
        ({"a": {**GOOD["a"], "dtype": "F31"}, "b": GOOD["b"]}, bytes(25)),
        ({"a": {**GOOD["a"], "shape": [2, 4]}, "b": GOOD["b"]}, bytes(25)),
        ({"a": {**GOOD["a"], "shape": [-2, -3]}, "b": GOOD["b"]}, bytes(25)),
        ({"a": {**GOOD["a"], "shape": [2.0, 3]}, "b": GOOD["b"]}, bytes(25)),
        ({"a": {**GOOD["a"], "shape": [2**32, 2**32, 6]}, "b": GOOD["b"]}, bytes(25)),
        ({"a": {**GOOD["a"], "shape": [1] * 9}, "b": GOOD["b"]}, bytes(25)),
        ({"a": {**GOOD["a"], "shape": [True, 6]}, "b": GOOD["b"]}, bytes(25)),
        ({"a": GOOD["a"], "b": {**GOOD["b"], "data_offsets": [23, 24]}}, bytes(24)),
        ({"a": GOOD["a"], "b": {**GOOD["b"], "data_offsets": [25, 26]}}, bytes(26)),
        ({"a": GOOD["a"], "b": {**GOOD["b"], "data_offsets": [25, 24]}}, bytes(25)),
        ({"a": GOOD["a"], "b": {**GOOD["b"], "data_offsets": [24]}}, bytes(25)),
        ({"a": GOOD["a"], "b": {"dtype": "U8", "shape": []}}, bytes(25)),
        ({"a": GOOD["a"], "b": 7}, bytes(25)),
        ({str(n): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(50_001)}, b""),
    ],
)
def test_damaged_headers_are_refused(header: object, data: bytes, tmp_path: Path) -> None:
    path = _file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(WeightError) as caught:
        io.read_header(path)
    assert str(path) in str(caught.value)
    _file(path, GOOD)
    assert set(io.read_header(path).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    "content,said",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        (b"<!DOCTYPE html><html></html>", "HTML"), (b"<html><body>404</body></html>", "HTML"), (b"PK\x03\x04" + bytes(40), "pickle"),
        (b"", "complete"), (b"\x10\x00", "complete"), ((2**62).to_bytes(8, "little") + b"{}", "complete"),
    ],
)  # fmt: skip
def test_other_files_are_told_by_name(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightError, match=said):
        io.read_header(tmp_path / "model.safetensors")


def test_header_at_the_limit_and_one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(GOOD).encode()
    path = _file(tmp_path / "x.safetensors", text)
    monkeypatch.setattr(io, "HEADER_LIMIT", len(text))
    io.read_header(path)
    monkeypatch.setattr(io, "HEADER_LIMIT", len(text) - 1)
    with pytest.raises(WeightError, match="at most"):
        io.read_header(path)


def test_truncation_at_every_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(4, 4), "b": torch.randn(3)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightError):
            io.read_header(path)


BAD_NAMES = [
    "../x.safetensors", "a/../../x.safetensors", "/etc/passwd", "/tmp/x.safetensors", "sub/x.safetensors", "x.bin", "x.pt", "x.pkl", "",
    ".", "..", ".x.safetensors", "x.safetensors.bin", "x.safetensors\x00.bin", "x\n.safetensors", "C:\\x.safetensors", "..\\x.safetensors",
    "~/x.safetensors", "$HOME.safetensors", "x y.safetensors", "x" * 300 + ".safetensors", "file:///x.safetensors", "x.SAFETENSORS", None,
    7, ["x.safetensors"], {"a": 1}, True, "-rf.safetensors", "x.safetensors/", "http://x/x.safetensors", "./x.safetensors",
    "x%2f.safetensors", "кириллица.safetensors", "x.safetensors ", "\t.safetensors", "*.safetensors", "x;y.safetensors",
    "missing.safetensors",
    "x.safetensors?",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=range(len(BAD_NAMES)))
def test_an_index_points_into_its_own_folder(name: object, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "x.safetensors")
    (folder / io.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightError):
        io.weight_files(folder)
    (folder / io.INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    assert io.weight_files(folder) == [folder / "x.safetensors"]


def test_links_out_of_the_folder_are_refused_but_for_a_hub_cache(tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    folder, blobs = cache / "snapshots" / "abc", cache / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(1)}, blobs / "f00d")
    (folder / "x.safetensors").symlink_to("../../blobs/f00d")
    (folder / io.INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    assert len(io.weight_files(folder)) == 1
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    (folder / "x.safetensors").unlink()
    (folder / "x.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(WeightError, match="own folder"):
        io.weight_files(folder)


@pytest.mark.parametrize("text", ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000))
def test_broken_indexes_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / io.INDEX).write_text(text)
    with pytest.raises(WeightError):
        io.weight_files(tmp_path)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(WeightError, match=r"pickled weights only \(pytorch_model.bin\)"):
        io.weight_files(tmp_path)


def test_sharded_save_is_read_by_the_library_and_by_transformers(tmp_path: Path, tiny_llama) -> None:  # type: ignore[no-untyped-def]
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    files = io.save_sharded(tmp_path, model.state_dict(), 100_000, {"format": "pt"})
    assert len(files) > 2 and all(file.stat().st_size < 140_000 for file in files)
    index = json.loads((tmp_path / io.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], model.state_dict()[name])
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    with io.open_tensors(tmp_path) as tensors:
        assert set(tensors) == set(model.state_dict()) and tensors.metadata == {"format": "pt"}
        assert torch.equal(tensors["lm_head.weight"], model.state_dict()["lm_head.weight"])
        copied = io.save_sharded(tmp_path / "copy", tensors, 10**9)
    assert [file.name for file in copied] == [io.SINGLE] and len(load_file(copied[0])) == len(index["weight_map"])
    io.save_sharded(tmp_path, {"a": torch.ones(2)})
    assert sorted(file.name for file in tmp_path.glob("model*")) == [io.SINGLE]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / io.INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(WeightError, match="one file only"), io.open_tensors(tmp_path):
        pass


def test_what_a_killed_save_left_does_not_stop_the_next(tmp_path: Path) -> None:
    """In a container the process has the same number again."""
    (tmp_path / f".staging-{os.getpid()}").mkdir()
    (tmp_path / f".one.safetensors.{os.getpid()}.part").mkdir()
    io.save_sharded(tmp_path, {"a": torch.ones(2)})
    io.save(tmp_path / "one.safetensors", {"a": torch.ones(3)})
    assert len(load_file(tmp_path / "one.safetensors")["a"]) == 3


@pytest.mark.parametrize("point", ("pieces", "replace"))
def test_a_failing_disk_leaves_the_old_files(point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io.save_sharded(tmp_path, {"a": torch.zeros(100), "b": torch.zeros(100)}, 500)
    io.save(tmp_path / "one.safetensors", {"a": torch.zeros(3)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*(io, "pieces") if point == "pieces" else (os, "replace"), full)
    with pytest.raises(StorageError, match="No space left"):
        io.save_sharded(tmp_path, {"a": torch.ones(100), "b": torch.ones(100)}, 500)
    with pytest.raises(StorageError, match="No space left"):
        io.save(tmp_path / "one.safetensors", {"a": torch.ones(3)})
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_the_system_says_while_a_file_is_written_is_a_storage_error(tmp_path: Path) -> None:
    """Here it refuses files above 10,000 bytes."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, usual[1]))
    try:
        with pytest.raises(StorageError, match="File too large") as caught:
            io.save(tmp_path / "one.safetensors", {"a": torch.ones(4_000)})
        assert caught.value.code == "E-STORE-011"
        with pytest.raises(StorageError, match="File too large") as caught:
            io.save_sharded(tmp_path / "model", {"a": torch.ones(4_000), "b": torch.ones(4_000)}, 17_000)
        assert caught.value.place == str(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert [path.name for path in tmp_path.rglob("*")] == ["model"]


def test_reading_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """A tensor is read when asked for: after the others' bytes are destroyed in place, only they are wrong."""
    io.save(tmp_path / "a.safetensors", {"x": torch.ones(8), "y": torch.ones(8)})
    with io.open_tensors(tmp_path / "a.safetensors") as tensors:
        x = tensors["x"].clone()
        with (tmp_path / "a.safetensors").open("r+b") as file:
            file.seek(-32, os.SEEK_END)
            file.write(bytes(32))
        assert torch.equal(x, torch.ones(8)) and torch.equal(tensors["y"], torch.zeros(8))


def test_a_file_written_piece_by_piece_is_read_by_the_library(tmp_path: Path) -> None:
    """Every type, no element, one number, and what does not lie in order; the pieces of one that does are its own memory."""
    made = {str(dtype): torch.arange(7, dtype=torch.float32).to(dtype) for dtype in io.DTYPES.values()}
    made |= {"none": torch.empty(0, 3), "one": torch.tensor(2.5), "turned": torch.arange(6.0).reshape(2, 3).T, "a\"é\n": torch.ones(1)}
    path = tmp_path / "made.safetensors"
    path.write_bytes(b"".join(io.pieces(made)))
    found = load_file(path)
    assert found.keys() == made.keys() and io.read_header(path).tensors.keys() == made.keys()
    assert all(found[name].dtype == one.dtype and torch.equal(found[name], one.contiguous()) for name, one in made.items())
    held = torch.zeros(5)
    *_, last = io.pieces({"held": held})
    held[4] = 1.0
    assert bytes(last[16:]) == bytes(torch.ones(1).numpy())
    with pytest.raises(WeightError, match="E-WEIGHT-059"):
        list(io.pieces({"odd": torch.zeros(2, dtype=torch.complex64)}))
