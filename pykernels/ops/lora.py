"""A low-rank adapter of one weight: what every LoRA op takes (Hu et al., 2021, section 4.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LoRA(NamedTuple):
    """The update ``scaling * B @ A`` of a weight [out, in]; with ``magnitude`` it is DoRA's.

    ``A`` [r, in] and ``B`` [out, r] are float32, bfloat16 or float16 (float64 with the reference), of one
    dtype and device; ``scaling`` is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023).
    ``magnitude`` [out] is DoRA's m (Liu et al., 2024, section 4): the rows of ``W + scaling * B @ A`` are
    scaled to norm m.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
