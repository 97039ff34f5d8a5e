"""The device that tests of GPU ops run on, and data that lies there."""

from __future__ import annotations

import torch

from tests import cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make(data: str, numel: int, models: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(base, tuned) of :func:`tests.cases.make`, on the device."""
    base, tuned = cases.make(data, numel, models, dtype)
    return base.to(DEVICE), [t.to(DEVICE) for t in tuned]
