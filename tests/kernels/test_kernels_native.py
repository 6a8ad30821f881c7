"""kernels/native.py and object_code.py: what kernels are given, where code is kept, which threads run it; the numbers of scalars.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte.kernels import native as machinery
from halfbyte.kernels import object_code
from halfbyte.kernels.native import load, native, store
from halfbyte.kernels.scalars import exp


@native("x: T*, y: T*, columns: i64, factor: f32", T=("bf16", "f32"))
def scaled(x, y, columns, factor, first, last):  # type: ignore[no-untyped-def]
    """Rows first..last of y = x * factor."""
    for i in range(first * columns, last * columns):
        store(y, i, load(x, i) * factor)


@native("x: f32*, y: f32*")
def exponential(x, y, first, last):  # type: ignore[no-untyped-def]
    """y = e^x."""
    for i in range(first, last):
        y[i] = exp(x[i])


@native("x: f32*, y: f32*", fast=True)
def exponential_fast(x, y, first, last):  # type: ignore[no-untyped-def]
    """The same where sums may be reordered."""
    for i in range(first, last):
        y[i] = exp(x[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 700])
def test_every_item_is_done_once_on_any_number_of_threads(dtype: torch.dtype, rows: int) -> None:
    """Shares of the items cover them; bf16 is rounded to nearest even, as torch does."""
    x = torch.randn(rows, 33).to(dtype)
    wanted = (x.float() * 1.7).to(dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = torch.zeros_like(x)
            scaled(rows, x, y, 33, 1.7, work=1 << 20)
            assert torch.equal(y, wanted)
    finally:
        torch.set_num_threads(before)


def test_without_an_openmp_library_plain_threads_share_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result on systems where torch brings no libgomp."""
    monkeypatch.setattr(machinery, "_team", lambda: (None, 0, 0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = torch.randn(10, 33)
    y = torch.zeros_like(x)
    scaled(10, x, y, 33, 2.0, work=1 << 20)
    assert torch.equal(y, x * 2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: (x.double(), x.double()), lambda x: (x, x.bfloat16()), lambda x: (x.t(), x), lambda x: (x[:, ::2], x),
        lambda x: (x.to("meta"), x),
    ],
)  # fmt: skip
def test_what_a_kernel_cannot_read_is_refused(wrong) -> None:  # type: ignore[no-untyped-def]
    """A pointer has no dtype, no strides and no device, so these are looked at before."""
    with pytest.raises(TypeError):
        scaled(4, *wrong(torch.randn(4, 4)), 4, 1.0)


def test_the_number_of_arguments_is_checked() -> None:
    """A missing one would shift all that follow."""
    with pytest.raises((TypeError, ValueError)):
        scaled(4, torch.randn(4, 4), torch.randn(4, 4), 4)


def test_a_kernel_that_allocates_is_refused() -> None:
    """Nothing frees what it would take."""
    import numpy

    @native("x: f32*")
    def greedy(x, first, last):  # type: ignore[no-untyped-def]
        held = numpy.zeros(last)
        for i in range(first, last):
            held[i] = x[i]
        x[0] = held.sum()

    with pytest.raises(TypeError, match="allocates nothing"):
        greedy(2, torch.ones(2))


@pytest.mark.parametrize("kernel", [exponential, exponential_fast])
def test_exp_is_right_to_the_last_places(kernel) -> None:  # type: ignore[no-untyped-def]
    """Within 2 units in the last place over the range of float32; also where sums may be reordered."""
    x = torch.linspace(-87.3, 88.7, 1 << 16)
    y = torch.empty_like(x)
    kernel(len(x), x, y)
    assert float((y.double() / x.double().exp() - 1).abs().max()) < 2 * 2**-23
    edges, found = torch.tensor([float("nan"), float("inf"), -float("inf"), 88.8, -88.0, 0.0]), torch.empty(6)
    kernel(6, edges, found)
    assert found[0].isnan() and found[1:].tolist() == [float("inf"), 0.0, float("inf"), 0.0, 1.0]


def test_narrowing_is_torchs() -> None:
    """Ties to even, both zeros, infinities, NaN; every bf16 and the floats half way between two."""
    bits = torch.arange(1 << 16, dtype=torch.int32) << 16
    halves = torch.cat([bits, bits + 0x8000, bits + 0x7FFF, bits + 0x8001]).view(torch.float32)
    halves = halves[~halves.isnan()]
    y = torch.empty_like(halves, dtype=torch.bfloat16)

    @native("x: f32*, y: bf16*")
    def narrowed(x, y, first, last):  # type: ignore[no-untyped-def]
        for i in range(first, last):
            store(y, i, load(x, i))

    narrowed(len(halves), halves, y)
    assert torch.equal(y.view(torch.int16), halves.bfloat16().view(torch.int16))
    nan = torch.full((4,), float("nan"))
    narrowed(4, nan, y[:4])
    assert y[:4].isnan().all()


PROGRAM = (
    "import sys, torch; from halfbyte.kernels.rms_norm import rms_norm\n"
    "y = rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6, 0)[0]; print('numba' in sys.modules, round(float(y.sum())))"
)


def in_a_process(cache: Path, **variables: str) -> str:
    """What PROGRAM prints with its kernels kept under `cache`."""
    env = {**os.environ, "HALFBYTE_CACHE": str(cache), **variables}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True).stdout.strip()


def objects(cache: Path) -> list[Path]:
    """The files of object code."""
    return sorted((cache / "kernels").rglob("*.o"))


def test_a_second_process_compiles_nothing_and_a_changed_file_is_made_again(tmp_path: Path) -> None:
    """A warm start does not import numba; object code is used only with its checksum."""
    assert in_a_process(tmp_path) == "True 16"
    (made,) = objects(tmp_path)
    assert in_a_process(tmp_path) == "False 16"
    content = bytearray(made.read_bytes())
    content[len(content) // 2] ^= 1
    made.write_bytes(content)
    assert in_a_process(tmp_path) == "True 16"
    assert made.read_bytes() != bytes(content)
    assert in_a_process(tmp_path, NUMBA_CPU_NAME="x86-64" if "x86" in os.uname().machine else "generic") == "True 16"
    assert len(objects(tmp_path)) == 2  # another processor has another folder


def test_a_folder_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    """Object code is code."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    assert in_a_process(tmp_path) == "True 16"
    assert not objects(tmp_path)


def test_only_the_newest_versions_are_kept(tmp_path: Path) -> None:
    """Each change of a source makes another folder; they do not pile up."""
    (tmp_path / "kernels").mkdir(mode=0o700)
    for number in range(20):
        (tmp_path / "kernels" / f"old{number:02}").mkdir()
        os.utime(tmp_path / "kernels" / f"old{number:02}", (1000 + number, 1000 + number))
    in_a_process(tmp_path)
    left = sorted(path.name for path in (tmp_path / "kernels").iterdir())
    assert len(left) == object_code.KEPT_VERSIONS and "old19" in left and "old00" not in left


def test_a_folder_that_goes_away_costs_a_compilation_only(tmp_path: Path) -> None:
    """Another process may be the ninth version; what was not written is made again next time."""
    object_code._write(tmp_path / "gone" / "kernel.o", b"code")
    assert object_code._read(tmp_path / "gone" / "kernel.o") is None
    object_code._write(tmp_path / "kernel.o", b"code")
    assert object_code._read(tmp_path / "kernel.o") == b"code" and len(list(tmp_path.iterdir())) == 1


def test_torchs_threads_are_found_below_a_folder_with_blanks() -> None:
    """A virtual environment may lie anywhere, and another package may bring a library of its own."""
    line = "7f00-7f01 r-xp 00000000 08:01 42                         {}\n"
    other, own = "/opt/my stuff/scikit_learn.libs/libgomp-a3.so.1.0.0", "/opt/my stuff/torch/lib/libgomp.so.1"
    assert machinery._openmp_in(line.format(other)) == other
    assert machinery._openmp_in(line.format(other) + "7f02-7f03 rw-p 00000000 00:00 0\n" + line.format(own)) == own
    assert machinery._openmp_in(line.format("/usr/lib/libc.so.6")) == ""
