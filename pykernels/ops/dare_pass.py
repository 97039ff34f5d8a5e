"""The passes of DARE, arguments checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pykernels import backends
from pykernels.ops.coefficients import Scalar, Weights, divisor, fold, narrow, narrow_scalar, pick, taking
from pykernels.ops.draws import Factors, L1Statistic, draw_threshold, mask_key, rescale_factor
from pykernels.ops.task_arithmetic import nothing
from pykernels.ops.ties_pass import shares


class DarePass(NamedTuple):
    """One tensor's DARE with its arguments checked: models of weight 0 are out, thresholds and key are drawn
    up.
    """

    taking: list[int]
    weight: Weights
    threshold: list[int]
    key: int
    lambda_: Scalar
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
        backends.call("dare_merge", tuned[0])(
            out,
            base,
            [tuned[i] for i in self.taking],
            self.threshold,
            self.taking,
            self.key,
            fold(self.weight, scale, total, out),
            narrow(scale) if self.elect == "plain" else None,
            shares(self.normalize, narrow(self.weight)) if self.elect else None,
            narrow_scalar(self.lambda_),
            self.elect,
            offset,
        )


def dare_pass(
    *,
    weight: Weights,
    density: Sequence[float],
    lambda_: Scalar,
    normalize: bool | str,
    rescale: str | None,
    consensus: str | None,
    elect: str,
    seed: int,
    name: str,
) -> DarePass:
    """Draw up the pass of one tensor from checked arguments."""
    part = taking(weight)
    return DarePass(
        list(part),
        pick(weight, part),
        [draw_threshold(density[i]) for i in part],
        mask_key(seed, name),
        lambda_,
        normalize,
        rescale,
        elect if consensus else None,
    )
