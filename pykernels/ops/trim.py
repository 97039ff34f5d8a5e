"""Trim one task vector by magnitude."""

from __future__ import annotations

import torch

from pykernels import backends, check, library
from pykernels.ops.kth_magnitude import counts
from pykernels.ops.ties_merge import TIES

OP = "trim"


def trim(
    delta: torch.Tensor, density: float, *, tie: str = "index", out: torch.Tensor | None = None
) -> torch.Tensor:
    """Keep the ``density`` largest entries by magnitude, 0 elsewhere; no rescale.

    TIES-Merging (Yadav et al., 2023), section 3, step 1. A NaN stays NaN, kept or not.

    Args:
        delta: contiguous tensor [*S]: float32, bfloat16, float16 or float64.
        density: kept fraction in [0, 1]; k = max(1, int(density * numel)), 0 for density 0.
        tie: "index" keeps exactly k, among equals the lowest flat index first; "keep" keeps all >= kth.
        out: contiguous tensor [*S] to fill; may be ``delta``.

    Returns:
        The trimmed tensor [*S] (``out`` where given).

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    if library.needed():
        [fraction] = check.density(OP, density, 1)
        library.no_tangent(OP, [delta])
        return library.call(OP, out, library.constant(delta), fraction, tie=tie)
    return _run(delta, density, tie=tie, out=out)


def _run(delta: torch.Tensor, density: float, *, tie: str, out: torch.Tensor | None = None) -> torch.Tensor:
    check.one_tensor(OP, "delta", delta)
    [fraction] = check.density(OP, density, 1)
    check.choice(OP, "tie", tie, TIES)
    out = backends.output(OP, out, None, delta, [delta])
    if delta.numel() == 0:
        return out
    cut = backends.call("kth_magnitude", delta)(None, [delta], counts([fraction], delta.numel()))
    backends.call(OP, delta)(out, delta, cut.keep_equals() if tie == "keep" else cut)
    return out


def _fake(delta: torch.Tensor, density: float, *, tie: str, out: torch.Tensor | None = None) -> torch.Tensor:
    check.one_tensor(OP, "delta", delta)
    check.density(OP, density, 1)
    check.choice(OP, "tie", tie, TIES)
    return library.empty(OP, delta, None, out)


library.define(OP, "Tensor delta, float density, *, str tie", _run, _fake, out=True)
