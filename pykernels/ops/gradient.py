"""Gradients of a weighted sum in its weights and in lambda: one pass over all tensors gives them all.

AdaMerging (Yang et al., 2024) learns one coefficient per model and tensor. With c_i the dot product of the
result's gradient with task vector i, w the weights, D their divisor and S = sum(w_i c_i):

    d/d w_i = lambda / D * (c_i - S / D)        d/d lambda = S / D

where S / D in the bracket stands for D depending on w_i: it is absent without normalisation, and where the
weights add up to exactly 0, as D is the constant 1 then. A model of weight 0 has a gradient like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pykernels import backends, library
from pykernels.ops.coefficients import Given, Scalar, divisor, sum_of, wide
from pykernels.rows import add_blocks

OP = "dot_products"


def save(
    ctx: Any,
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    weight: Given,
    lambda_: Scalar,
    normalize: bool,
) -> None:
    """Keep for :func:`gradients` what a forward pass got."""
    tensors = [x if isinstance(x, torch.Tensor) else None for x in (base, weight, lambda_)]
    ctx.save_for_backward(*tensors, *tuned)
    ctx.numbers = [None if isinstance(x, torch.Tensor) else x for x in (weight, lambda_)]
    ctx.normalize = normalize


def gradients(ctx: Any, grad: torch.Tensor) -> tuple[list[None], torch.Tensor | None, torch.Tensor | None]:
    """(none for the tuned tensors, gradient of the weight tensor, of the lambda tensor; None for numbers)."""
    base, weight, lambda_, *tuned = ctx.saved_tensors
    dots = torch.ops.pykernels.dot_products(grad, base, tuned)
    weights, factor = ctx.numbers
    w = wide(weights if weight is None else weight.expand(len(tuned)), grad)
    total, pull = wide(1.0, grad), wide(0.0, grad)
    summed = torch.where(w != 0, w * dots, 0.0).sum()
    if ctx.normalize and weight is None:
        total = wide(divisor(weights), grad)
    elif ctx.normalize:
        raw = sum_of(w)
        total = raw.where(raw != 0, 1.0)
        pull = torch.where(raw != 0, summed / total, 0.0)
    by_weight = by_lambda = None
    if weight is not None:
        each = wide(factor if lambda_ is None else lambda_, grad) / total * (dots - pull)
        by_weight = (each if weight.dim() else each.sum()).to(weight.dtype)
    if lambda_ is not None:
        by_lambda = (summed / total).to(lambda_.dtype)
    return [None] * len(tuned), by_weight, by_lambda


def _run(grad: torch.Tensor, base: torch.Tensor | None, tuned: list[torch.Tensor]) -> torch.Tensor:
    """<grad, tuned - base> per model, float64 [n]; ``grad`` may be a view of any kind."""
    like = grad if grad.dtype == torch.float64 else tuned[0]  # float64 is the reference's
    return add_blocks(backends.call(OP, like)(grad.contiguous().resolve_neg(), base, tuned))


def _fake(grad: torch.Tensor, base: torch.Tensor | None, tuned: list[torch.Tensor]) -> torch.Tensor:
    return grad.new_empty(len(tuned), dtype=torch.float64)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Nothing to keep."""


def _backward(ctx: Any, grad: torch.Tensor) -> None:
    raise RuntimeError("linear_merge, task_arithmetic: no second derivative is defined")


library.define(OP, "Tensor grad, Tensor? base, Tensor[] tuned", _run, _fake, out=False)
library.differentiate(OP, _setup_context, _backward)
