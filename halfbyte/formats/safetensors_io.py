"""safetensors files: the header checked before anything is believed, one tensor at a time, and written so that a crash leaves old or new.

    8 bytes little-endian header length | JSON header {name: {dtype, shape, data_offsets}} | bytes

Limits on what is read: header <= 8 MB, <= 50,000 tensors, known dtypes, offsets that tile the data part without gap or overlap, and a
file of exactly that size.  So a truncated download, a pointer file of Git LFS, an HTML error page or a pickle under a wrong name are
each told by name.

Source: https://github.com/huggingface/safetensors#format
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from halfbyte.errors import StorageError, WeightError

HEADER_LIMIT = 8_000_000
TENSOR_LIMIT = 50_000
INDEX_LIMIT = 16_000_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """What the header says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header: tensors by name in the order of the file, and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Parse and check the header of one file.  Raises WeightError naming the file and what is wrong with it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _require_kind(path, start, size, length)
            text = file.read(length)
    except OSError as failure:
        raise StorageError("a weight file can be read", code="E-STORE-010", place=str(path), found=str(failure)) from failure
    try:
        raw = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as failure:
        raise _bad(path, "E-WEIGHT-031", "the header of a safetensors file is JSON", str(failure)) from failure
    if not isinstance(raw, dict):
        raise _bad(path, "E-WEIGHT-031", "the header of a safetensors file is JSON", f"{type(raw).__name__} instead of an object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "E-WEIGHT-032", "the metadata of a safetensors file maps text to text", str(type(metadata).__name__))
    if len(raw) > TENSOR_LIMIT:
        raise _bad(path, "E-WEIGHT-033", f"a safetensors file holds at most {TENSOR_LIMIT} tensors", str(len(raw)))
    tensors = {name: _tensor_info(path, name, entry) for name, entry in raw.items()}
    _require_tiling(path, tensors, size - 8 - length)
    return Header(tensors, metadata)


def _require_kind(path: Path, start: bytes, size: int, length: int) -> None:
    kinds = {
        b"version ": "a pointer file of Git LFS: the weights were not fetched", b"<!doctyp": "an HTML page", b"<html": "an HTML page",
        b"pk": "a zip or pickle file (a .bin under another name?)",
    }  # fmt: skip
    named = next((kind for magic, kind in kinds.items() if start.lower().startswith(magic)), "")
    if named:
        raise _bad(path, "E-WEIGHT-030", "a weight file is in the safetensors format", named)
    if len(start) < 8 or length < 2 or length > size - 8:
        raise _bad(path, "E-WEIGHT-034", "a safetensors file is complete", f"{size} bytes, of which the header should take {length + 8}")
    if length > HEADER_LIMIT:
        raise _bad(path, "E-WEIGHT-035", f"a safetensors header has at most {HEADER_LIMIT} bytes", str(length))


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice")
    return made


def _tensor_info(path: Path, name: str, entry: object) -> TensorInfo:
    def whole(values: object, most: int) -> bool:
        return isinstance(values, list) and len(values) <= most and all(type(value) is int and 0 <= value < 2**63 for value in values)

    if not isinstance(entry, dict) or entry.get("dtype") not in DTYPES or not whole(entry.get("shape"), 8):
        raise _bad(path, "E-WEIGHT-036", "a tensor has a known dtype and a shape", str(entry)[:200], name)
    offsets = entry.get("data_offsets") or []
    if not whole(offsets, 2) or len(offsets) != 2:
        raise _bad(path, "E-WEIGHT-036", "a tensor has a known dtype and a shape", str(entry)[:200], name)
    dtype, count = DTYPES[entry["dtype"]], 1
    for size in entry["shape"]:
        count *= size
    if offsets[1] - offsets[0] != count * dtype.itemsize:
        found = f"{offsets[1] - offsets[0]} bytes for {entry['dtype']} of shape {entry['shape']}"
        raise _bad(path, "E-WEIGHT-037", "a tensor has as many bytes as its shape asks for", found, name)
    return TensorInfo(dtype, tuple(entry["shape"]), offsets[0], offsets[1])


def _require_tiling(path: Path, tensors: dict[str, TensorInfo], size: int) -> None:
    at = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != at:
            raise _bad(path, "E-WEIGHT-038", "the tensors of a file lie side by side", f"byte {info.start} instead of {at}", name)
        at = info.stop
    if at != size:
        raise _bad(path, "E-WEIGHT-039", "a safetensors file is as long as its header says", f"{size} bytes of data, the header says {at}")


def _bad(path: Path, code: str, rule: str, found: str, name: str = "") -> WeightError:
    place = f"{path}, tensor {name}" if name else str(path)
    return WeightError(rule, code=code, place=place, found=found, remedy="fetch or write the file again")


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors of one or several checked files; a tensor is read when it is asked for and held by nobody here."""

    def __init__(self, files: list[Path], open_file: Callable[[Path], object]) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._open = open_file
        self._where: dict[str, Path] = {}
        for path in files:
            header = read_header(path)
            doubled = self.infos.keys() & header.tensors.keys()
            if doubled:
                raise _bad(path, "E-WEIGHT-040", "a tensor stands in one file only", ", ".join(sorted(doubled)[:3]))
            self.infos |= header.tensors
            self.metadata |= header.metadata
            self._where |= dict.fromkeys(header.tensors, path)

    def __getitem__(self, name: str) -> Tensor:
        return self._open(self._where[name]).get_tensor(name)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


@contextmanager
def open_tensors(path: Path) -> Iterator[LazyTensors]:
    """The tensors of a file, or of a model folder (model.safetensors or its index): every header is checked first.

    Raises WeightError on a damaged file, an index that points elsewhere, or a folder with pickled weights only.
    """
    handles: dict[Path, object] = {}

    def open_file(file: Path) -> object:
        if file not in handles:
            handles[file] = safe_open(file, framework="pt")
        return handles[file]

    try:
        yield LazyTensors(weight_files(path) if path.is_dir() else [path], open_file)
    finally:
        handles.clear()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or folder in memory, for small ones such as adapters."""
    with open_tensors(path) as tensors:
        return {name: tensors[name].clone() for name in tensors}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.  Raises WeightError where there are none or the index is not plain."""
    if (folder / INDEX).exists():
        return _indexed(folder)
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    others = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    raise WeightError(
        "a model folder holds its weights as safetensors", code="E-WEIGHT-041", place=str(folder),
        found=f"pickled weights only ({', '.join(others[:3])})" if others else "no weight file", expected=f"{SINGLE} or {INDEX}",
        remedy="pickles can run code and are never read; convert them with transformers' save_pretrained on a machine that trusts them"
        if others else "name the folder that holds the model",
    )  # fmt: skip


def _indexed(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.stat().st_size > INDEX_LIMIT:
        raise _bad(index, "E-WEIGHT-042", f"an index has at most {INDEX_LIMIT} bytes", str(index.stat().st_size))
    try:
        names = json.loads(index.read_text())["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as failure:
        raise _bad(index, "E-WEIGHT-043", "an index is JSON with a weight_map", str(failure)) from failure
    root = folder.resolve()
    for name in names:
        plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", name) and len(name) <= 200
        if not plain or ((folder / name).is_symlink() and not _same_tree(root, (folder / name).resolve())):
            raise _bad(index, "E-WEIGHT-044", "an index points to safetensors files in its own folder", repr(name)[:200])
    files = [folder / name for name in sorted(set(names))]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        found = f"missing: {', '.join(missing[:3])}" if missing else "no file named"
        raise _bad(index, "E-WEIGHT-045", "every file that the index names is there", found)
    return files


def _same_tree(root: Path, target: Path) -> bool:
    """A link may leave the folder only inside a cache that keeps <name>/snapshots/<commit> beside <name>/blobs."""
    return target.is_relative_to(root) or (root.parent.name == "snapshots" and target.is_relative_to(root.parents[1] / "blobs"))


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one file; after a crash at any moment `path` is the old file or the new one.  Raises StorageError."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        _write(staged, {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
        os.replace(staged, path)
        sync(path.parent)
    except (OSError, RuntimeError) as failure:
        staged.unlink(missing_ok=True)
        raise _storage(path, str(failure)) from failure
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def _write(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """One file, synced.  Raises OSError."""
    with path.open("wb") as file:
        for piece in pieces(tensors, metadata or {"format": "pt"}):
            file.write(piece)
    sync(path)


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """A file with these tensors, piece by piece: the length of the header, the header, then one tensor after the other, wide types first.

    Copies nothing that lies contiguous on the host, where the library's `save` would hold everything twice more.  Raises WeightError for a
    type that the format does not have.  Format: https://github.com/huggingface/safetensors#format
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        one = tensors[name]
        if one.dtype not in names:
            raise _bad(Path(name), "E-WEIGHT-059", "a tensor must be of a type that safetensors files have", str(one.dtype), name)
        entries[name] = {"dtype": names[one.dtype], "shape": list(one.shape), "data_offsets": [at, at + one.nbytes]}
        at += one.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little")
    yield header
    for name in order:
        if tensors[name].numel():
            yield tensors[name].detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data


def save_sharded(
    folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = 4 << 30, metadata: Mapping[str, str] | None = None
) -> list[Path]:
    """Write tensors into `folder` in files of at most `max_shard_bytes` (a larger tensor alone in one) with transformers' index.

    `tensors` may be lazy: one shard at a time is in memory.  All shards are staged and synced first, then the old index is taken
    away, the shards are renamed into place and the new index is written last: a crash leaves the old weights, or a folder that
    names what is missing, never a mixture.  Raises StorageError when the disk is full or read-only; nothing is left behind then.
    """
    groups = _groups(tensors, max_shard_bytes)
    single = len(groups) == 1
    names = [SINGLE] if single else [f"model-{n + 1:05d}-of-{len(groups):05d}.safetensors" for n in range(len(groups))]
    staging = folder / f".staging-{os.getpid()}-{secrets.token_hex(4)}"
    total = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        for name, group in zip(names, groups, strict=True):
            shard = {key: tensors[key].contiguous() for key in group}
            total += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
            save(staging / name, shard, metadata)
        weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        if not single:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            sync(staging / INDEX)
        (folder / INDEX).unlink(missing_ok=True)
        for name in (*names, *([] if single else [INDEX])):
            os.replace(staging / name, folder / name)
        for old in folder.glob("model*.safetensors"):
            if old.name not in names and re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", old.name):
                old.unlink()
        sync(folder)
    except StorageError as failure:  # of a staged file: told with the place that the caller knows
        raise _storage(folder, failure.found) from failure
    except (OSError, RuntimeError) as failure:
        raise _storage(folder, str(failure)) from failure
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [folder / name for name in names]


def _groups(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """Names in order, cut so that each group's bytes stay within `most`."""
    groups: list[list[str]] = [[]]
    held = 0
    for name in tensors:
        info = tensors.infos[name] if isinstance(tensors, LazyTensors) else None
        size = info.stop - info.start if info else tensors[name].numel() * tensors[name].element_size()
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _storage(path: Path, found: str) -> StorageError:
    return StorageError(
        "weights can be written", code="E-STORE-011", place=str(path), found=found,
        remedy="free space or choose another folder", nothing_done="What was there before is unchanged.",
    )  # fmt: skip


def sync(path: Path) -> None:
    """Ask the disk to keep what was written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
