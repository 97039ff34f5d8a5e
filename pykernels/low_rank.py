"""Adapters whose magnitudes are folded in: what the compiled merge takes.

A magnitude scales what stands before it, so rows of B are scaled too: each element is rounded once, from the
exact product of B, scaling and the float64 factors of the rows. Other adapters stay as they are: the kernel
scales them as it packs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Tensors = Sequence[torch.Tensor]


class LowRank(NamedTuple):
    """scaling * B [out, r] @ A [r, in], each element of scaling * B rounded to float32 once."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


Norms = Callable[[LowRank], torch.Tensor]
"""The norms [out] of weight + an adapter's delta, float64."""


def folded(
    A: Tensors,
    B: Tensors,
    scaling: Sequence[float],
    magnitude: Sequence[torch.Tensor | None],
    norms: Norms,
) -> tuple[list[LowRank], torch.Tensor | None]:
    """The adapters, and what the weight's rows [out] are scaled by, float32, or None."""
    behind: torch.Tensor | None = None
    adapters: list[LowRank] = []
    for a, b, s, m in zip(reversed(A), reversed(B), reversed(scaling), reversed(magnitude), strict=True):
        adapter = LowRank(a, b, s)
        if m is not None:
            factor = m.double() / norms(adapter)
            behind = factor if behind is None else factor * behind
        if behind is not None:
            adapter = LowRank(a, (b.double() * (behind * s)[:, None]).float(), 1.0)
        adapters.insert(0, adapter)
    return adapters, None if behind is None else behind.float()
