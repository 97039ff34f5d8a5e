"""The elected sign of every element over several task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels import backends, check
from pykernels.ops.ties_merge import ELECTIONS


def elect_sign(
    deltas: Sequence[torch.Tensor], weight: float | Sequence[float] = 1.0, *, elect: str = "weighted"
) -> torch.Tensor:
    """+1 where the positive mass is at least the negative one, -1 elsewhere.

    TIES-Merging (Yadav et al., 2023), section 3, step 2. Masses are float32 sums in the order given.

    Args:
        deltas: 1 to 64 contiguous tensors [*S] of one dtype: float32, bfloat16, float16 or float64.
        weight: a number or one per model; a model of weight 0 takes no part.
        elect: "weighted" votes with weight * delta (mergekit), "plain" with the delta itself (paper, PEFT).

    Returns:
        int8 tensor [*S] of +1 and -1; a draw elects +1, a NaN casts no vote.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    op = "elect_sign"
    like = check.tensors(op, None, deltas, "deltas")
    weights = check.per_model(op, "weight", weight, len(deltas))
    check.choice(op, "elect", elect, ELECTIONS)
    out = torch.empty(like.shape, dtype=torch.int8, device=like.device)
    taking = [(d, w) for d, w in zip(deltas, weights, strict=True) if w != 0]
    if not taking:
        return out.fill_(1)
    backends.call(op, like)(out, [d for d, _ in taking], [w for _, w in taking], elect)
    return out
