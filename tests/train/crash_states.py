"""Crash states of a power loss: what a file system may show after the power went at some call, by the weakest promises it makes.

The calls of a save are recorded.  After a crash at call `i`

    a file's bytes are there        for certain if the file was synced before `i`; else any number of its first bytes are, or none
    a name made, moved or removed   for certain if its folder was synced after that and before `i`; else it may be there or not,
                                    and names may have changed in another order than they were asked to

Source: Pillai et al., OSDI 2014 (ALICE).
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Call:
    """One call: create, write, sync, mkdir, rename, unlink, rmdir; `inode` numbers files and folders as they are made."""

    kind: str
    folder: int
    name: str
    inode: int
    content: bytes = b""
    new_folder: int = -1
    new_name: str = ""


class Recorder:
    """Notes the calls below one folder, which must exist and be empty."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[Call] = []
        self.inodes = {root: 0}
        self.open_files: dict[int, Path] = {}

    def inside(self, path: object) -> bool:
        return isinstance(path, str | Path) and Path(path).is_relative_to(self.root)

    def add(self, kind: str, path: Path, content: bytes = b"") -> None:
        if kind in ("create", "mkdir"):
            self.inodes[path] = len(self.calls) + 1
        self.calls.append(Call(kind, self.inodes[path.parent] if path != self.root else -1, path.name, self.inodes[path], content))

    def moved(self, old: Path, new: Path) -> None:
        self.add("rename", old)
        self.calls[-1].new_folder, self.calls[-1].new_name = self.inodes[new.parent], new.name
        self.inodes = {p: i for p, i in self.inodes.items() if not p.is_relative_to(new)}
        self.inodes = {new / p.relative_to(old) if p.is_relative_to(old) else p: i for p, i in self.inodes.items()}

    @contextmanager
    def recording(self, patch: pytest.MonkeyPatch) -> Iterator["Recorder"]:
        real = {name: getattr(os, name) for name in ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir")}

        def open_(path: object, flags: int, *rest: object, **more: object) -> int:
            descriptor = real["open"](path, flags, *rest, **more)
            if self.inside(path) and not more:
                self.open_files[descriptor] = Path(str(path))
                if flags & os.O_CREAT:
                    self.add("create", Path(str(path)))
            return descriptor

        def write(descriptor: int, content: bytes) -> int:
            done = real["write"](descriptor, content)
            if descriptor in self.open_files:
                self.add("write", self.open_files[descriptor], bytes(content[:done]))
            return done

        def fsync(descriptor: int) -> None:
            real["fsync"](descriptor)
            if descriptor in self.open_files:
                self.add("sync", self.open_files[descriptor])

        def close(descriptor: int) -> None:
            self.open_files.pop(descriptor, None)
            real["close"](descriptor)

        def rename(old: Path, new: Path) -> None:
            real["rename"](old, new)
            if self.inside(old):
                self.moved(Path(old), Path(new))

        def single(kind: str) -> object:
            def call(path: Path, *rest: object) -> None:
                real[kind](path, *rest)
                if self.inside(path):
                    self.add(kind, Path(path))

            return call

        with patch.context() as context:
            replaced = {"open": open_, "write": write, "fsync": fsync, "close": close, "rename": rename}
            for name, function in (replaced | {kind: single(kind) for kind in ("mkdir", "unlink", "rmdir")}).items():
                context.setattr(os, name, function)
            yield self


def crash_state(calls: list[Call], rng: random.Random) -> tuple[dict[int, dict[str, int]], dict[int, bytes]]:
    """One state the disk may be in after a crash that follows `calls`: names of each folder, bytes of each file."""
    synced_at: dict[int, int] = {}
    for index, call in enumerate(calls):
        if call.kind == "sync":
            synced_at[call.inode] = index
    folders: dict[int, dict[str, int]] = {0: {}}
    files: dict[int, bytes] = {}
    certain_bytes: dict[int, int] = {}
    for index, call in enumerate(calls):
        if call.kind == "write":
            files[call.inode] = files.get(call.inode, b"") + call.content
            if index < synced_at.get(call.inode, -1):
                certain_bytes[call.inode] = len(files[call.inode])
        if call.kind in ("write", "sync"):
            continue
        if index >= synced_at.get(call.folder, -1) and rng.random() < 0.5:
            continue
        names = folders.setdefault(call.folder, {})
        if call.kind in ("create", "mkdir"):
            names[call.name] = call.inode
        elif call.kind in ("unlink", "rmdir"):
            names.pop(call.name, None)
        else:
            names.pop(call.name, None)
            folders.setdefault(call.new_folder, {})[call.new_name] = call.inode
    for inode, content in files.items():
        low = certain_bytes.get(inode, 0)
        files[inode] = content[: rng.choice([low, rng.randint(low, len(content)), len(content)])]
    return folders, files


def build(target: Path, folders: dict[int, dict[str, int]], files: dict[int, bytes], kinds: dict[int, str], inode: int = 0) -> None:
    """Lay a crash state out as real files below `target`, which must not exist."""
    target.mkdir()
    for name, child in folders.get(inode, {}).items():
        if kinds[child] == "mkdir":
            build(target / name, folders, files, kinds, child)
        else:
            (target / name).write_bytes(files.get(child, b""))
