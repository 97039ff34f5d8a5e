"""Softmax, its logarithm and its normaliser over one dimension, and their gradients, in float64.

The logits z are float32 numbers (float64 for float64 inputs), rounded once after every step: softcap,
temperature, mask. All that follows is float64. A row's sum is kept as (shift, total), total * e**shift with
the largest logit as the shift, so that parts of a row can be joined. Special values are those of
``torch.softmax``: a row with NaN or +inf is NaN, and so is one of nothing but -inf.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pykernels.ref.delta import scalar, working


class RowSum(NamedTuple):
    """Sums of e**z over rows, total * e**shift: two float64 tensors, the reduced dimension kept as 1."""

    shift: torch.Tensor
    total: torch.Tensor


def logits(
    x: torch.Tensor, temperature: float, softcap: float | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """x [*S] of a float dtype -> z [*S], float64: c * tanh(x / c), then / temperature, then the mask.

    ``mask`` [*S]: a bool one turns z to -inf where it is False, whatever stood there; another is added.
    """
    z = x.to(working(x.dtype))
    if softcap is not None:
        c = scalar(softcap, x).double()
        z = (c * (z.double() / c).tanh()).to(z.dtype)
    z = (z.double() / scalar(temperature, x).double()).to(z.dtype)
    if mask is None:
        return z.double()
    if mask.dtype == torch.bool:
        return z.double().where(mask, -math.inf)
    return (z.double() + mask.to(z.dtype).double()).to(z.dtype).double()


def row_sum(z: torch.Tensor, dim: int) -> RowSum:
    """The sum of e**z over ``dim``; 0 for a row that is empty or all -inf."""
    if z.shape[dim] == 0:
        empty = z.sum(dim, keepdim=True)
        return RowSum(torch.full_like(empty, -math.inf), empty)
    shift = z.amax(dim, keepdim=True)
    total = (z - shift).exp().sum(dim, keepdim=True)
    return RowSum(shift, total.where(shift != -math.inf, 0.0))


def joined(a: RowSum, b: RowSum) -> RowSum:
    """The sum of two parts of a row."""
    shift = torch.maximum(a.shift, b.shift)
    return RowSum(shift, _rescaled(a, shift) + _rescaled(b, shift))


def _rescaled(part: RowSum, shift: torch.Tensor) -> torch.Tensor:
    return (part.total * (part.shift - shift).exp()).where(part.shift != -math.inf, 0.0)


def with_sink(row: RowSum, sink: torch.Tensor | None) -> RowSum:
    """The sum with one more logit, which gets no probability itself; ``sink`` has the sums' shape."""
    if sink is None:
        return row
    logit = sink.double()
    return joined(row, RowSum(logit, torch.ones_like(logit)))


def softmax(z: torch.Tensor, row: RowSum, safe: bool) -> torch.Tensor:
    """e**z / sum; ``safe``: 0 where the sum is 0, NaN otherwise."""
    y = (z - row.shift).exp() / row.total
    return y.where(row.shift != -math.inf, 0.0) if safe else y


def log_softmax(z: torch.Tensor, row: RowSum, safe: bool) -> torch.Tensor:
    """z - log(sum); ``safe``: -inf where the sum is 0, NaN otherwise."""
    y = (z - row.shift) - row.total.log()
    return y.where(row.shift != -math.inf, -math.inf) if safe else y


def logsumexp(row: RowSum) -> torch.Tensor:
    """log(sum): -inf for a sum of 0, +inf where a logit is."""
    return row.shift.where(row.shift.isinf(), row.shift + row.total.log())


def softmax_backward(grad: torch.Tensor, y: torch.Tensor, dot: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * y * (grad - dot), with dot the row's sum of grad * y."""
    return scale * (y.double() * (grad.double() - dot))


def log_softmax_backward(
    grad: torch.Tensor, y: torch.Tensor, total: torch.Tensor, scale: float
) -> torch.Tensor:
    """scale * (grad - e**y * total), with total the row's sum of grad."""
    return scale * (grad.double() - y.double().exp() * total)
