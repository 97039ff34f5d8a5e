"""The nearest matrix of a given rank, as factors of equal weight: from factors, or from a dense matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch

EXACT = 512
"""Dense matrices with a side of at most this many elements go to LAPACK whole."""
_EXTRA, _ROUNDS, _GAIN = 16, 30, 1e-3
_APART, _DECAY, _HUGE = 0.1, 0.1, 1e30
"""For Gram matrices of float32 products to serve: how far from the span of those before it a column of B of
length 1 stands at least, the least singular value that is kept as a part of the largest, and squares of norms
that are too large; smaller than one by it is too small."""


def truncate_product(
    B: torch.Tensor,
    A: torch.Tensor,
    scale: torch.Tensor | None,
    rank: int,
    before: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """B [out, R] @ diag(scale) @ A [R, in] -> factors (A' [rank, in], B' [out, rank]) of the nearest matrix.

    ``scale`` [R] is float64, None for ones. Never through the dense product: by the Gram matrices of the
    factors where these are well conditioned, else by QR of the factors and an SVD of R x R (Halko et al.,
    2011, section 5.2), before which ``before`` is called: Gram matrices serve finite factors alone.
    """
    found = _by_gram(B, A, scale, rank)
    if found is not None:
        return found
    before()
    if scale is not None:
        A = (A.double() * scale[:, None]).to(A.dtype)
    left, right = Reflections(B), Reflections(A.t())
    u, s, v = torch.linalg.svd(left.r @ right.r.t(), full_matrices=False)
    root = s[:rank].sqrt()
    return _padded(right.times(v[:rank].t() * root).t(), left.times(u[:, :rank] * root), rank)


def _by_gram(
    B: torch.Tensor, A: torch.Tensor, scale: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The same without QR: with B^T B = L L^T, B L^-T is orthogonal, and L^T A has the singular values of
    B A, whose squares are the eigenvalues of L^T A A^T L.

    B' A' is B P A with P a projection of rank ``rank`` made in float64, so rounded Gram matrices turn it a
    little but cost no digits of the product. How little is bounded by two conditions; None where they fail.
    """
    if B.dtype != torch.float32 or min(len(B), A.shape[1]) < B.shape[1]:
        return None
    gram_b, gram_a = _gram(B), _gram(A.t())
    if gram_b is None or gram_a is None:
        return None
    size = gram_b.diagonal().sqrt()
    lower, failed = torch.linalg.cholesky_ex(gram_b / (size[:, None] * size))
    if bool(failed) or not bool(lower.diagonal().min() > _APART):
        return None
    across = lower.t() * (size if scale is None else size * scale)
    inner = across @ gram_a @ across.t()
    largest = inner.diagonal().max()
    if not bool(largest > 0) or not bool(largest.isfinite()):
        return None
    squares, vectors = torch.linalg.eigh((inner / largest).to(B.dtype))
    squares, vectors = squares[-rank:].flip(0).double() * largest, vectors[:, -rank:].flip(1)
    if not bool(squares[-1] > _DECAY**2 * squares[0]):
        return None
    vectors = torch.linalg.qr(vectors.double()).Q
    root = squares.sqrt().sqrt()
    inverse = torch.linalg.solve_triangular(lower.t() * size, vectors * root, upper=True)
    projected = (vectors / root).t() @ across
    return _padded(projected.to(A.dtype) @ A, B @ inverse.to(B.dtype), rank)


def _gram(columns: torch.Tensor) -> torch.Tensor | None:
    """columns^T columns in float64, from float32 products; None where these may over- or underflow."""
    gram = columns.t() @ columns
    low, high = gram.diagonal().aminmax()
    return gram.double() if bool((low > 1 / _HUGE) & (high < _HUGE)) else None


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
    random = torch.Generator("cpu").manual_seed(0)
    width = rank + max(_EXTRA, rank // 4)
    start = torch.randn(delta.shape[1], width, generator=random, dtype=torch.float32, device="cpu")
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
    return truncate_product(basis, basis.t() @ delta, None, rank)


def _padded(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of exactly this rank, zeros where the matrix has less."""
    short = rank - len(A)
    if short <= 0:
        return A, B
    pad = torch.nn.functional.pad
    return pad(A, (0, 0, 0, short)), pad(B, (0, short))
