"""Base plus a weighted sum of task vectors, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pykernels import backends, check, library
from pykernels.ops import gradient
from pykernels.ops.coefficients import (
    Given,
    Scalar,
    Weights,
    divisor,
    examine,
    examine_scalar,
    fold,
    joined,
    joined_scalar,
    partaking,
    scalar,
    split,
    split_scalar,
    weights,
)

OP = "task_arithmetic"


def task_arithmetic(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    *,
    weight: Given = 1.0,
    lambda_: Scalar = 1.0,
    normalize: bool = False,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """base + lambda * sum(weight * (tuned - base)).

    Editing Models with Task Arithmetic (Ilharco et al., 2022), section 2. Differentiable in ``weight`` and
    ``lambda_`` that are tensors (AdaMerging, Yang et al., 2024), not in ``base`` and ``tuned``.

    Args:
        base: contiguous tensor [*S], or None when ``tuned`` holds task vectors already.
        tuned: 1 to 64 contiguous tensors [*S] of base's dtype: float32, bfloat16, float16 or float64.
        weight: a number or one per model, or a floating-point tensor [] or [n] on the same device, whose
            values a CUDA kernel reads without the host waiting (there they are not checked to be finite);
            a model of weight 0 takes no part.
        lambda_: scale of the merged task vector, a number or a tensor [] as above.
        normalize: divide by the sum of the weights (exactly 0 divides by 1).
        out: contiguous tensor [*S] to fill; may be ``base`` or one of ``tuned``. None where a gradient is
            asked for.
        out_dtype: dtype of the result, default that of ``out`` or of the inputs.

    Returns:
        The merged tensor [*S] (``out`` where given); the merged task vector when ``base`` is None.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    if library.needed(weight, lambda_):
        inputs = library.inputs(OP, base, tuned)
        check.choice(OP, "normalize", normalize, (True, False))
        if library.wants_gradient(weight) or library.wants_gradient(lambda_):
            check.no_out(OP, out)
        numbers = (*split(OP, weight, len(tuned)), *split_scalar(OP, "lambda_", lambda_))
        return library.call(OP, out, *inputs, *numbers, normalize=normalize, out_dtype=out_dtype)
    return _merge(base, tuned, weight, lambda_, normalize, out, out_dtype)


def _merge(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    weight: Given,
    lambda_: Scalar,
    normalize: bool,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    like = check.tensors(OP, base, tuned)
    given = weights(OP, weight, like, len(tuned))
    lambda_ = scalar(OP, "lambda_", lambda_, like)
    check.choice(OP, "normalize", normalize, (True, False))
    out = backends.output(OP, out, out_dtype, like, [*tuned, base] if base is not None else tuned)
    arithmetic_pass(out, base, tuned, given, lambda_=lambda_, normalize=normalize)
    return out


def arithmetic_pass(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    weight: Weights,
    *,
    lambda_: Scalar,
    normalize: bool,
) -> None:
    """One chunk of :func:`task_arithmetic`, arguments checked: lambda and divisor are folded into the
    weights.
    """
    tuned, weight = partaking(tuned, weight)
    if not tuned:
        nothing(out, base)
        return
    folded = fold(weight, lambda_, divisor(weight) if normalize else 1.0, out)
    backends.call("task_arithmetic", tuned[0])(out, base, tuned, folded)


def nothing(out: torch.Tensor, base: torch.Tensor | None) -> None:
    """The result when no model takes part: the base itself, or a task vector of zeros."""
    if base is None:
        out.detach().zero_()
    else:
        backends.call("linear_merge", base)(out, None, [base], [1.0])


def _run(
    base: torch.Tensor | None,
    tuned: list[torch.Tensor],
    weight: list[float] | None,
    weight_tensor: torch.Tensor | None,
    lambda_: float | None,
    lambda_tensor: torch.Tensor | None,
    *,
    normalize: bool,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return _merge(
        base,
        tuned,
        joined(weight, weight_tensor),
        joined_scalar(lambda_, lambda_tensor),
        normalize,
        out,
        out_dtype,
    )


def _fake(
    base: torch.Tensor | None,
    tuned: list[torch.Tensor],
    weight: list[float] | None,
    weight_tensor: torch.Tensor | None,
    lambda_: float | None,
    lambda_tensor: torch.Tensor | None,
    *,
    normalize: bool,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    like = check.tensors(OP, base, tuned)
    examine(OP, like, len(tuned), joined(weight, weight_tensor))
    examine_scalar(OP, "lambda_", like, joined_scalar(lambda_, lambda_tensor))
    return library.empty(OP, like, out_dtype, out)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    base, tuned, weight, weight_tensor, lambda_, lambda_tensor = inputs
    numbers = joined(weight, weight_tensor), joined_scalar(lambda_, lambda_tensor)
    gradient.save(ctx, base, tuned, *numbers, keyword_only_inputs["normalize"])


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    by_tuned, by_weight, by_lambda = gradient.gradients(ctx, grad)
    return None, by_tuned, None, by_weight, None, by_lambda


library.define(
    OP,
    "Tensor? base, Tensor[] tuned, float[]? weight, Tensor? weight_tensor, float? lambda_, "
    "Tensor? lambda_tensor, *, bool normalize, ScalarType? out_dtype",
    _run,
    _fake,
    out=True,
)
library.differentiate(OP, _setup_context, _backward)
