"""The ops of decoding, cached_attention and gemv, against float64 over types and awkward shapes; several weights behind one input."""

import pytest
import torch

from halfbyte.kernels.cached_attention import cached_attention
from halfbyte.kernels.cached_attention import reference as attention_reference
from halfbyte.kernels.gemv import gemv
from halfbyte.kernels.gemv import reference as gemv_reference
from halfbyte.kernels.matmul_4bit import matmul_4bit, matmuls_4bit
from halfbyte.quant.linear import QuantLinear

DTYPES = ((torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-13), (torch.float16, 2**-10))


@pytest.mark.parametrize("softcap", (0.0, 2.5))
@pytest.mark.parametrize("sequences,heads,groups,tokens,width", ((1, 4, 2, 1, 8), (2, 6, 3, 33, 20), (3, 5, 5, 7, 3), (1, 8, 1, 129, 64)))
@pytest.mark.parametrize("dtype,tolerance", DTYPES)
def test_cached_attention(
    sequences: int, heads: int, groups: int, tokens: int, width: int, softcap: float, dtype: torch.dtype, tolerance: float
) -> None:
    q = torch.randn(sequences, heads, width).to(dtype)
    k, v = (torch.randn(sequences, tokens, groups, width).to(dtype).transpose(1, 2) for _ in range(2))
    want = attention_reference.cached_attention(q.double(), k.double(), v.double(), 0.4, softcap)
    found = cached_attention(q, k, v, 0.4, softcap)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), want, rtol=2 * tolerance, atol=2 * tolerance)
    torch.library.opcheck(torch.ops.halfbyte.cached_attention, (q, k, v, 0.4, softcap), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("place", ("q", "k", "v"))
def test_nan_reaches_the_result(place: str) -> None:
    parts = {"q": torch.randn(1, 2, 8), "k": torch.randn(1, 1, 5, 8), "v": torch.randn(1, 1, 5, 8)}
    parts[place][..., -1, 3] = float("nan")
    found = cached_attention(parts["q"], parts["k"], parts["v"], 1.0)
    seen = {"q": found[0, 1], "k": found[0], "v": found[0, :, 3]}[place]
    assert seen.isnan().all()


def test_cached_attention_refuses() -> None:
    q, k = torch.randn(1, 4, 8), torch.randn(1, 2, 5, 8)
    for wrong in ((q, k, k[..., :4]), (q, k[:, :, :0], k[:, :, :0]), (q[:, :3], k, k), (q.bfloat16(), k, k), (q[0], k, k)):
        with pytest.raises(ValueError):
            cached_attention(*wrong, 1.0)


@pytest.mark.parametrize("outputs,columns", ((1, 32), (5, 96), (130, 160), (7, 33), (256, 128), (0, 64)))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("dtype,tolerance", DTYPES)
def test_gemv(outputs: int, columns: int, bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    x, weight = torch.randn(1, columns).to(dtype), torch.randn(outputs, columns).to(dtype)
    add = torch.randn(outputs).to(dtype) if bias else None
    want = gemv_reference.gemv(x.double(), weight.double(), None if add is None else add.double())
    for row in (x, x[0], x[None]):
        found = gemv(row, weight, add)
        assert found.dtype == dtype and found.shape == (*row.shape[:-1], outputs)
        torch.testing.assert_close(found.double().view_as(want), want, rtol=3 * tolerance, atol=3 * tolerance * columns**0.5)
    torch.library.opcheck(torch.ops.halfbyte.gemv, (x, weight, add), test_utils=("test_schema", "test_faketensor"))


def test_gemv_keeps_nan_and_refuses() -> None:
    x, weight = torch.randn(1, 64).bfloat16(), torch.randn(9, 64).bfloat16()
    weight[4, 17] = float("nan")
    found = gemv(x, weight)
    assert found[0].isnan().tolist() == [row == 4 for row in range(9)]
    for wrong in ((torch.randn(2, 64).bfloat16(), weight, None), (x.float(), weight, None), (x, weight, torch.zeros(8))):
        with pytest.raises(ValueError):
            gemv(*wrong)


@pytest.mark.parametrize("rows", (1, 2, 4, 5))
@pytest.mark.parametrize("columns,blocksize", ((64, 64), (96, 32), (33, 64), (128, 64)))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
def test_several_weights_are_the_products_one_by_one(rows: int, columns: int, blocksize: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, columns).to(dtype)
    sizes = ((3, blocksize), (64, 32), (10, blocksize))  # blocks of 32 want x in another order
    layers = [QuantLinear.from_linear(torch.nn.Linear(columns, width, dtype=torch.bfloat16), blocksize=size) for width, size in sizes]
    together = matmuls_4bit(x, [layer.product_arguments() for layer in layers])
    for found, layer in zip(together, layers, strict=True):
        assert torch.equal(found, matmul_4bit(x, *layer.product_arguments()))
