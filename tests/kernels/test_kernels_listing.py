"""The listing of implementations, and that importing kernels compiles nothing."""

import subprocess
import sys

import pytest
import torch

from halfbyte.errors import UnsupportedError
from halfbyte.kernels import listing
from halfbyte.kernels.quantize_blockwise import cpu, quantize_blockwise
from halfbyte.quant.codebooks import CODEBOOKS


def test_every_op_has_one_implementation_per_device() -> None:
    rows = listing.table()
    for op in {row.op for row in rows}:
        for device in listing.DEVICES:
            assert [row.serves for row in rows if (row.op, row.device) == (op, device)].count(True) == 1
    assert all(row.reason for row in rows)


def test_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")
    monkeypatch.setattr(cpu, "quantize_blockwise", lambda *rest: pytest.fail("the CPU kernel was called"))
    quantize_blockwise(torch.randn(64), CODEBOOKS["nf4"], 64)
    assert {row.implementation for row in listing.table() if row.serves} == {"reference"}


@pytest.mark.parametrize("device", listing.DEVICES)
@pytest.mark.parametrize("forced", ("triton", "cpu", "reference"))
def test_a_forced_kind_serves_where_an_op_has_it(forced: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere what auto takes serves, so that a model runs whatever is forced; doctor's table says which."""
    monkeypatch.setattr(listing, "_triton_missing", lambda: "")
    listing._chosen.cache_clear()
    auto = {row.op: row.implementation for row in listing.table() if row.serves and row.device == device}
    monkeypatch.setenv("HALFBYTE_KERNELS", forced)
    rows = [row for row in listing.table() if row.serves and row.device == device]
    assert {row.op for row in rows} == set(auto)
    there = {"triton": "cuda", "cpu": "cpu", "reference": device}[forced] == device
    for row in rows:
        assert listing.chosen(row.op, device) == row.implementation
        forceable = there and forced in listing._IMPLEMENTATIONS[row.op]
        assert row.implementation == (forced if forceable else auto[row.op])
        reason = f", HALFBYTE_KERNELS={forced}" if forceable else f": there is no {forced} for this op on {device}"
        assert row.reason == f"serves{reason}"
    listing._chosen.cache_clear()


def test_a_forced_choice_that_cannot_serve_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of no kind, and a kind whose package is missing."""
    monkeypatch.setenv("HALFBYTE_KERNELS", "fastest")
    with pytest.raises(UnsupportedError, match="E-UNSUP-001"):
        quantize_blockwise(torch.randn(64), CODEBOOKS["nf4"], 64)
    assert not any(row.serves for row in listing.table())
    monkeypatch.setattr(listing, "_numba_missing", lambda: "the package numba is not installed")
    monkeypatch.setenv("HALFBYTE_KERNELS", "cpu")
    listing._chosen.cache_clear()
    with pytest.raises(UnsupportedError, match="E-UNSUP-002"):
        quantize_blockwise(torch.randn(64), CODEBOOKS["nf4"], 64)
    assert not any(row.serves for row in listing.table() if row.device == "cpu")
    listing._chosen.cache_clear()


def test_importing_kernels_imports_no_numba_and_starts_no_thread() -> None:
    code = (
        "import sys, threading, halfbyte.quant.linear, halfbyte.kernels.linear_cross_entropy as _;"
        "assert 'numba' not in sys.modules; assert 'transformers' not in sys.modules; assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
