"""Low-rank adapters merged into a weight (LoRA: Hu et al., 2021; DoRA: Liu et al., 2024, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.ref.rounding import round_once

LARGEST = 2**20
"""Elements of a block in float64."""

Tensors = Sequence[torch.Tensor]


def merged(
    weight: torch.Tensor,
    A: Tensors,
    B: Tensors,
    scaling: Sequence[float],
    magnitude: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """weight [out, in], A_i [r_i, in], B_i [out, r_i] -> [out, in], float64.

    In the order given, ``W' = W' + s B A``; with a magnitude m [out] that is then multiplied, row by row, by
    ``m / ||W + s B A||``, where the norm is that of the unmerged weight with this adapter alone.
    """
    start = weight.double()
    result = start
    for a, b, s, m in zip(A, B, scaling, magnitude, strict=True):
        delta = s * (b.double() @ a.double())
        result = result + delta
        if m is not None:
            norm = torch.linalg.vector_norm(start + delta, dim=1)
            result = (m.double() / norm)[:, None] * result
    return result


def merge_lora(
    out: torch.Tensor,
    weight: torch.Tensor,
    A: Tensors,
    B: Tensors,
    scaling: Sequence[float],
    magnitude: Sequence[torch.Tensor | None],
    fan_in_fan_out: bool,
) -> None:
    """The backend's row: :func:`merged` by blocks of rows, rounded once; ``out`` may be ``weight``."""
    if fan_in_fan_out:
        out, weight = out.t(), weight.t()
    step = max(1, LARGEST // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        part = [None if m is None else m[rows] for m in magnitude]
        out[rows] = round_once(merged(weight[rows], A, [b[rows] for b in B], scaling, part), out.dtype)
