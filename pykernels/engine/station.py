"""One device with the memory that a merge holds for it, allocated once: a ring there, pinned buffers here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from threading import Condition
from typing import TypeVar

import torch

from pykernels.engine.device import Accelerator, Mark
from pykernels.engine.loads import ALIGN, Load, read_bytes
from pykernels.engine.mapped import Inputs

T = TypeVar("T")


class Stopped(Exception):
    """The pipeline was stopped while a thread waited for something."""


class Board:
    """Where all threads of a pipeline wait, so that a failure of one reaches every other."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._stopped = False
        self._changed = Condition()

    def wait(self, ready: Callable[[], T | None]) -> T:
        """What ``ready`` gives, once that is not None; it is called under the lock. Raises Stopped."""
        with self._changed:
            while not self._stopped:
                if (value := ready()) is not None:
                    return value
                self._changed.wait()
        raise Stopped

    @contextmanager
    def change(self) -> Iterator[None]:
        """Change inside the block what others wait for."""
        with self._changed:
            yield
            self._changed.notify_all()

    def stop(self, failure: BaseException | None = None) -> None:
        """No thread waits any more; the first ``failure`` is kept."""
        with self.change():
            self._stopped = True
            self.failure = self.failure or failure


@dataclass
class Busy:
    """Seconds that the parts of a pipeline worked. They overlap: the longest is what limits it."""

    reading: float = 0.0
    copying_up: float = 0.0
    merging: float = 0.0
    copying_down: float = 0.0
    writing: float = 0.0

    def worst(self, other: Busy) -> Busy:
        """The longer of two for every part: devices work beside each other."""
        return Busy(*map(max, self.parts().values(), other.parts().values()))

    def parts(self) -> dict[str, float]:
        """Seconds by the names that people read."""
        return {f.name.replace("_", " "): getattr(self, f.name) for f in fields(Busy)}

    def limit(self) -> str:
        """The part that worked longest."""
        return max(self.parts().items(), key=lambda item: item[1])[0]


class Regions:
    """Ranges of a ring that are in use. They are taken in order and may be given back in any."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._next = 0
        self._taken: dict[int, int] = {}

    def take(self, nbytes: int) -> int | None:
        """The start of ``nbytes`` free bytes, or None as long as there are none."""
        at = self._next if self._taken else 0
        start = at if at + nbytes <= self._size else 0
        if any(low < start + nbytes and start < high for low, high in self._taken.items()):
            return None
        self._taken[start] = start + nbytes
        self._next = -(-(start + nbytes) // ALIGN) * ALIGN
        return start

    def give_back(self, start: int) -> None:
        """The range that begins at ``start`` is free again."""
        del self._taken[start]


class Station:
    """A device, ``ring`` bytes of its memory, ``stages`` pinned buffers of ``piece`` bytes to fill those."""

    def __init__(self, device: Accelerator, ring: int, stages: int, piece: int) -> None:
        self.device = device
        self.memory = device.allocate(ring)
        self.regions = Regions(ring)
        self.busy = Busy()
        self._piece = piece
        self._buffers = device.pinned(stages * piece)
        self._marks: list[Mark | None] = [None] * stages
        self._turn = 0

    def upload(self, load: Load, region: torch.Tensor, inputs: Inputs) -> Mark:
        """Read a load from its files and copy it up, a buffer at a time; the mark of the last copy.

        Buffers are images of the region, so thousands of small tensors take no more copies than a large one.
        """
        for start, end, held in load.windows(self._piece):
            buffer = self._next_buffer()
            began = time.perf_counter()
            for part in held:
                at = part.at - start
                buffer[at : at + part.nbytes].copy_(read_bytes(inputs, part))
            self.busy.reading += time.perf_counter() - began
            last = self._marks[self._turn] = self.device.upload(region[start:end], buffer[: end - start])
            self._turn = (self._turn + 1) % len(self._marks)
        return last

    def settle(self) -> None:
        """Wait for the copies that are still on their way, and count them."""
        for turn, mark in enumerate(self._marks):
            if mark is not None:
                self._marks[turn] = None
                self.busy.copying_up += mark.wait()

    def download(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy down, and wait for it."""
        self.busy.copying_down += self.device.download(target, source).wait()

    def _next_buffer(self) -> torch.Tensor:
        mark, self._marks[self._turn] = self._marks[self._turn], None
        if mark is not None:
            self.busy.copying_up += mark.wait()
        return self._buffers[self._turn * self._piece : (self._turn + 1) * self._piece]
