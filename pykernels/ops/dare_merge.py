"""DARE: drop task-vector entries at random, rescale the rest, merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from pykernels import backends, check, library
from pykernels.ops.coefficients import (
    Given,
    Scalar,
    examine,
    examine_scalar,
    joined,
    joined_scalar,
    scalar,
    split,
    split_scalar,
    weights,
)
from pykernels.ops.dare_pass import dare_pass
from pykernels.ops.draws import RESCALE
from pykernels.ops.ties_merge import ELECTIONS, NORMALIZE, divides_by, normalizes

OP = "dare_merge"

Drawn: TypeAlias = tuple[float | Sequence[float], int, str]
"""density, seed and name: what the masks are drawn from."""
Rules: TypeAlias = tuple[str | None, bool | str, str | None, str]
"""rescale, normalize, consensus and elect."""


def dare_merge(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    *,
    density: float | Sequence[float],
    seed: int,
    name: str = "",
    weight: Given = 1.0,
    lambda_: Scalar = 1.0,
    rescale: str | None = "density",
    consensus: str | None = None,
    normalize: bool | str = False,
    elect: str = "weighted",
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """base + lambda * merge of the deltas, each entry kept with probability ``density`` and rescaled.

    Language Models are Super Mario (Yu et al., 2023), section 3. Masks are stateless (Philox4x32-10 keyed by
    seed and name, countered by model and element): the same bits on every backend, thread count and chunking.

    Args:
        base: contiguous tensor [*S], or None when ``tuned`` holds task vectors already.
        tuned: 1 to 64 contiguous tensors [*S] of base's dtype: float32, bfloat16, float16 or float64.
        density: probability of keeping an entry, in steps of 1/65536; a number in [0, 1] or one per model.
        seed: integer in [0, 2**64).
        name: the tensor's name, so that tensors of one model draw different masks.
        weight: a number or one per model, or a floating-point tensor [] or [n] on the same device, whose
            values a CUDA kernel reads without the host waiting (there they are not checked to be finite);
            a model of weight 0 takes no part. No gradient is defined.
        lambda_: scale of the merged task vector, a number or a tensor [] as above.
        rescale: "density" divides by the realised density (unbiased, paper), "l1" by the ratio of the L1
            norms after and before the drop (mergekit; 1 if either is below 1e-7 or not finite), None not at
            all.
        consensus: None adds up; "ties" elects the sign first and merges those who agree.
        normalize: True divides by the sum of the (agreeing) weights, "count" (with consensus) by the number
            of agreeing models.
        elect: with consensus: "weighted" votes with weight * delta, "plain" with the rescaled delta itself.
        out: contiguous tensor [*S] to fill; may be ``base`` or one of ``tuned``.
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
        return library.call(
            OP,
            out,
            *inputs,
            check.density(OP, density, len(tuned)),
            *numbers,
            seed=library.signed(check.seed(OP, seed)),
            name=name,
            normalize=divides_by(normalize),
            rescale=rescale,
            consensus=consensus,
            elect=elect,
            out_dtype=out_dtype,
        )
    drawn, rules = (density, seed, name), (rescale, normalize, consensus, elect)
    return _merge(base, tuned, weight, lambda_, drawn, rules, out, out_dtype)


def _merge(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    weight: Given,
    lambda_: Scalar,
    drawn: Drawn,
    rules: Rules,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    like = check.tensors(OP, base, tuned)
    density, seed, name = drawn
    rescale, normalize, consensus, elect = rules
    densities = check.density(OP, density, len(tuned))
    given = weights(OP, weight, like, len(tuned))
    lambda_ = scalar(OP, "lambda_", lambda_, like)
    check.seed(OP, seed)
    _check_rules(rules)
    out = backends.output(OP, out, out_dtype, like, [*tuned, base] if base is not None else tuned)
    run = dare_pass(
        weight=given,
        density=densities,
        lambda_=lambda_,
        normalize=normalize,
        rescale=rescale,
        consensus=consensus,
        elect=elect,
        seed=seed,
        name=name,
    )
    statistic = run.statistic(like.numel())
    if statistic is not None:
        statistic.update(base, tuned, 0)
    run.run(out, base, tuned, 0, statistic.finish() if statistic is not None else None)
    return out


def _check_rules(rules: Rules) -> None:
    rescale, normalize, consensus, elect = rules
    check.choice(OP, "rescale", rescale, RESCALE)
    check.choice(OP, "consensus", consensus, (None, "ties"))
    check.choice(OP, "normalize", normalize, NORMALIZE if consensus else (True, False))
    check.choice(OP, "elect", elect, ELECTIONS)


def _run(
    base: torch.Tensor | None,
    tuned: list[torch.Tensor],
    density: list[float],
    weight: list[float] | None,
    weight_tensor: torch.Tensor | None,
    lambda_: float | None,
    lambda_tensor: torch.Tensor | None,
    *,
    seed: int,
    name: str,
    normalize: str,
    rescale: str | None,
    consensus: str | None,
    elect: str,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    given = joined(weight, weight_tensor), joined_scalar(lambda_, lambda_tensor)
    drawn = density, library.unsigned(seed), name
    rules = rescale, normalizes(normalize), consensus, elect
    return _merge(base, tuned, *given, drawn, rules, out, out_dtype)


def _fake(
    base: torch.Tensor | None,
    tuned: list[torch.Tensor],
    density: list[float],
    weight: list[float] | None,
    weight_tensor: torch.Tensor | None,
    lambda_: float | None,
    lambda_tensor: torch.Tensor | None,
    *,
    seed: int,
    name: str,
    normalize: str,
    rescale: str | None,
    consensus: str | None,
    elect: str,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    like = check.tensors(OP, base, tuned)
    check.density(OP, density, len(tuned))
    examine(OP, like, len(tuned), joined(weight, weight_tensor))
    examine_scalar(OP, "lambda_", like, joined_scalar(lambda_, lambda_tensor))
    _check_rules((rescale, normalizes(normalize), consensus, elect))
    return library.empty(OP, like, out_dtype, out)


library.define(
    OP,
    "Tensor? base, Tensor[] tuned, float[] density, float[]? weight, Tensor? weight_tensor, float? lambda_, "
    "Tensor? lambda_tensor, *, SymInt seed, str name, str normalize, str? rescale, str? consensus, "
    "str elect, ScalarType? out_dtype",
    _run,
    _fake,
    out=True,
)
