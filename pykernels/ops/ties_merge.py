"""TIES-Merging of tensors: trim by magnitude, elect the sign, average those who agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pykernels import backends, check
from pykernels.cut import KEEP_ALL_EQUALS, Cut
from pykernels.ops.kth_magnitude import counts
from pykernels.ops.task_arithmetic import nothing

TIES = ("index", "keep")
ELECTIONS = ("weighted", "plain")
NORMALIZE = (True, False, "count")


def ties_merge(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    *,
    density: float | Sequence[float],
    weight: float | Sequence[float] = 1.0,
    lambda_: float = 1.0,
    normalize: bool | str = True,
    elect: str = "weighted",
    tie: str = "index",
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """base + lambda * (mean of the trimmed deltas that agree with the elected sign).

    TIES-Merging (Yadav et al., 2023), section 3. The selection is exact, whatever the number of ties.

    Args:
        base: contiguous tensor [*S], or None when ``tuned`` holds task vectors already.
        tuned: 1 to 64 contiguous tensors [*S] of base's dtype: float32, bfloat16, float16 or float64.
        density: fraction of every delta to keep, by magnitude; a number in [0, 1] or one per model.
        weight: a number or one per model; a model of weight 0 takes no part.
        lambda_: scale of the merged task vector.
        normalize: True divides by the agreeing weights (mergekit), "count" by the number of agreeing models
            (paper, PEFT), False does not divide. A divisor of exactly 0 becomes 1.
        elect: "weighted" votes with weight * delta (mergekit), "plain" with the delta itself (paper, PEFT).
        tie: "index" keeps exactly k, among equals the lowest flat index first; "keep" keeps all >= kth.
        out: contiguous tensor [*S] to fill; may be ``base`` or one of ``tuned`` (then two passes are made).
        out_dtype: dtype of the result, default that of ``out`` or of the inputs.

    Returns:
        The merged tensor [*S] (``out`` where given); the merged task vector when ``base`` is None.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    op = "ties_merge"
    like = check.tensors(op, base, tuned)
    densities = check.density(op, density, len(tuned))
    weights = check.per_model(op, "weight", weight, len(tuned))
    lambda_ = check.number(op, "lambda_", lambda_)
    check.choice(op, "normalize", normalize, NORMALIZE)
    check.choice(op, "elect", elect, ELECTIONS)
    check.choice(op, "tie", tie, TIES)
    inputs = [*tuned, base] if base is not None else tuned
    given = out is not None
    out = backends.output(op, out, out_dtype, like, inputs)
    if like.numel() == 0:
        return out
    options: dict[str, Any] = {"lambda_": lambda_, "normalize": normalize, "elect": elect}
    if not trims(densities):
        ties_pass(out, base, tuned, None, weight=weights, **options)
    elif (given and check.aliases(out, inputs)) or not ties_whole(
        out, base, tuned, density=densities, tie=tie, weight=weights, **options
    ):
        taking = [i for i, w in enumerate(weights) if w != 0]
        if not taking:
            nothing(out, base)
            return out
        kept, k = [tuned[i] for i in taking], counts([densities[i] for i in taking], like.numel())
        cut = backends.call("kth_magnitude", like)(base, kept, k)
        if tie == "keep":
            cut = keep_equals(cut)
        ties_pass(out, base, kept, cut, weight=[weights[i] for i in taking], **options)
    return out


def trims(density: Sequence[float]) -> bool:
    """Whether any model loses entries."""
    return min(density) < 1


def keep_equals(cut: Cut) -> Cut:
    """The cut of the tie rule "keep"; a model that keeps nothing still keeps nothing."""
    return Cut(cut.key, [last if last < 0 else KEEP_ALL_EQUALS for last in cut.last])


def shares(normalize: bool | str, weight: Sequence[float]) -> list[float] | None:
    """What every agreeing model adds to the divisor: its weight, 1, or no division at all."""
    if normalize is False:
        return None
    return [1.0] * len(weight) if normalize == "count" else list(weight)


def ties_pass(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    cut: Cut | None,
    *,
    weight: Sequence[float],
    lambda_: float,
    normalize: bool | str,
    elect: str,
    offset: int = 0,
) -> None:
    """One chunk with known cuts (None: nothing is trimmed), arguments checked."""
    taking = [i for i, w in enumerate(weight) if w != 0]
    if not taking:
        nothing(out, base)
        return
    cut = cut or Cut([0] * len(weight), [KEEP_ALL_EQUALS] * len(weight))
    weights = [weight[i] for i in taking]
    vote = [1.0] * len(taking) if elect == "plain" else None
    backends.call("ties_merge", tuned[0])(
        out,
        base,
        [tuned[i] for i in taking],
        Cut([cut.key[i] for i in taking], [cut.last[i] for i in taking]),
        weights,
        vote,
        shares(normalize, weights),
        lambda_,
        elect,
        offset,
    )


def ties_whole(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    *,
    density: Sequence[float],
    tie: str,
    weight: Sequence[float],
    lambda_: float,
    normalize: bool | str,
    elect: str,
) -> bool:
    """Selection and merge of a whole tensor in one pass; False where the backend has no such form."""
    fused = backends.find("ties_fused", tuned[0])
    if fused is None or not trims(density):
        return False
    if 0 in weight:  # such models take no part
        taking = [i for i, w in enumerate(weight) if w != 0]
        if not taking:
            return False
        tuned, density = [tuned[i] for i in taking], [density[i] for i in taking]
        weight = [weight[i] for i in taking]
    k = counts(density, tuned[0].numel())
    vote = [1.0] * len(k) if elect == "plain" else None
    fused(out, base, tuned, k, tie, weight, vote, shares(normalize, weight), lambda_, elect)
    return True
