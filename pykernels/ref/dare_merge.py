"""DARE (Yu et al., 2023, section 3) and a merge after it: add up, or elect a sign as in TIES-Merging."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.ref.consensus import consensus
from pykernels.ref.delta import delta, scalar
from pykernels.ref.drop_rescale import dropped


def dare_merge(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    threshold: Sequence[int],
    model: Sequence[int],
    key: int,
    weight: Sequence[float],
    vote: Sequence[float] | None,
    share: Sequence[float] | None,
    lambda_: float,
    elect: str | None,
    offset: int = 0,
) -> torch.Tensor:
    """base [*S] or None, tuned n x [*S], threshold, model, weight [n] -> merged [*S], float64.

    An entry is kept iff the draw of its model and flat index under ``key`` is below the threshold (0..65536).
    The rescale is part of ``weight`` (and of ``vote``); ``vote``, ``share`` and ``elect`` as in
    :func:`consensus`.
    """
    deltas = [
        dropped(delta(base, t), limit, m, key, offset)
        for t, limit, m in zip(tuned, threshold, model, strict=True)
    ]
    merged = scalar(lambda_, tuned[0]).double() * consensus(deltas, weight, vote, share, elect)
    return merged if base is None else base.double() + merged
