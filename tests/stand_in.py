"""A device in host memory: the pipeline's threads, copies and budgets without a GPU.

Copies are done late, by a thread per direction, so that whoever does not wait for one reads poison; all
memory that is handed out is counted.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import pytest
import torch

from pykernels.engine import target


class Late:
    """A copy that happens some time; ``wait`` raises what went wrong in it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._happened = Event()
        self._seconds = 0.0
        self._error: Exception | None = None

    def run(self) -> None:
        """Do it."""
        start = time.perf_counter()
        try:
            self._work()
        except Exception as error:
            self._error = error
        self._seconds = time.perf_counter() - start
        self._happened.set()

    def wait(self) -> float:
        """As a Mark."""
        assert self._happened.wait(20), "a copy never happened"
        if self._error is not None:
            raise self._error
        return self._seconds


class Queue:
    """Work in its order, on its own thread, each piece ``late`` seconds after it was asked for."""

    def __init__(self, late: float) -> None:
        self._late = late
        self._work: SimpleQueue[Late] = SimpleQueue()
        Thread(target=self._run, daemon=True).start()

    def put(self, work: Callable[[], None]) -> Late:
        """Ask for ``work``."""
        asked = Late(work)
        self._work.put(asked)
        return asked

    def _run(self) -> None:
        while True:
            asked = self._work.get()
            time.sleep(self._late)
            asked.run()


class StandIn:
    """An Accelerator of ``memory`` bytes. ``fault`` hears what it does, before it does it."""

    def __init__(
        self,
        index: int = 0,
        memory: int = 1 << 30,
        late: float = 0.0,
        fault: Callable[[str], None] | None = None,
    ) -> None:
        self.name = f"cuda:{index}"
        self.model = "host memory"
        self.torch_device = torch.device("cpu")
        self.allocated: list[int] = []
        self.page_locked: list[int] = []
        self.uploaded = self.merges = 0
        self._memory = memory
        self._fault = fault or (lambda stage: None)
        self._up, self._down = Queue(late), Queue(late)

    def free(self) -> int:
        """What is not handed out."""
        return self._memory - sum(self.allocated)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Poisoned memory."""
        self.allocated.append(nbytes)
        return _pages(nbytes)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Poisoned memory of a size that a device takes."""
        assert nbytes & (nbytes - 1) == 0, f"{nbytes} is no power of two"
        self.page_locked.append(nbytes)
        return _pages(nbytes)

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> Late:
        """Later."""
        assert target.dtype == source.dtype == torch.uint8 and target.data_ptr() % 16 == 0
        self.uploaded += target.numel()

        def copy() -> None:
            self._fault("upload")
            target.copy_(source)
            source.fill_(0xFF)  # whoever still needs the buffer has reused it too early

        return self._up.put(copy)

    def merge(self, work: Callable[[], None], after: Late) -> float:
        """Now, on the calling thread."""
        after.wait()
        self._fault("merge")
        self.merges += 1
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def download(self, target: torch.Tensor, source: torch.Tensor) -> Late:
        """Later."""
        assert target.dtype == source.dtype and target.numel() == source.numel()

        def copy() -> None:
            self._fault("download")
            target.copy_(source)

        return self._down.put(copy)

    def synchronize(self) -> None:
        """Wait for both directions."""
        self._fault("synchronize")
        for queue in (self._up, self._down):
            queue.put(lambda: None).wait()


def install(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[StandIn]:
    """Make "cuda:0" and "cuda:1" of the Python function stand-ins; no option of the command line does."""
    made = [StandIn(i, **options) for i in range(2)]
    monkeypatch.setattr(target, "open_devices", lambda device: made[: device.count("cuda")])
    return made


def _pages(nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).fill_(0xFF)
