"""Exact k-th largest magnitude of task vectors, and the selection it stands for."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch

from pykernels import backends, check
from pykernels.cut import KEEP_ALL_EQUALS, Cut

DIGIT = 16
"""Bits of a key that one histogram round settles."""


def kth_magnitude(
    base: torch.Tensor | None, tuned: Sequence[torch.Tensor], density: float | Sequence[float]
) -> torch.Tensor:
    """The k-th largest |tuned - base| of every model, exact, without a task vector in memory.

    k = max(1, int(density * numel)), 0 for density 0 (Decision g of the package's method notes).

    Args:
        base: contiguous tensor [*S], or None when ``tuned`` holds task vectors already.
        tuned: 1 to 64 contiguous tensors [*S] of base's dtype.
        density: kept fraction in [0, 1], a number or one per model.

    Returns:
        Tensor [n], float32 (float64 for float64 inputs); +Inf where k = 0; NaN ranks above Inf; 0 for no
        elements.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    op = "kth_magnitude"
    like = check.tensors(op, base, tuned)
    k = counts(check.density(op, density, len(tuned)), like.numel())
    wide = like.dtype == torch.float64
    cut = backends.call(op, like)(base, list(tuned), k)
    for i in (i for i, count in enumerate(k) if count == like.numel() > 0):
        cut.key[i] = _smallest(base, tuned[i])
    values = [
        math.inf if count == 0 else _magnitude(key, wide) for key, count in zip(cut.key, k, strict=True)
    ]
    if like.numel() == 0:
        values = [0.0] * len(tuned)
    return torch.tensor(values, dtype=torch.float64 if wide else torch.float32, device=like.device)


def counts(density: Sequence[float], numel: int) -> list[int]:
    """k per model: int(density * numel) in binary64, at least 1 unless the density is 0."""
    return [0 if d == 0 else min(numel, max(1, int(d * numel))) for d in density]


def _smallest(base: torch.Tensor | None, tuned: torch.Tensor) -> int:
    """The smallest key of a model: what k = numel asks for, though its cut keeps all without a search."""
    key = 0
    for shift in range((64 if tuned.dtype == torch.float64 else 32) - DIGIT, -1, -DIGIT):
        bins = backends.call("magnitude_histogram", tuned)(base, [tuned], shift, [key])
        key = key << DIGIT | int(bins[0].nonzero()[0])
    return key


def _magnitude(key: int, wide: bool) -> float:
    if key > (0x7FF << 52 if wide else 0x7F800000):
        return math.nan
    value: float
    [value] = (
        struct.unpack("<d", struct.pack("<Q", key)) if wide else struct.unpack("<f", struct.pack("<I", key))
    )
    return value


class KthStatistic:
    """The selection of :func:`kth_magnitude` over chunks that come in any order.

    A chunk that is the whole scope is settled at once. Otherwise every round reads all chunks and settles
    one digit of 16 bits by an exact histogram; for the tie rule "index" one more round counts the equals of
    every chunk and a last one finds the flat index of the last equal to keep.
    """

    def __init__(self, density: Sequence[float], numel: int, tie: str) -> None:
        self.done = False
        self._k = counts(density, numel)
        self._numel = numel
        self._tie = tie
        self._shift = -1
        n = len(self._k)
        self._prefix: list[int] = [0] * n
        self._rank = list(self._k)  # rank among the keys that share the prefix, counted from the largest
        self._bins: torch.Tensor | None = None
        self._equals: dict[int, list[int]] = {}
        self._last = [KEEP_ALL_EQUALS] * n
        self._stage = "digits"
        self._wide: bool | None = None
        self._target: list[tuple[int, int]] = []  # per model: the chunk's offset, the rank among its equals

    def update(self, base: torch.Tensor | None, tuned: Sequence[torch.Tensor], offset: int) -> None:
        """Take in one chunk that starts at flat index ``offset`` of the scope."""
        if self.done or tuned[0].numel() == 0:
            return
        wide = tuned[0].dtype == torch.float64
        if self._wide not in (None, wide):
            raise ValueError("kth_magnitude: one scope must be float64 throughout or not at all")
        self._wide = wide
        if tuned[0].numel() == self._numel:
            cut = backends.call("kth_magnitude", tuned[0])(base, list(tuned), self._k)
            self._prefix, self.done = cut.key, True
            self._last = cut.last if self._tie == "index" else [KEEP_ALL_EQUALS] * len(self._k)
        elif self._stage == "digits":
            self._count_digit(base, tuned)
        elif self._stage == "equals":
            self._equals[offset] = [int((keys == p).sum()) for keys, p in self._keys(base, tuned)]
        else:
            self._locate(base, tuned, offset)

    def next_round(self) -> None:
        """Every chunk was seen once: settle the digit, or the ties."""
        if self.done:
            return
        if self._stage == "digits" and self._bins is not None:
            self._settle_digit(self._bins)
        elif self._stage == "equals":
            self._settle_ties()
        else:
            self.done = True

    def finish(self) -> Cut:
        """The cut per model; ``at(start)`` shifts it to the tensor that starts at ``start``."""
        empty = [k == 0 for k in self._k]
        return Cut(
            [2**63 - 1 if e else p for e, p in zip(empty, self._prefix, strict=True)],
            [-1 if e else last for e, last in zip(empty, self._last, strict=True)],
        )

    def _count_digit(self, base: torch.Tensor | None, tuned: Sequence[torch.Tensor]) -> None:
        if self._shift < 0:
            self._shift = (64 if tuned[0].dtype == torch.float64 else 32) - DIGIT
        histogram = backends.call("magnitude_histogram", tuned[0])
        bins = histogram(base, list(tuned), self._shift, self._prefix)
        self._bins = bins if self._bins is None else self._bins + bins

    def _settle_digit(self, bins: torch.Tensor) -> None:
        above = bins.flip(1).cumsum(1)  # how many keys have this digit or a larger one
        for i, rank in enumerate(self._rank):
            place = int(torch.searchsorted(above[i], max(rank, 1)))
            self._rank[i] = rank - int(above[i][place - 1] if place else 0)
            self._prefix[i] = (self._prefix[i] << DIGIT) | ((1 << DIGIT) - 1 - place)
        self._bins = None
        if self._shift:
            self._shift -= DIGIT
        elif self._tie == "index":
            self._stage = "equals"
        else:
            self.done = True

    def _settle_ties(self) -> None:
        self._stage = "locate"
        for i, rank in enumerate(self._rank):
            for offset in sorted(self._equals):
                if rank <= self._equals[offset][i]:
                    break
                rank -= self._equals[offset][i]
            self._target.append((offset, rank))

    def _locate(self, base: torch.Tensor | None, tuned: Sequence[torch.Tensor], offset: int) -> None:
        wanted = [i for i, (at, rank) in enumerate(self._target) if at == offset and rank > 0]
        if not wanted:
            return
        for i, (keys, prefix) in enumerate(self._keys(base, tuned)):
            if i in wanted:
                self._last[i] = offset + int(torch.nonzero(keys == prefix)[self._target[i][1] - 1])

    def _keys(
        self, base: torch.Tensor | None, tuned: Sequence[torch.Tensor]
    ) -> list[tuple[torch.Tensor, int]]:
        wide = tuned[0].dtype == torch.float64
        kind, bits = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
        zero = None if base is None else base.to(kind)
        deltas = (t.to(kind) if zero is None else t.to(kind) - zero for t in tuned)
        return [(d.abs().view(bits), p) for d, p in zip(deltas, self._prefix, strict=True)]
