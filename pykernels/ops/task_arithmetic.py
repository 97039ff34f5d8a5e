"""Base plus a weighted sum of task vectors, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels import backends, check
from pykernels.ops.linear_merge import divisor


def task_arithmetic(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    *,
    weight: float | Sequence[float] = 1.0,
    lambda_: float = 1.0,
    normalize: bool = False,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """base + lambda * sum(weight * (tuned - base)).

    Editing Models with Task Arithmetic (Ilharco et al., 2022), section 2.

    Args:
        base: contiguous tensor [*S], or None when ``tuned`` holds task vectors already.
        tuned: 1 to 64 contiguous tensors [*S] of base's dtype: float32, bfloat16, float16 or float64.
        weight: a number or one per model; a model of weight 0 takes no part.
        lambda_: scale of the merged task vector.
        normalize: divide by the sum of the weights (exactly 0 divides by 1).
        out: contiguous tensor [*S] to fill; may be ``base`` or one of ``tuned``.
        out_dtype: dtype of the result, default that of ``out`` or of the inputs.

    Returns:
        The merged tensor [*S] (``out`` where given); the merged task vector when ``base`` is None.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    op = "task_arithmetic"
    like = check.tensors(op, base, tuned)
    weights = check.per_model(op, "weight", weight, len(tuned))
    lambda_ = check.number(op, "lambda_", lambda_)
    check.choice(op, "normalize", normalize, (True, False))
    out = backends.output(op, out, out_dtype, like, [*tuned, base] if base is not None else tuned)
    arithmetic_pass(out, base, tuned, weights, lambda_=lambda_, normalize=normalize)
    return out


def arithmetic_pass(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    weight: Sequence[float],
    *,
    lambda_: float,
    normalize: bool,
) -> None:
    """One chunk of :func:`task_arithmetic`, arguments checked: lambda and divisor are folded into the
    weights.
    """
    scale = lambda_ / (divisor(weight) if normalize else 1.0)
    taking = [(t, w * scale) for t, w in zip(tuned, weight, strict=True) if w != 0]
    if not taking:
        nothing(out, base)
        return
    backends.call("task_arithmetic", tuned[0])(out, base, [t for t, _ in taking], [w for _, w in taking])


def nothing(out: torch.Tensor, base: torch.Tensor | None) -> None:
    """The result when no model takes part: the base itself, or a task vector of zeros."""
    if base is None:
        out.detach().zero_()
    else:
        backends.call("linear_merge", base)(out, None, [base], [1.0])
