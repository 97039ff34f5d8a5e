"""DARE: drop task-vector entries at random, rescale the rest, merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pykernels import backends, check
from pykernels.ops.draws import RESCALE, Factors, L1Statistic, draw_threshold, mask_key, rescale_factor
from pykernels.ops.linear_merge import divisor
from pykernels.ops.task_arithmetic import nothing
from pykernels.ops.ties_merge import ELECTIONS, NORMALIZE, shares


def dare_merge(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    *,
    density: float | Sequence[float],
    seed: int,
    name: str = "",
    weight: float | Sequence[float] = 1.0,
    lambda_: float = 1.0,
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
        weight: a number or one per model; a model of weight 0 takes no part.
        lambda_: scale of the merged task vector.
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
    op = "dare_merge"
    like = check.tensors(op, base, tuned)
    densities = check.density(op, density, len(tuned))
    weights = check.per_model(op, "weight", weight, len(tuned))
    lambda_ = check.number(op, "lambda_", lambda_)
    check.seed(op, seed)
    check.choice(op, "rescale", rescale, RESCALE)
    check.choice(op, "consensus", consensus, (None, "ties"))
    check.choice(op, "normalize", normalize, NORMALIZE if consensus else (True, False))
    check.choice(op, "elect", elect, ELECTIONS)
    out = backends.output(op, out, out_dtype, like, [*tuned, base] if base is not None else tuned)
    run = dare_pass(
        weight=weights,
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


class DarePass(NamedTuple):
    """One tensor's DARE with its arguments checked: models of weight 0 are out, thresholds and key are drawn
    up.
    """

    taking: list[int]
    weight: list[float]
    threshold: list[int]
    key: int
    lambda_: float
    normalize: bool | str
    rescale: str | None
    elect: str | None

    def statistic(self, numel: int) -> L1Statistic | None:
        """The pass that ``rescale="l1"`` needs first."""
        if self.rescale != "l1" or not self.taking:
            return None
        return L1Statistic(self.taking, self.threshold, self.key)

    def run(
        self,
        out: torch.Tensor,
        base: torch.Tensor | None,
        tuned: Sequence[torch.Tensor],
        offset: int,
        factors: Factors | None,
    ) -> None:
        """Merge one chunk that starts at flat index ``offset`` of the tensor."""
        if not self.taking:
            nothing(out, base)
            return
        scale = factors.values if factors else [rescale_factor(t, self.rescale) for t in self.threshold]
        total = divisor(self.weight) if self.normalize and not self.elect else 1.0
        weight = [w * s / total for w, s in zip(self.weight, scale, strict=True)]
        backends.call("dare_merge", tuned[0])(
            out,
            base,
            [tuned[i] for i in self.taking],
            self.threshold,
            self.taking,
            self.key,
            weight,
            scale if self.elect == "plain" else None,
            shares(self.normalize, self.weight) if self.elect else None,
            self.lambda_,
            self.elect,
            offset,
        )


def dare_pass(
    *,
    weight: Sequence[float],
    density: Sequence[float],
    lambda_: float,
    normalize: bool | str,
    rescale: str | None,
    consensus: str | None,
    elect: str,
    seed: int,
    name: str,
) -> DarePass:
    """Draw up the pass of one tensor from checked arguments."""
    taking = [i for i, w in enumerate(weight) if w != 0] if 0 in weight else list(range(len(weight)))
    return DarePass(
        taking,
        [weight[i] for i in taking],
        [draw_threshold(density[i]) for i in taking],
        mask_key(seed, name),
        lambda_,
        normalize,
        rescale,
        elect if consensus else None,
    )
