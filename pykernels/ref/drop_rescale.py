"""DARE (Yu et al., 2023, section 3): drop entries of a task vector at random, rescale the rest."""

from __future__ import annotations

import torch

from pykernels.ref.delta import delta as widen
from pykernels.ref.delta import scalar
from pykernels.ref.philox import draws
from pykernels.ref.trim import keep


def drop_rescale(
    delta: torch.Tensor, threshold: int, key: int, scale: float, offset: int = 0
) -> torch.Tensor:
    """delta [*S] -> scale * delta where the draw is below ``threshold`` (0..65536), 0 elsewhere, float64.

    The draws are those of model 0 under ``key``; ``offset`` is the flat index of the first element in its
    tensor. A NaN stays, kept or not.
    """
    return scalar(scale, delta).double() * dropped(widen(None, delta), threshold, 0, key, offset).double()


def dropped(delta: torch.Tensor, threshold: int, model: int, key: int, offset: int) -> torch.Tensor:
    """delta [*S] where the model's draw is below ``threshold``, 0 elsewhere; a NaN stays."""
    draw = draws(key, model, offset, delta.numel(), delta.device).reshape(delta.shape)
    return keep(delta, draw < threshold)
