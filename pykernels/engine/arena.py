"""The memory that outputs are computed into: one ring of huge pages, used again and again.

A first touch of fresh memory costs four to six times a store into a page that was used before, so nothing
here is allocated per tensor.
"""

from __future__ import annotations

import mmap
from collections import deque
from threading import Condition
from typing import Any

import torch

HUGE = 2 << 20


class Arena:
    """``size`` bytes of private memory that begin at a multiple of 2 MiB, advised to be huge pages."""

    def __init__(self, nbytes: int) -> None:
        self.size = -(-nbytes // HUGE) * HUGE
        self._map: Any = mmap.mmap(-1, self.size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._start = -torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr() % HUGE
        self.view = memoryview(self._map)[self._start : self._start + self.size]

    def tensor(self, at: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        """``nbytes`` bytes from ``at`` on as a 1-D tensor of ``dtype``, at any alignment."""
        count = nbytes // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._start + at)


class PinnedArena(Arena):
    """A ring in memory that devices copy to directly; ``memory``: uint8, from a page's beginning on."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.size = memory.numel()
        self._map = memory.numpy()
        self._start = 0
        self.view = memoryview(self._map)


class InFlight:
    """Ranges of the ring that the writer has not finished with, oldest first."""

    def __init__(self) -> None:
        self._ranges: deque[tuple[int, int]] = deque()
        self._changed = Condition()

    def add(self, start: int, end: int) -> None:
        """``start`` to ``end`` now belongs to the writer."""
        with self._changed:
            self._ranges.append((start, end))

    def done(self) -> None:
        """The writer is through with the oldest range."""
        with self._changed:
            self._ranges.popleft()
            self._changed.notify()

    def wait(self, start: int, end: int) -> None:
        """Return when ``start`` to ``end`` is free again. An interrupt gets through."""
        with self._changed:
            while not self.is_free(start, end):
                self._changed.wait()

    def is_free(self, start: int, end: int) -> bool:
        """Whether the writer has nothing to do with ``start`` to ``end``."""
        return not any(low < end and start < high for low, high in tuple(self._ranges))
