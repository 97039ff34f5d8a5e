"""TIES-Merging (Yadav et al., 2023, section 3, step 2): the sign of the larger total magnitude."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.ref.delta import delta as widen
from pykernels.ref.delta import in_order, scalar


def elect_sign(deltas: Sequence[torch.Tensor], weight: Sequence[float], elect: str) -> torch.Tensor:
    """deltas n x [*S], weight [n] -> +1 or -1 [*S], float64. A draw elects +1, a NaN casts no vote.

    "weighted" votes with weight * delta (mergekit), "plain" with the delta itself (paper, PEFT).
    """
    votes = [widen(None, d) for d in deltas]
    if elect == "weighted":
        votes = [scalar(w, d) * v for v, w, d in zip(votes, weight, deltas, strict=True)]
    up = elected([v.nan_to_num(0.0, torch.inf, -torch.inf) for v in votes])
    return up.double() * 2 - 1


def elected(votes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where the positive votes weigh at least as much as the negative ones; sums in order, in their dtype."""
    return in_order(v.clamp(min=0) for v in votes) >= -in_order(v.clamp(max=0) for v in votes)
