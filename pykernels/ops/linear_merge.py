"""Weighted average of tensors, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pykernels import backends, check


def linear_merge(
    tensors: Sequence[torch.Tensor],
    weight: float | Sequence[float],
    *,
    normalize: bool = True,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Weighted sum of tensors, divided by the sum of the weights when ``normalize``.

    Model soups (Wortsman et al., 2022). Accumulates in float32 in the order given and rounds once.

    Args:
        tensors: 1 to 64 contiguous tensors [*S] of one dtype: float32, bfloat16, float16 or float64.
        weight: a number or one per tensor; a tensor of weight 0 takes no part.
        normalize: divide by the sum of the weights; a sum of exactly 0 divides by 1, a negative one divides.
        out: contiguous tensor [*S] to fill; may be one of ``tensors``.
        out_dtype: dtype of the result, default that of ``out`` or of the inputs.

    Returns:
        The merged tensor [*S] (``out`` where given).

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    op = "linear_merge"
    like = check.tensors(op, None, tensors, "tensors")
    weights = check.per_model(op, "weight", weight, len(tensors))
    check.choice(op, "normalize", normalize, (True, False))
    out = backends.output(op, out, out_dtype, like, tensors)
    linear_pass(out, tensors, weights, normalize=normalize)
    return out


def linear_pass(
    out: torch.Tensor, tensors: Sequence[torch.Tensor], weight: Sequence[float], *, normalize: bool
) -> None:
    """One chunk of :func:`linear_merge`, arguments checked: the divisor is folded into the weights."""
    total = divisor(weight) if normalize else 1.0
    taking = [(t, w / total) for t, w in zip(tensors, weight, strict=True) if w != 0]
    if not taking:
        out.detach().zero_()
        return
    backends.call("linear_merge", tensors[0])(out, None, [t for t, _ in taking], [w for _, w in taking])


def divisor(weight: Sequence[float]) -> float:
    """The sum of the weights; exactly 0 in float32, added in their order as kernels add shares, becomes 1."""
    total = sum(weight)
    if abs(total) > 1e-5 * sum(map(abs, weight)):  # 64 float32 additions are not that far off
        return total
    narrow = np.float32(0)
    for w in weight:
        narrow += np.float32(w)
    return float(narrow) or 1.0
