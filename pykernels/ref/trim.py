"""TIES-Merging (Yadav et al., 2023, section 3, step 1): keep the largest entries of a task vector."""

from __future__ import annotations

import torch

from pykernels.cut import Cut
from pykernels.ref.delta import delta as widen
from pykernels.ref.delta import key


def trim(delta: torch.Tensor, cut: Cut, offset: int = 0) -> torch.Tensor:
    """delta [*S], one model's cut -> delta where kept, 0 elsewhere [*S], float64; a NaN stays, kept or not.

    ``offset`` is the flat index of delta's first element in the tensor that ``cut`` speaks of.
    """
    wide = widen(None, delta)
    return keep(wide, kept(wide, int(cut.key[0]), int(cut.last[0]), offset)).double()


def kept(delta: torch.Tensor, kth: int, last: int, offset: int) -> torch.Tensor:
    """Which entries [*S] have a key above ``kth``, or equal to it at a flat index up to ``last``."""
    keys = key(delta)
    index = torch.arange(offset, offset + keys.numel(), device=keys.device).reshape(keys.shape)
    return (keys > kth) | ((keys == kth) & (index <= last))


def keep(delta: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """delta where ``mask``, 0 elsewhere; a NaN stays, so that it reaches the result."""
    return delta.where(mask | delta.isnan(), torch.zeros_like(delta))
