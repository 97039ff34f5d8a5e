"""The norms of mergekit's DARE rescale: sums of |delta| before and after the drop, over one fixed tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.ref.delta import delta, in_order
from pykernels.ref.drop_rescale import dropped

BLOCK, LANES = 4096, 16


def l1_norms(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    threshold: Sequence[int],
    model: Sequence[int],
    key: int,
    offset: int = 0,
) -> torch.Tensor:
    """base [*S] or None, tuned n x [*S] -> sums [blocks, n, 2] of |delta| and of the kept |delta|, float64.

    In a block of 4096 elements, lane l of 16 adds elements l, l + 16, ... in order; then neighbouring lanes
    are added until one is left. A NaN counts as kept.
    """
    sums = []
    for t, limit, m in zip(tuned, threshold, model, strict=True):
        d = delta(base, t)
        sums.append(torch.stack([block_sums(d), block_sums(dropped(d, limit, m, key, offset))], dim=1))
    return torch.stack(sums, dim=1)


def block_sums(delta: torch.Tensor) -> torch.Tensor:
    """Sum of |delta| [*S] per block of 4096 flat elements -> [blocks], float64."""
    flat = delta.reshape(-1).abs().double()
    blocks = -(-flat.numel() // BLOCK)
    padded = torch.nn.functional.pad(flat, (0, blocks * BLOCK - flat.numel()))
    lanes = in_order(padded.reshape(blocks, BLOCK // LANES, LANES).unbind(1))
    while lanes.shape[1] > 1:
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    return lanes[:, 0]
