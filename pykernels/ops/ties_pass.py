"""The passes of TIES-Merging, arguments checked: a chunk with known cuts, or a whole tensor at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels import backends
from pykernels.cut import KEEP_ALL_EQUALS, Cut
from pykernels.ops.coefficients import Scalar, Weights, narrow, narrow_scalar, pick, taking
from pykernels.ops.kth_magnitude import counts
from pykernels.ops.task_arithmetic import nothing


def trims(density: Sequence[float]) -> bool:
    """Whether any model loses entries."""
    return min(density) < 1


def shares(normalize: bool | str, weight: Weights) -> Weights | None:
    """What every agreeing model adds to the divisor: its weight, 1, or no division at all."""
    if normalize is False:
        return None
    return [1.0] * len(weight) if normalize == "count" else weight


def ties_pass(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    cut: Cut | None,
    *,
    weight: Weights,
    lambda_: Scalar,
    normalize: bool | str,
    elect: str,
    offset: int = 0,
) -> None:
    """One chunk with known cuts (None: nothing is trimmed)."""
    part = taking(weight)
    if not part:
        nothing(out, base)
        return
    cut = cut or Cut([0] * len(weight), [KEEP_ALL_EQUALS] * len(weight))
    weight = narrow(pick(weight, part))
    backends.call("ties_merge", tuned[0])(
        out,
        base,
        [tuned[i] for i in part],
        cut.pick(part),
        weight,
        [1.0] * len(part) if elect == "plain" else None,
        shares(normalize, weight),
        narrow_scalar(lambda_),
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
    weight: Weights,
    lambda_: Scalar,
    normalize: bool | str,
    elect: str,
) -> bool:
    """Selection and merge of a whole tensor in one pass; False where the backend has no such form."""
    fused = backends.find("ties_fused", tuned[0])
    if fused is None or not trims(density):
        return False
    part = taking(weight)
    if not part:
        return False
    if len(part) < len(tuned):
        tuned, density = [tuned[i] for i in part], [density[i] for i in part]
    weight = narrow(pick(weight, part))
    fused(
        out,
        base,
        tuned,
        counts(density, tuned[0].numel()),
        tie,
        weight,
        [1.0] * len(part) if elect == "plain" else None,
        shares(normalize, weight),
        narrow_scalar(lambda_),
        elect,
    )
    return True
