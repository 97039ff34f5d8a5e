"""The selection by magnitude as a statistics pass: exact, over chunks that come in any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels import backends
from pykernels.cut import KEEP_ALL_EQUALS, Cut
from pykernels.ops.kth_magnitude import DIGIT, counts

NAN_KEY = 0x7FC0_0000
"""The key of the canonical NaN."""


class KthStatistic:
    """The selection of :func:`kth_magnitude` over chunks that come in any order.

    A chunk that is the whole scope is settled at once, and its cut stays on the device that made it.
    Otherwise every round reads all chunks and settles one digit of 16 bits by an exact histogram; for the tie
    rule "index" one more round counts the equals of every chunk and a last one finds the flat index of the
    last equal to keep.
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
        self._cut: Cut | None = None
        self._bins: dict[torch.device, torch.Tensor] = {}
        self._equals: dict[int, torch.Tensor] = {}
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
            self._cut, self.done = cut if self._tie == "index" else cut.keep_equals(), True
        elif self._stage == "digits":
            self._count_digit(base, tuned)
        elif self._stage == "equals":
            self._equals[offset] = torch.stack([(keys == p).sum() for keys, p in self._keys(base, tuned)])
        else:
            self._locate(base, tuned, offset)

    def next_round(self) -> None:
        """Every chunk was seen once: settle the digit, or the ties."""
        if self.done:
            return
        if self._stage == "digits" and self._bins:
            self._settle_digit()
        elif self._stage == "equals":
            self._settle_ties()
        else:
            self.done = True

    def finish(self) -> Cut:
        """The cut per model; ``at(start)`` shifts it to the tensor that starts at ``start``."""
        if self._cut is not None:
            return self._cut
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
        before = self._bins.get(bins.device)
        self._bins[bins.device] = bins if before is None else before + bins

    def _settle_digit(self) -> None:
        bins = torch.stack([bins.cpu() for bins in self._bins.values()]).sum(0)
        above = bins.flip(1).cumsum(1)  # how many keys have this digit or a larger one
        for i, rank in enumerate(self._rank):
            place = int(torch.searchsorted(above[i], max(rank, 1)))
            self._rank[i] = rank - int(above[i][place - 1] if place else 0)
            self._prefix[i] = (self._prefix[i] << DIGIT) | ((1 << DIGIT) - 1 - place)
        self._bins = {}
        if self._shift:
            self._shift -= DIGIT
        elif self._tie == "index":
            self._stage = "equals"
        else:
            self.done = True

    def _settle_ties(self) -> None:
        self._stage = "locate"
        equals = {offset: counted.tolist() for offset, counted in sorted(self._equals.items())}
        for i, rank in enumerate(self._rank):
            for at in equals:
                if rank <= equals[at][i]:
                    break
                rank -= equals[at][i]
            self._target.append((at, rank))

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
        keys = [d.abs().view(bits) for d in deltas]
        if backends.device_side("magnitude_histogram", tuned[0]):  # where all NaN have one key
            keys = [k.clamp(max=NAN_KEY) for k in keys]
        return list(zip(keys, self._prefix, strict=True))
