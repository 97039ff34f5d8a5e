"""TIES-Merging (Yadav et al., 2023, section 3): trim, elect the sign, average those who agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.cut import Cut
from pykernels.ref.consensus import consensus
from pykernels.ref.delta import delta, scalar
from pykernels.ref.trim import keep, kept


def ties_merge(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    cut: Cut,
    weight: Sequence[float],
    vote: Sequence[float] | None,
    share: Sequence[float] | None,
    lambda_: float,
    elect: str | None,
    offset: int = 0,
) -> torch.Tensor:
    """base [*S] or None, tuned n x [*S], cut, weight [n] -> base + lambda_ * mean of the kept [*S], float64.

    ``vote``, ``share`` and ``elect`` as in :func:`consensus`; ``offset`` is the flat index of the first
    element in the tensor that ``cut`` speaks of. A NaN delta of any model, kept or not, makes it NaN.
    """
    deltas = [delta(base, t) for t in tuned]
    deltas = [keep(d, kept(d, k, last, offset)) for d, k, last in zip(deltas, *cut, strict=True)]
    merged = scalar(lambda_, tuned[0]).double() * consensus(deltas, weight, vote, share, elect)
    return merged if base is None else base.double() + merged
