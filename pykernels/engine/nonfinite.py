"""How many elements of a tensor are NaN or infinite."""

from __future__ import annotations

import torch

from pykernels import backends


def count_nonfinite(values: torch.Tensor) -> int:
    """Number of NaN and infinite elements of a 1-D floating-point tensor, at any alignment."""
    if backends.missing("cpu") is None:
        from pykernels import native

        return native.count_nonfinite(values)
    return values.numel() - int(torch.isfinite(values).sum())
