"""Dot products of a gradient with task vectors: what AdaMerging (Yang et al., 2024) learns weights by."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.ref.block_sums import block_sums
from pykernels.ref.delta import delta


def dot_products(
    grad: torch.Tensor, base: torch.Tensor | None, tuned: Sequence[torch.Tensor]
) -> torch.Tensor:
    """grad [*S] of any float dtype, base [*S] or None, tuned n x [*S] -> sums [blocks, n], float64.

    Per block of 4096 flat elements the sum of grad * (tuned - base), or of grad * tuned without a base.
    Deltas are float32 (float64 for float64 inputs): their products with float32 gradients are exact.
    """
    wide = grad.double()
    return torch.stack([block_sums(wide * delta(base, t).double()) for t in tuned], dim=1)
