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


@pytest.mark.parametrize("forced", ("triton", "fastest"))
def test_a_forced_choice_that_cannot_serve_raises(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_KERNELS", forced)
    with pytest.raises(UnsupportedError):
        quantize_blockwise(torch.randn(64), CODEBOOKS["nf4"], 64)
    assert not any(row.serves for row in listing.table() if row.device == "cpu")


def test_importing_kernels_imports_no_numba_and_starts_no_thread() -> None:
    code = (
        "import sys, threading, halfbyte.quant.linear, halfbyte.kernels.linear_cross_entropy as _;"
        "assert 'numba' not in sys.modules; assert 'transformers' not in sys.modules; assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
