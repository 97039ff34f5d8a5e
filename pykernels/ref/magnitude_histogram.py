"""One digit of a radix selection of |delta|: what a k-th magnitude over many chunks is made from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.ref.delta import delta, key

BINS = 65536


def magnitude_histogram(
    base: torch.Tensor | None, tuned: Sequence[torch.Tensor], shift: int, prefix: Sequence[int] | None
) -> torch.Tensor:
    """base [*S] or None, tuned n x [*S], prefix [n] or None -> counts [n, 65536], int64.

    Counts (key >> shift) & 0xFFFF over the keys whose bits above that digit equal the prefix (None: all).
    """
    return torch.stack(
        [
            _digits(key(delta(base, t)), shift, None if prefix is None else prefix[i])
            for i, t in enumerate(tuned)
        ]
    )


def _digits(keys: torch.Tensor, shift: int, prefix: int | None) -> torch.Tensor:
    keys = keys.reshape(-1) >> shift
    if prefix is not None:
        keys = keys[keys >> 16 == prefix]
    return torch.bincount(keys & (BINS - 1), minlength=BINS)
