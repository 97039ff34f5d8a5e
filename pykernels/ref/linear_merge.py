"""Model soups (Wortsman et al., 2022, section 2): a weighted sum of models, or of task vectors on a base."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.ref.delta import delta, in_order, scalar


def linear_merge(
    base: torch.Tensor | None, tuned: Sequence[torch.Tensor], weight: Sequence[float]
) -> torch.Tensor:
    """base [*S] or None, tuned n x [*S] of one float dtype, weight [n] -> merged [*S], float64.

    base + sum(weight * (tuned - base)), or sum(weight * tuned) without a base. Deltas and weights are float32
    (float64 for float64 inputs); products and sums are float64.
    """
    total = in_order(
        scalar(w, t).double() * delta(base, t).double() for t, w in zip(tuned, weight, strict=True)
    )
    return total if base is None else base.double() + total
