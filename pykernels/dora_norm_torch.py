"""The norms of the rows of an adapted weight by torch's own products, without making it.

Traffic: the weight once, by pieces of rows that stay in the cache.
"""

from __future__ import annotations

import torch

from pykernels.uncast import uncast

_PIECE = 1 << 22


@uncast
def dora_norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """[out], float32, or float64 for a weight of float64.

    From ``||W_i||^2 + 2 s <(W A^T)_i, B_i> + s^2 B_i (A A^T) B_i^T``.
    """
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a, b = A.to(kind), B.to(kind)
    square = torch.empty(weight.shape[0], dtype=kind, device=weight.device)
    gram, step = a @ a.t(), max(1, _PIECE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        part, high = weight[start : start + step].to(kind), b[start : start + step]
        cross = part @ a.t() * (2 * scaling) + high @ gram * (scaling * scaling)
        square[start : start + step] = part.square().sum(1) + (cross * high).sum(1)
    return square.clamp_(min=0).sqrt_()
