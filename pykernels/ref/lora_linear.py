"""Linear layers with low-rank adapters (Hu et al., 2021, section 4.1), one or one per row, in float64.

y = x W^T + s (m * x) A^T B^T + bias, with m the 0-or-1 mask of dropout and 1 / (1 - p) a factor of s: as in
PEFT, only the adapter's branch drops. The norm of DoRA's rows (Liu et al., 2024, section 4) stands here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Factors(NamedTuple):
    """One adapter: A [r, K], B [N, r] and the factor s of their product."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


class Gradients(NamedTuple):
    """Of x [M, K], the weight [N, K], and every adapter's A [r, K] and B [N, r]; float64."""

    x: torch.Tensor
    weight: torch.Tensor
    A: list[torch.Tensor]
    B: list[torch.Tensor]


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Factors],
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    """x [M, K], weight [N, K] -> [M, N], float64.

    Row i takes adapter ``index[i]``, none where that is -1; without ``index`` all take the first. ``kept``
    [M, K], bool: what dropout leaves of x on the adapter's branch; a dropped NaN counts as 0.
    """
    y = x.double() @ weight.double().T
    for i, adapter in enumerate(adapters):
        h = _dropped(x, kept) @ adapter.A.double().T
        y = y + _rows(index, i, x) * (adapter.scaling * (h @ adapter.B.double().T))
    return y if bias is None else y + bias.double()


def lora_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Factors],
    index: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> Gradients:
    """The gradients that autograd finds, grad [M, N] being the result's, written out."""
    g, dropped = grad.double(), _dropped(x, kept)
    by_x, by_a, by_b = g @ weight.double(), [], []
    for i, adapter in enumerate(adapters):
        a, b = adapter.A.double(), adapter.B.double()
        mine = _rows(index, i, x) * adapter.scaling * g
        by_h = mine @ b
        by_x = by_x + _dropped(by_h @ a, kept)
        by_a.append(by_h.T @ dropped)
        by_b.append(mine.T @ (dropped @ a.T))
    return Gradients(by_x, g.T @ x.double(), by_a, by_b)


def dora_norm(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """weight [N, K], lora_A [r, K], lora_B [N, r] -> the norms [N] of the rows of W + s B A, float64."""
    norm: torch.Tensor = torch.linalg.vector_norm(
        weight.double() + scaling * (lora_B.double() @ lora_A.double()), dim=1
    )
    return norm


def _dropped(x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    return x.double() if kept is None else torch.where(kept, x.double(), 0.0)


def _rows(index: torch.Tensor | None, adapter: int, like: torch.Tensor) -> torch.Tensor:
    """1 in the rows [M, 1] that take the adapter, 0 elsewhere."""
    if index is None:
        return torch.ones(1, 1, dtype=torch.float64, device=like.device)
    return (index == adapter).double().unsqueeze(1)
