"""A low-rank adapter of one weight: what every LoRA op takes (Hu et al., 2021, section 4.1)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pykernels.uncast import uncast


class LoRA(NamedTuple):
    """The update ``scaling * B @ A`` of a weight [out, in]; with ``magnitude`` it is DoRA's.

    ``A`` [r, in] and ``B`` [out, r] are float32, bfloat16 or float16 (float64 with the reference), of one
    dtype and device; ``scaling`` is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023).
    ``magnitude`` [out] is DoRA's m (Liu et al., 2024, section 4): the rows of ``W + scaling * B @ A`` are
    scaled to norm m.

    The class methods make adapters of related kinds; products of factors are in float32 at least, A too then.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    @classmethod
    def rslora(
        cls, A: torch.Tensor, B: torch.Tensor, alpha: float, magnitude: torch.Tensor | None = None
    ) -> LoRA:
        """Scaled by alpha / sqrt(r) (Kalajdzievski, 2023)."""
        return cls(A, B, alpha / math.sqrt(len(A)), magnitude)

    @classmethod
    @uncast
    def xs(cls, A: torch.Tensor, R: torch.Tensor, B: torch.Tensor, scaling: float = 1.0) -> LoRA:
        """``scaling * B @ R @ A`` with R [r, r] between frozen factors (LoRA-XS: Bałazy et al., 2024)."""
        wide = torch.promote_types(A.dtype, torch.float32)
        return cls(A.to(wide), B.to(wide) @ R.to(wide), scaling)

    @classmethod
    def vera(
        cls, A: torch.Tensor, B: torch.Tensor, d: torch.Tensor, b: torch.Tensor, scaling: float = 1.0
    ) -> LoRA:
        """``diag(b) @ B @ diag(d) @ A`` with d [r] and b [out] learned (VeRA: Kopiczko et al., 2024).

        Where A and B are shared and larger, the caller cuts them to the layer, as PEFT does: the first
        columns of A and the first rows of B.
        """
        wide = torch.promote_types(A.dtype, torch.float32)
        return cls(A.to(wide), b.to(wide)[:, None] * B.to(wide) * d.to(wide), scaling)

    @classmethod
    def pissa(
        cls,
        A: torch.Tensor,
        B: torch.Tensor,
        start_A: torch.Tensor,
        start_B: torch.Tensor,
        scaling: float,
    ) -> LoRA:
        """The change since the start, ``scaling * (B @ A - start_B @ start_A)``, for the original weight.

        PiSSA (Meng et al., 2024, section 3) trains beside the residual ``W - scaling * start_B @ start_A``;
        with the residual itself, ``LoRA(A, B, scaling)`` is right.
        """
        return cls(torch.cat([A, start_A]), torch.cat([B, -start_B], 1), scaling)
