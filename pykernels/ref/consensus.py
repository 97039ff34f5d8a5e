"""TIES-Merging (Yadav et al., 2023, section 3, steps 2 and 3): elect a sign, average those who agree.

Variants: the paper and PEFT vote with the delta itself and divide by the number of those who agree; mergekit
votes with weight * delta and divides by the sum of their weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.ref.delta import in_order, scalar
from pykernels.ref.elect_sign import elected


def consensus(
    deltas: Sequence[torch.Tensor],
    weight: Sequence[float],
    vote: Sequence[float] | None,
    share: Sequence[float] | None,
    elect: str | None,
) -> torch.Tensor:
    """deltas n x [*S] with 0 where dropped, weight [n], vote and share [n] or None -> mean [*S], float64.

    ``elect`` None adds up the weighted deltas. Else ``vote`` scales the ballots under "plain", and ``share``
    is what an agreeing model adds to the divisor (None: no division; a divisor of exactly 0 becomes 1).
    """
    values = scaled(deltas, weight)
    if elect is None:
        return in_order(v.double() for v in values)
    ballots = values if vote is None else scaled(deltas, vote)
    agree = agreeing(ballots)
    total = in_order(torch.where(a, v, 0.0).double() for v, a in zip(values, agree, strict=True))
    mean = total / divisor(agree, share, deltas[0]).double()
    poisoned = torch.stack([b.isnan() for b in ballots]).any(0)
    return mean.masked_fill(poisoned, torch.nan)


def scaled(deltas: Sequence[torch.Tensor], factor: Sequence[float]) -> list[torch.Tensor]:
    """factor * delta per model, rounded to the working dtype."""
    return [scalar(f, d) * d for d, f in zip(deltas, factor, strict=True)]


def agreeing(ballots: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Which entries [*S] of every model carry the elected sign; a zero agrees with neither side."""
    up = elected(ballots)
    return [(b != 0) & ((b > 0) == up) for b in ballots]


def divisor(agree: Sequence[torch.Tensor], share: Sequence[float] | None, like: torch.Tensor) -> torch.Tensor:
    """Sum of the agreeing shares [*S] in model order, in the working dtype; 1 where it is exactly 0."""
    if share is None:
        return torch.ones_like(like)
    total = in_order(torch.where(a, scalar(s, like), 0.0) for a, s in zip(agree, share, strict=True))
    return total.where(total != 0, 1.0)
