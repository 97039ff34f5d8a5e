"""Task vectors, their magnitude keys, and sums in a stated order: what every reference starts from.

float64 inputs are worked on in float64, all narrower ones in float32, where decisions must be the same bits
as in the kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def working(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which deltas, votes and divisors of ``dtype`` inputs are made."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scalar(value: float, like: torch.Tensor) -> torch.Tensor:
    """A weight, factor or lambda, rounded once to the working dtype of ``like``."""
    return torch.tensor(value, dtype=working(like.dtype), device=like.device)


def delta(base: torch.Tensor | None, tuned: torch.Tensor) -> torch.Tensor:
    """tuned - base [*S] in the working dtype, one rounding; ``tuned`` itself, widened, without a base."""
    wide = working(tuned.dtype)
    return tuned.to(wide) if base is None else tuned.to(wide) - base.to(wide)


def key(delta: torch.Tensor) -> torch.Tensor:
    """Magnitude keys [*S], int64: the bits of |delta|, which order like |delta|, with NaN above Inf."""
    if delta.dtype == torch.float64:
        return delta.view(torch.int64) & 0x7FFF_FFFF_FFFF_FFFF
    return delta.view(torch.int32).to(torch.int64) & 0x7FFF_FFFF


def in_order(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum from the first term to the last, rounding after each in the terms' dtype."""
    first, *rest = terms
    total = first
    for term in rest:
        total = total + term
    return total
