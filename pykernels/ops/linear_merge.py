"""Weighted average of tensors, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pykernels import backends, check, library
from pykernels.ops import gradient
from pykernels.ops.coefficients import (
    Given,
    Weights,
    divisor,
    examine,
    fold,
    joined,
    partaking,
    split,
    weights,
)

OP = "linear_merge"


def linear_merge(
    tensors: Sequence[torch.Tensor],
    weight: Given,
    *,
    normalize: bool = True,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Weighted sum of tensors, divided by the sum of the weights when ``normalize``.

    Model soups (Wortsman et al., 2022). Accumulates in float32 in the order given and rounds once.
    Differentiable in a ``weight`` that is a tensor (AdaMerging, Yang et al., 2024), not in ``tensors``.

    Args:
        tensors: 1 to 64 contiguous tensors [*S] of one dtype: float32, bfloat16, float16 or float64.
        weight: a number or one per tensor, or a floating-point tensor [] or [n] on the same device, whose
            values a CUDA kernel reads without the host waiting (there they are not checked to be finite);
            a tensor of weight 0 takes no part.
        normalize: divide by the sum of the weights; a sum of exactly 0 divides by 1, a negative one divides.
        out: contiguous tensor [*S] to fill; may be one of ``tensors``. None where a gradient is asked for.
        out_dtype: dtype of the result, default that of ``out`` or of the inputs.

    Returns:
        The merged tensor [*S] (``out`` where given).

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    if library.needed(weight):
        _, inputs = library.inputs(OP, None, tensors, "tensors")
        check.choice(OP, "normalize", normalize, (True, False))
        if library.wants_gradient(weight):
            check.no_out(OP, out)
        numbers = split(OP, weight, len(tensors))
        return library.call(OP, out, inputs, *numbers, normalize=normalize, out_dtype=out_dtype)
    return _merge(tensors, weight, normalize, out, out_dtype)


def _merge(
    tensors: Sequence[torch.Tensor],
    weight: Given,
    normalize: bool,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    like = check.tensors(OP, None, tensors, "tensors")
    given = weights(OP, weight, like, len(tensors))
    check.choice(OP, "normalize", normalize, (True, False))
    out = backends.output(OP, out, out_dtype, like, tensors)
    linear_pass(out, tensors, given, normalize=normalize)
    return out


def linear_pass(
    out: torch.Tensor, tensors: Sequence[torch.Tensor], weight: Weights, *, normalize: bool
) -> None:
    """One chunk of :func:`linear_merge`, arguments checked: the divisor is folded into the weights."""
    tensors, weight = partaking(tensors, weight)
    if not tensors:
        out.detach().zero_()
        return
    folded = fold(weight, 1.0, divisor(weight) if normalize else 1.0, out)
    backends.call("linear_merge", tensors[0])(out, None, tensors, folded)


def _run(
    tensors: list[torch.Tensor],
    weight: list[float] | None,
    weight_tensor: torch.Tensor | None,
    *,
    normalize: bool,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return _merge(tensors, joined(weight, weight_tensor), normalize, out, out_dtype)


def _fake(
    tensors: list[torch.Tensor],
    weight: list[float] | None,
    weight_tensor: torch.Tensor | None,
    *,
    normalize: bool,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    like = check.tensors(OP, None, tensors, "tensors")
    examine(OP, like, len(tensors), joined(weight, weight_tensor))
    return library.empty(OP, like, out_dtype, out)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    tensors, weight, weight_tensor = inputs
    gradient.save(ctx, None, tensors, joined(weight, weight_tensor), 1.0, keyword_only_inputs["normalize"])


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    by_tensors, by_weight, _ = gradient.gradients(ctx, grad)
    return by_tensors, None, by_weight


library.define(
    OP,
    "Tensor[] tensors, float[]? weight, Tensor? weight_tensor, *, bool normalize, ScalarType? out_dtype",
    _run,
    _fake,
    out=True,
)
library.differentiate(OP, _setup_context, _backward)
