"""An adapter that begins on the error of quantization, measured where the layer's inputs are.

    E = W - Wq (O, I)         M = sum of x x^T, mean of its diagonal 1, + RIDGE on the diagonal        M = C C^T  (Cholesky)
    U S V^T = svd_R(E C)      scaling * B A = U S V^T C^-1      the best rank R for  tr((E - D) M (E - D)^T)

so that Wq + scaling * B A answers the calibration inputs as W does, as near as rank R allows; with R = I it is W.  Any square root of M
gives the same product.  Column b_k and row a_k of the factors are made equally long, which leaves their product as it is.
Large products are factored by a randomised SVD: QR, two power iterations, a few directions to spare.

Differs from LoftQ, which takes E alone as if all inputs were equally strong and unrelated.
Sources: EoRA https://arxiv.org/abs/2410.21271, LoftQ https://arxiv.org/abs/2310.08659, randomised SVD https://arxiv.org/abs/0909.4061
"""

import torch
from torch import Tensor

from halfbyte.calibrate.moments import Moments

RIDGE = 0.01
SPARE, POWER_ITERATIONS = 16, 2
EXACT_BELOW = 128  # the smaller side of a product that is factored exactly


@torch.no_grad()
def factors_on(gap_OI: Tensor, moments: Moments, rank: int, scaling: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(A (R, I), B (O, R)) float32 with scaling * B A nearest to `gap_OI`; of a rank above the layer's, the rest is zero in B.

    Those further rows of A are drawn as an ordinary start is, so that they can learn.
    """
    columns = gap_OI.shape[1]
    root = _root(moments)
    weighted = gap_OI.float() * root if root.dim() == 1 else gap_OI.float() @ root
    u, s, vh = leading(weighted, min(rank, *gap_OI.shape), generator)
    right = vh / root if root.dim() == 1 else torch.linalg.solve_triangular(root, vh, upper=False, left=False)
    left = u * s
    balance = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
    lora_a, lora_b = right / balance[:, None] / scaling**0.5, left * balance / scaling**0.5
    missing = rank - lora_a.shape[0]
    if missing:
        drawn = (torch.rand(missing, columns, generator=generator) * 2 - 1) / columns**0.5
        lora_a = torch.cat([lora_a, drawn])
        lora_b = torch.cat([lora_b, torch.zeros(gap_OI.shape[0], missing)], dim=1)
    return lora_a, lora_b


def _root(moments: Moments) -> Tensor:
    """C (I, I) lower, or its diagonal (I,) where only that is known."""
    mean = moments.diagonal.mean().clamp_min(1e-30)
    if moments.square is None:
        return (moments.diagonal / mean + RIDGE).sqrt()
    ridged = moments.square / mean
    ridged.diagonal().add_(RIDGE)
    return torch.linalg.cholesky(ridged)


def leading(matrix_OI: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(U (O, R), S (R,), V^T (R, I)) of the leading singular directions."""
    width = rank + SPARE
    if min(matrix_OI.shape) <= max(EXACT_BELOW, 2 * width):
        u, s, vh = torch.linalg.svd(matrix_OI, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    drawn = torch.randn(matrix_OI.shape[1], width, generator=generator)
    basis, _ = torch.linalg.qr(matrix_OI @ drawn)
    for _ in range(POWER_ITERATIONS):
        other, _ = torch.linalg.qr(matrix_OI.T @ basis)
        basis, _ = torch.linalg.qr(matrix_OI @ other)
    u, s, vh = torch.linalg.svd(basis.T @ matrix_OI, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], vh[:rank]
