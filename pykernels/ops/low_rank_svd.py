"""The nearest matrix of a given rank, as factors of equal weight: from factors, or from a dense matrix."""

from __future__ import annotations

import torch

EXACT = 512
"""Dense matrices with a side of at most this many elements go to LAPACK whole."""
_EXTRA, _ROUNDS, _GAIN = 16, 30, 1e-3


def truncate_product(B: torch.Tensor, A: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B [out, R] @ A [R, in] -> factors (A' [rank, in], B' [out, rank]) of the nearest matrix of that rank.

    Through QR of the factors and an SVD of R x R (Halko et al., 2011, section 5.2), never the dense product.
    The orthogonal factors stay reflections, applied to ``rank`` columns: half the work of forming them.
    """
    left, right = Reflections(B), Reflections(A.t())
    u, s, v = torch.linalg.svd(left.r @ right.r.t(), full_matrices=False)
    root = s[:rank].sqrt()
    return _padded(right.times(v[:rank].t() * root).t(), left.times(u[:, :rank] * root), rank)


class Reflections:
    """QR of a matrix [m, n]: r [min(m, n), n], and q as LAPACK leaves it."""

    def __init__(self, matrix: torch.Tensor) -> None:
        factored, self._tau = torch.geqrf(matrix)
        self._q = factored[:, : len(self._tau)]
        self.r = factored[: len(self._tau)].triu()

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        """q @ columns [min(m, n), k]."""
        below = len(self._q) - len(columns)
        return torch.ormqr(self._q, self._tau, torch.nn.functional.pad(columns, (0, 0, 0, below)))


def truncate(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """delta [out, in] -> factors of the nearest matrix of this rank, for large ones nearly so.

    Large ones by subspace iteration from a fixed start (Halko et al., 2011, algorithm 4.4), until a round
    lessens the square of the error by less than a thousandth.
    """
    if min(delta.shape) <= max(EXACT, 2 * (rank + _EXTRA)):
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        root = s[:rank].sqrt()
        return _padded(root[:, None] * v[:rank], u[:, :rank] * root, rank)
    random = torch.Generator().manual_seed(0)
    width = rank + max(_EXTRA, rank // 4)
    start = torch.randn(delta.shape[1], width, generator=random, dtype=torch.float32)
    basis = torch.linalg.qr(delta @ start.to(delta)).Q
    whole = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
    missed = whole
    for _ in range(_ROUNDS):
        across = torch.linalg.qr(delta.t() @ basis).Q
        basis, inner = torch.linalg.qr(delta @ across)
        kept = torch.linalg.svdvals(inner)[:rank].double().square().sum()
        left = whole - float(kept)
        if left <= 1e-6 * whole or missed - left < _GAIN * left:
            break
        missed = left
    return truncate_product(basis, basis.t() @ delta, rank)


def _padded(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of exactly this rank, zeros where the matrix has less."""
    short = rank - len(A)
    if short <= 0:
        return A, B
    pad = torch.nn.functional.pad
    return pad(A, (0, 0, 0, short)), pad(B, (0, short))
