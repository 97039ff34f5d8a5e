"""TIES-Merging of tensors: trim by magnitude, elect the sign, average those who agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pykernels import backends, check, library
from pykernels.ops.coefficients import (
    Given,
    Scalar,
    examine,
    examine_scalar,
    joined,
    joined_scalar,
    pick,
    scalar,
    split,
    split_scalar,
    taking,
    weights,
)
from pykernels.ops.kth_magnitude import counts
from pykernels.ops.task_arithmetic import nothing
from pykernels.ops.ties_pass import ties_pass, ties_whole, trims

OP = "ties_merge"
TIES = ("index", "keep")
ELECTIONS = ("weighted", "plain")
NORMALIZE = (True, False, "count")


def ties_merge(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    *,
    density: float | Sequence[float],
    weight: Given = 1.0,
    lambda_: Scalar = 1.0,
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
        weight: a number or one per model, or a floating-point tensor [] or [n] on the same device, whose
            values a CUDA kernel reads without the host waiting (there they are not checked to be finite);
            a model of weight 0 takes no part. No gradient is defined.
        lambda_: scale of the merged task vector, a number or a tensor [] as above.
        normalize: True divides by the agreeing weights (mergekit), "count" by the number of agreeing models
            (paper, PEFT), False does not divide. A divisor of exactly 0 becomes 1.
        elect: "weighted" votes with weight * delta (mergekit), "plain" with the delta itself (paper, PEFT).
        tie: "index" keeps exactly k, among equals the lowest flat index first; "keep" keeps all >= kth.
        out: contiguous tensor [*S] to fill; may be ``base`` or one of ``tuned`` (on a CPU in two passes).
        out_dtype: dtype of the result, default that of ``out`` or of the inputs.

    Returns:
        The merged tensor [*S] (``out`` where given); the merged task vector when ``base`` is None.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    if library.needed(weight, lambda_):
        check.no_gradient(OP, "weight", weight)
        check.no_gradient(OP, "lambda_", lambda_)
        check.choice(OP, "normalize", normalize, NORMALIZE)
        inputs = library.inputs(OP, base, tuned)
        numbers = (*split(OP, weight, len(tuned)), *split_scalar(OP, "lambda_", lambda_))
        densities = check.density(OP, density, len(tuned))
        rules = {"normalize": divides_by(normalize), "elect": elect, "tie": tie}
        return library.call(OP, out, *inputs, densities, *numbers, **rules, out_dtype=out_dtype)
    return _merge(base, tuned, density, weight, lambda_, normalize, elect, tie, out, out_dtype)


def divides_by(normalize: bool | str) -> str:
    """The rule of normalisation as a word, for schemas."""
    return normalize if isinstance(normalize, str) else "weight" if normalize else "nothing"


def normalizes(word: str) -> bool | str:
    """What :func:`divides_by` took."""
    return {"weight": True, "nothing": False}.get(word, word)


def _merge(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    density: float | Sequence[float],
    weight: Given,
    lambda_: Scalar,
    normalize: bool | str,
    elect: str,
    tie: str,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    like = check.tensors(OP, base, tuned)
    densities = check.density(OP, density, len(tuned))
    given = weights(OP, weight, like, len(tuned))
    lambda_ = scalar(OP, "lambda_", lambda_, like)
    _check_rules(normalize, elect, tie)
    inputs = [*tuned, base] if base is not None else tuned
    inplace = out is not None
    out = backends.output(OP, out, out_dtype, like, inputs)
    if like.numel() == 0:
        return out
    options: dict[str, Any] = {"lambda_": lambda_, "normalize": normalize, "elect": elect}
    if not trims(densities):
        ties_pass(out, base, tuned, None, weight=given, **options)
        return out
    inplace = inplace and check.aliases(out, inputs) and not backends.device_side("ties_fused", like)
    if inplace or not ties_whole(out, base, tuned, density=densities, tie=tie, weight=given, **options):
        part = taking(given)
        if not part:
            nothing(out, base)
            return out
        kept, k = [tuned[i] for i in part], counts([densities[i] for i in part], like.numel())
        cut = backends.call("kth_magnitude", like)(base, kept, k)
        if tie == "keep":
            cut = cut.keep_equals()
        ties_pass(out, base, kept, cut, weight=pick(given, part), **options)
    return out


def _check_rules(normalize: bool | str, elect: str, tie: str) -> None:
    check.choice(OP, "normalize", normalize, NORMALIZE)
    check.choice(OP, "elect", elect, ELECTIONS)
    check.choice(OP, "tie", tie, TIES)


def _run(
    base: torch.Tensor | None,
    tuned: list[torch.Tensor],
    density: list[float],
    weight: list[float] | None,
    weight_tensor: torch.Tensor | None,
    lambda_: float | None,
    lambda_tensor: torch.Tensor | None,
    *,
    normalize: str,
    elect: str,
    tie: str,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    given = joined(weight, weight_tensor), joined_scalar(lambda_, lambda_tensor)
    return _merge(base, tuned, density, *given, normalizes(normalize), elect, tie, out, out_dtype)


def _fake(
    base: torch.Tensor | None,
    tuned: list[torch.Tensor],
    density: list[float],
    weight: list[float] | None,
    weight_tensor: torch.Tensor | None,
    lambda_: float | None,
    lambda_tensor: torch.Tensor | None,
    *,
    normalize: str,
    elect: str,
    tie: str,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    like = check.tensors(OP, base, tuned)
    check.density(OP, density, len(tuned))
    examine(OP, like, len(tuned), joined(weight, weight_tensor))
    examine_scalar(OP, "lambda_", like, joined_scalar(lambda_, lambda_tensor))
    _check_rules(normalizes(normalize), elect, tie)
    return library.empty(OP, like, out_dtype, out)


library.define(
    OP,
    "Tensor? base, Tensor[] tuned, float[] density, float[]? weight, Tensor? weight_tensor, float? lambda_, "
    "Tensor? lambda_tensor, *, str normalize, str elect, str tie, ScalarType? out_dtype",
    _run,
    _fake,
    out=True,
)
