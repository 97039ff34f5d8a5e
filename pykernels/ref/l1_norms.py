"""The norms of mergekit's DARE rescale: sums of |delta| before and after the drop, over one fixed tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.ref.block_sums import block_sums
from pykernels.ref.delta import delta
from pykernels.ref.drop_rescale import dropped


def l1_norms(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    threshold: Sequence[int],
    model: Sequence[int],
    key: int,
    offset: int = 0,
) -> torch.Tensor:
    """base [*S] or None, tuned n x [*S] -> sums [blocks, n, 2] of |delta| and of the kept |delta|, float64.

    Per block of 4096 flat elements, as :func:`block_sums` adds. A NaN counts as kept.
    """
    sums = []
    for t, limit, m in zip(tuned, threshold, model, strict=True):
        d = delta(base, t)
        survivors = dropped(d, limit, m, key, offset)
        sums.append(torch.stack([block_sums(x.abs().double()) for x in (d, survivors)], dim=1))
    return torch.stack(sums, dim=1)
