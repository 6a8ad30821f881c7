"""search_scales: the kernel against the reference by what matters, the error in float64; the reference is judged by brute force in
tests/calibrate/test_calibrate_scales.py."""

import pytest
import torch
from torch import Tensor

from halfbyte.kernels.search_scales import cpu, reference, search_scales
from halfbyte.quant.codebooks import CODEBOOKS

MULTIPLES = torch.tensor([0.7, 0.8, 0.9, 1.0, 1.04])


def errors_of(weight: Tensor, importance: Tensor, codebook: Tensor, scales: Tensor, blocksize: int) -> list[float]:
    """The weighted error of each block with these scales, in float64."""
    flat, around = weight.double().reshape(-1), importance.double().repeat(weight.shape[0])
    found = []
    for scale, block, share in zip(scales.double(), flat.split(blocksize), around.split(blocksize), strict=True):
        gaps = (block[:, None] - scale * codebook.double()[None]).square().min(dim=1).values
        found.append(float((gaps * share).sum()))
    return found


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape,blocksize", [((6, 96), 32), ((37, 100), 64), ((5, 7), 64), ((3, 1000), 128), ((4, 30), 24), ((2, 64), 128)])
def test_the_kernel_is_as_good_as_the_reference(shape: tuple[int, int], blocksize: int, dtype: torch.dtype, format: str) -> None:
    """# T47 # T51  Blocks that begin inside a row, are wider than one, or are cut short; a block of zeros."""
    torch.manual_seed(shape[1])
    weight, importance, codebook = torch.randn(shape).to(dtype), torch.rand(shape[1]) ** 4 * 10 + 0.01, CODEBOOKS[format]
    weight.view(-1)[:blocksize] = 0
    wanted = reference.search_scales(weight, importance, codebook, MULTIPLES, blocksize)
    found = search_scales(weight, importance, codebook, MULTIPLES, blocksize)
    assert found.shape == wanted.shape == (-(-weight.numel() // blocksize),) and found.dtype == torch.float32 and found[0] == 0
    ours, theirs = (errors_of(weight, importance, codebook, scales, blocksize) for scales in (found, wanted))
    assert ours == pytest.approx(theirs, rel=1e-5)
    asked = (weight, importance, codebook, MULTIPLES, blocksize)
    torch.library.opcheck(torch.ops.halfbyte.search_scales, asked, test_utils=("test_schema", "test_faketensor"))


def test_every_scale_is_a_multiple_of_its_block() -> None:
    """# T53  Where no error can be made smaller, on weights that are levels themselves, the scale is the plain one."""
    codebook = CODEBOOKS["nf4"]
    weight = codebook.repeat(4, 4) * torch.tensor([[0.5], [2.0], [3.0], [0.01]])
    for form in (cpu, reference):
        found = form.search_scales(weight, torch.ones(64), codebook, torch.tensor([0.9, 1.0, 1.0]), 64)
        torch.testing.assert_close(found, weight.abs().amax(dim=1))
    torch.manual_seed(0)
    weight = torch.randn(40, 64)
    found = cpu.search_scales(weight, torch.rand(64), codebook, MULTIPLES, 64) / weight.abs().amax(dim=1)
    assert bool((found[:, None] - MULTIPLES[None]).abs().amin(dim=1).lt(1e-6).all()) and found.unique().numel() > 2


def test_where_no_error_is_a_number_the_plain_scale_stays() -> None:
    """# T50  Squares beyond float32 leave every error infinite."""
    weight = torch.full((1, 64), 3e30)
    for form in (cpu, reference):
        assert form.search_scales(weight * torch.linspace(0.1, 1, 64), torch.ones(64), CODEBOOKS["nf4"], MULTIPLES, 64) == 3e30


def test_wrong_arguments_are_refused() -> None:
    weight, importance, codebook = torch.randn(2, 64), torch.rand(64), CODEBOOKS["nf4"]
    for wrong in (
        (weight[0], importance, codebook, MULTIPLES, 64), (weight, importance[:5], codebook, MULTIPLES, 64),
        (weight, importance, codebook[:8], MULTIPLES, 64), (weight, importance, codebook, MULTIPLES[:0], 64),
        (weight, importance.double(), codebook, MULTIPLES, 64), (weight.int(), importance, codebook, MULTIPLES, 64),
        (weight, importance, codebook, MULTIPLES, 63),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            search_scales(*wrong)
