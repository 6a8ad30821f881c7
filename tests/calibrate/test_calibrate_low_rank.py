"""The low-rank start is the best of its rank for the outputs: against float64, at full rank exact, balanced, and the same for a seed."""

import pytest
import torch
from torch import Tensor

from halfbyte.calibrate.low_rank import RIDGE, factors_on, leading
from halfbyte.calibrate.moments import Moments


def draw(rows: int, columns: int, tokens: int = 500) -> tuple[Tensor, Moments]:
    """An error (O, I), and moments of inputs that are related and unequal."""
    torch.manual_seed(rows * columns)
    x_TI = torch.randn(tokens, columns) @ (torch.randn(columns, columns) * torch.logspace(-1, 1, columns))
    return torch.randn(rows, columns) * 0.1, Moments(x_TI.square().sum(0), x_TI.T @ x_TI, tokens)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weighted(moments: Moments) -> Tensor:
    """The matrix of the objective, float64."""
    assert moments.square is not None
    wide = moments.square.double()
    return wide / wide.diagonal().mean() + RIDGE * torch.eye(wide.shape[0], dtype=torch.float64)


def objective(gap: Tensor, moments: Moments) -> float:
    wide = gap.double()
    return float(((wide @ weighted(moments)) * wide).sum())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (48, 48)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_product_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    """# T28  By the symmetric square root in float64 (eigenvectors), another way to the same optimum; the scaling is divided out."""
    gap, moments = draw(*shape)
    values, vectors = torch.linalg.eigh(weighted(moments))
    root = vectors * values.sqrt() @ vectors.T
    u, s, vh = torch.linalg.svd(gap.double() @ root)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)
    lora_a, lora_b = factors_on(gap, moments, rank, 2.0, seeded())
    assert lora_a.shape == (rank, shape[1]) and lora_b.shape == (shape[0], rank)
    found = 2.0 * lora_b @ lora_a
    assert torch.allclose(found.double(), best, rtol=1e-3, atol=1e-4)
    assert objective(gap - found, moments) <= objective(gap, moments)
    assert torch.allclose(lora_a.norm(dim=1), lora_b.norm(dim=0), rtol=1e-4)


def test_it_beats_the_factors_of_the_error_alone_where_the_inputs_are() -> None:
    gap, moments = draw(48, 48)
    u, s, vh = torch.linalg.svd(gap)
    lora_a, lora_b = factors_on(gap, moments, 8, 1.0, seeded())
    assert objective(gap - lora_b @ lora_a, moments) < 0.7 * objective(gap - (u[:, :8] * s[:8]) @ vh[:8], moments)


@pytest.mark.parametrize(("shape", "rank"), [((24, 40), 24), ((40, 24), 24), ((24, 40), 30)])
def test_full_rank_gives_the_weight_back(shape: tuple[int, int], rank: int) -> None:
    """Rows of A beyond the layer's rank can learn: drawn as usual, with zeros in B."""
    gap, moments = draw(*shape)
    lora_a, lora_b = factors_on(gap, moments, rank, 2.0, seeded())
    assert torch.allclose(2.0 * lora_b @ lora_a, gap, atol=2e-4)
    assert bool(lora_a.any(dim=1).all()) and lora_a.shape == (rank, shape[1])
    assert not lora_b[:, min(shape) :].any()


def test_the_diagonal_alone_serves_where_there_is_no_square() -> None:
    gap, moments = draw(24, 40)
    alone = Moments(moments.diagonal, None, moments.tokens)
    lora_a, lora_b = factors_on(gap, alone, 8, 1.0, seeded())
    assert alone.error(gap - lora_b @ lora_a) < alone.error(gap)
    full_a, full_b = factors_on(gap, alone, 24, 1.0, seeded())
    assert torch.allclose(full_b @ full_a, gap, atol=2e-4)


def test_the_randomised_factors_are_nearly_the_exact_ones_and_the_same_for_a_seed() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(300, 260) @ torch.diag(torch.logspace(0, -2, 260)) @ torch.randn(260, 260)
    u, s, vh = leading(matrix, 16, seeded())
    exact = torch.linalg.svdvals(matrix)
    assert torch.allclose(s, exact[:16], rtol=2e-2)
    left = (matrix - (u * s) @ vh).square().sum()
    assert left <= 1.02 * exact[16:].square().sum()
    assert all(torch.equal(one, two) for one, two in zip((u, s, vh), leading(matrix, 16, seeded()), strict=True))
    assert not torch.equal(u, leading(matrix, 16, seeded(1))[0])
