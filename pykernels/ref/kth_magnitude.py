"""The selection of TIES-Merging (Yadav et al., 2023, section 3, step 1): the k largest |delta| per model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.cut import Cut
from pykernels.ref.delta import delta, key


def kth_magnitude(base: torch.Tensor | None, tuned: Sequence[torch.Tensor], k: Sequence[int]) -> Cut:
    """base [*S] or None, tuned n x [*S], k [n] -> key [n] of the k-th largest |delta|, and last [n].

    ``last`` is the flat index of the last one kept among its equals, lowest index first.

    k = 0 gives a key above all others and last -1; k >= numel gives key 0 and last numel - 1: all are kept.
    """
    cuts = [_cut(key(delta(base, t)).reshape(-1), count, t.dtype) for t, count in zip(tuned, k, strict=True)]
    return Cut([cut[0] for cut in cuts], [cut[1] for cut in cuts])


def none_kept(dtype: torch.dtype) -> tuple[int, int]:
    """The key and last of k = 0."""
    return (0x7FFF_FFFF_FFFF_FFFF if dtype == torch.float64 else 0xFFFF_FFFF), -1


def _cut(keys: torch.Tensor, k: int, dtype: torch.dtype) -> tuple[int, int]:
    if k <= 0:
        return none_kept(dtype)
    if k >= keys.numel():
        return 0, keys.numel() - 1
    kth = int(keys.sort(descending=True).values[k - 1])
    equals = torch.nonzero(keys == kth).reshape(-1)
    return kth, int(equals[k - int((keys > kth).sum()) - 1])
