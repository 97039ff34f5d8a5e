"""Compositions of low-rank adapters as dense matrices (Eckart and Young, 1936, for the truncation)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Tensors = Sequence[torch.Tensor]


def summed(A: Tensors, B: Tensors, scaling: Sequence[float], weights: Sequence[float]) -> torch.Tensor:
    """A_i [r_i, in], B_i [out, r_i] -> sum of weight * scaling * B @ A, [out, in], float64."""
    terms = [w * s * (b.double() @ a.double()) for a, b, s, w in zip(A, B, scaling, weights, strict=True)]
    return torch.stack(terms).sum(0)


def summed_apart(A: Tensors, B: Tensors, scaling: Sequence[float], weights: Sequence[float]) -> torch.Tensor:
    """What PEFT's "linear" makes: the A's and the B's added up apart, so their product has cross terms."""
    share = [w * s for w, s in zip(weights, scaling, strict=True)]
    a = torch.stack([math.copysign(math.sqrt(abs(c)), c) * x.double() for c, x in zip(share, A, strict=True)])
    b = torch.stack([math.sqrt(abs(c)) * x.double() for c, x in zip(share, B, strict=True)])
    return b.sum(0) @ a.sum(0)


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The matrix of this rank nearest to delta [out, in], float64."""
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    nearest: torch.Tensor = (u[:, :rank] * s[:rank]) @ v[:rank]
    return nearest
