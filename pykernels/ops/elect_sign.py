"""The elected sign of every element over several task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels import backends, check, library
from pykernels.check import is_tensor
from pykernels.ops.coefficients import Given, examine, joined, narrow, pick, split, taking, weights
from pykernels.ops.ties_merge import ELECTIONS

OP = "elect_sign"


def elect_sign(
    deltas: Sequence[torch.Tensor], weight: Given = 1.0, *, elect: str = "weighted"
) -> torch.Tensor:
    """+1 where the positive mass is at least the negative one, -1 elsewhere.

    TIES-Merging (Yadav et al., 2023), section 3, step 2. Masses are float32 sums in the order given.

    Args:
        deltas: 1 to 64 contiguous tensors [*S] of one dtype: float32, bfloat16, float16 or float64.
        weight: a number or one per model, or a floating-point tensor [] or [n] on the same device, whose
            values a CUDA kernel reads without the host waiting; a model of weight 0 takes no part.
        elect: "weighted" votes with weight * delta (mergekit), "plain" with the delta itself (paper, PEFT).

    Returns:
        int8 tensor [*S] of +1 and -1; a draw elects +1, a NaN casts no vote.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    if library.needed(weight):
        check.no_gradient(OP, "weight", weight)
        _, inputs = library.inputs(OP, None, deltas, "deltas")
        return library.call(OP, None, inputs, *split(OP, weight, len(deltas)), elect=elect)
    return _elect(deltas, weight, elect)


def _elect(deltas: Sequence[torch.Tensor], weight: Given, elect: str) -> torch.Tensor:
    like = check.tensors(OP, None, deltas, "deltas")
    given = weights(OP, weight, like, len(deltas))
    check.choice(OP, "elect", elect, ELECTIONS)
    out = torch.empty(like.shape, dtype=torch.int8, device=like.device)
    if elect == "plain" and is_tensor(given):  # a vote with weight 1 is the delta itself, with 0 it is none
        given, elect = given != 0, "weighted"
    part = taking(given)
    if not part:
        return out.fill_(1)
    backends.call(OP, like)(out, [deltas[i] for i in part], narrow(pick(given, part)), elect)
    return out


def _run(
    deltas: list[torch.Tensor],
    weight: list[float] | None,
    weight_tensor: torch.Tensor | None,
    *,
    elect: str,
) -> torch.Tensor:
    return _elect(deltas, joined(weight, weight_tensor), elect)


def _fake(
    deltas: list[torch.Tensor],
    weight: list[float] | None,
    weight_tensor: torch.Tensor | None,
    *,
    elect: str,
) -> torch.Tensor:
    like = check.tensors(OP, None, deltas, "deltas")
    examine(OP, like, len(deltas), joined(weight, weight_tensor))
    check.choice(OP, "elect", elect, ELECTIONS)
    return torch.empty_like(like, dtype=torch.int8)


library.define(
    OP, "Tensor[] deltas, float[]? weight, Tensor? weight_tensor, *, str elect", _run, _fake, out=False
)
