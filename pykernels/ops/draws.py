"""Random masks and rescale factors: what the DARE ops share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pykernels import backends
from pykernels.rows import add_blocks

RESCALE = ("density", "l1", None)
STEPS = 65536
"""A draw has 16 bits: densities are multiples of 1 / STEPS."""
LEAST = 1e-7
"""Norms below this are not divided by (mergekit)."""


def draw_threshold(density: float) -> int:
    """An entry is kept iff its 16-bit draw is below this: round(density * 65536)."""
    return round(density * STEPS)


def rescale_factor(threshold: int, rescale: str | None) -> float:
    """What "density" multiplies by: one over the realised density; 1 for the other rules."""
    return STEPS / threshold if rescale == "density" and threshold else 1.0


def mask_key(seed: int, name: str) -> int:
    """The 64-bit Philox key of a tensor: blake2b of seed (8 bytes, little endian) and name (UTF-8)."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class Factors:
    """Rescale factor per model that takes part: numbers, or a float64 tensor [n] on the device."""

    values: list[float] | torch.Tensor

    def at(self, start: int) -> Factors:
        """A tensor's own statistic: nothing to shift."""
        return self


class L1Statistic:
    """Sums of |delta| and of the kept |delta|, in float64 over a fixed tree, chunks in any order."""

    def __init__(self, taking: Sequence[int], threshold: list[int], key: int) -> None:
        self.done = False
        self._taking, self._threshold, self._key = list(taking), threshold, key
        self._blocks: dict[int, torch.Tensor] = {}
        self._on_device = False

    def update(self, base: torch.Tensor | None, tuned: Sequence[torch.Tensor], offset: int) -> None:
        """Take in one chunk that starts at flat index ``offset``, a multiple of 4096, of the tensor."""
        models = [tuned[i] for i in self._taking]
        norms = backends.call("l1_norms", tuned[0])
        self._on_device = backends.device_side("dare_merge", tuned[0])
        self._blocks[offset] = norms(base, models, self._threshold, self._taking, self._key, offset)

    def next_round(self) -> None:
        """One round is enough."""
        self.done = True

    def finish(self) -> Factors:
        """The factor that restores every model's L1 norm; 1 where a norm is below 1e-7 or not finite."""
        sums = add_blocks(torch.cat([self._blocks[offset] for offset in sorted(self._blocks)]))
        if self._on_device:
            return Factors(_ratios(sums))
        return Factors(
            [
                before / after if min(before, after) >= LEAST and math.isfinite(before) else 1.0
                for before, after in sums.tolist()
            ]
        )


def _ratios(sums: torch.Tensor) -> torch.Tensor:
    """The same on the device: sums [n, 2] before and after the drop -> factors [n]."""
    before, after = sums.unbind(1)
    usable = (torch.minimum(before, after) >= LEAST) & before.isfinite()
    return torch.where(usable, before / after, 1.0)
