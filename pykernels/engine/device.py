"""The devices that a merge runs on: chosen by name, and all that it asks of one: memory, copies, order, time.

The pipeline knows a device only as an ``Accelerator``, so it runs the same on anything that is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from pykernels.engine.files import shown


class Mark(Protocol):
    """Something that was asked of a device and may not have happened yet."""

    def wait(self) -> float:
        """Return when it has happened: seconds that it took the device."""


class Accelerator(Protocol):
    """One device with three queues, for copies up, merges and copies down; each keeps its order.

    Host memory of copies comes from ``pinned`` and must not be touched before the copy's mark was waited for.
    """

    name: str
    model: str
    torch_device: torch.device

    def free(self) -> int:
        """Bytes of its memory that nobody has taken."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """``nbytes`` bytes on the device from a multiple of 256 on. Raises ValueError: it has not as many."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """``nbytes`` bytes of host memory that the device copies from and to; they begin at a page."""

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> Mark:
        """Copy ``source`` (pinned) to ``target`` (on the device), both uint8 and of one length."""

    def merge(self, work: Callable[[], None], after: Mark) -> float:
        """Run ``work`` once ``after`` has happened and wait for its end: seconds that it took the device."""

    def download(self, target: torch.Tensor, source: torch.Tensor) -> Mark:
        """Copy ``source`` (on the device) to ``target`` (pinned), both of one dtype and length."""

    def synchronize(self) -> None:
        """Wait for all that was asked of it."""


class _Lap:
    """A stretch of one stream, between two events."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        # "blocking" lets the waiting thread sleep: the cores are for those who read and write.
        self._start, self.end = (_event(), _event())
        self._start.record(stream)

    def stop(self) -> _Lap:
        self.end.record(self._stream)
        return self

    def wait(self) -> float:
        self.end.synchronize()
        return float(self._start.elapsed_time(self.end)) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Cuda:
    """A CUDA device as an Accelerator: three streams, timed by events."""

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)
        self.model = str(torch.cuda.get_device_name(self.torch_device))
        self._up, self._compute, self._down = (_stream(self.torch_device) for _ in range(3))

    def free(self) -> int:
        """Bytes of its memory that nobody has taken; what torch only caches counts as free."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(
            self.torch_device
        )
        return int(free) + int(cached)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """``nbytes`` bytes on the device. Raises ValueError when it has not as many in one piece."""
        # On the stream that merges, so that the allocator never has to make that stream wait for another.
        try:
            with torch.cuda.stream(self._compute):
                return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError:
            told = f"could not give {nbytes} bytes in one piece, {self.free()} are free"
            raise ValueError(f"device_memory: {self.name} {told}") from None

    def pinned(self, nbytes: int) -> torch.Tensor:
        """``nbytes`` bytes of page-locked host memory (a power of two: torch takes no other size)."""
        with torch.cuda.device(self.torch_device):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True, device="cpu")

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> Mark:
        """Copy up, on the first stream."""
        return self._copy(self._up, target, source)

    def merge(self, work: Callable[[], None], after: Mark) -> float:
        """Run ``work`` on the second stream, after an upload."""
        if not isinstance(after, _Lap):
            raise TypeError(f"{self.name}: a merge follows an upload to the same device, got {after!r}")
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(after.end)
            lap = _Lap(self._compute)
            work()
            lap.stop()
        return lap.wait()

    def download(self, target: torch.Tensor, source: torch.Tensor) -> Mark:
        """Copy down, on the third stream."""
        return self._copy(self._down, target, source)

    def synchronize(self) -> None:
        """Wait for all three streams."""
        for stream in (self._up, self._compute, self._down):
            stream.synchronize()

    def _copy(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> Mark:
        with torch.cuda.stream(stream):
            lap = _Lap(stream)
            target.copy_(source, non_blocking=True)
            return lap.stop()


def open_devices(device: str) -> list[Accelerator]:
    """The devices of "cuda", "cuda:1" or "cuda:0,cuda:1"; none for "cpu".

    Raises ValueError for a name that is none of these, for a device that is named twice or not there, and
    where torch cannot use CUDA at all; the text says why.
    """
    if device == "cpu":
        return []
    names = [name.strip() for name in device.split(",")] if isinstance(device, str) else []
    if not names or not all(name == "cuda" or _index(name) is not None for name in names):
        raise ValueError(f'device must be "cpu", "cuda", or such as "cuda:0,cuda:1", got {shown(device)}')
    if why := cuda_missing():
        raise ValueError(f"device {device}: {why}")
    count = torch.cuda.device_count()
    indices: list[int] = []
    for name in names:
        index = _index(name)
        index = torch.cuda.current_device() if index is None else index
        if index >= count:
            raise ValueError(f"device {device}: there is no cuda:{index}, the devices are {_listed(count)}")
        if index in indices:
            raise ValueError(f"device {device}: cuda:{index} is named twice")
        indices.append(index)
    return [Cuda(index) for index in indices]


def cuda_missing() -> str | None:
    """Why torch cannot use CUDA here, or None when it can."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA; merge with device cpu"
    if not torch.cuda.is_available():
        try:
            # Finds the words: no driver, too old a driver, no device.
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            return f"torch finds no CUDA device: {str(error).strip().splitlines()[0]}"
        return "torch finds no CUDA device"
    return None


def _index(name: str) -> int | None:
    kind, _, index = name.partition(":")
    return int(index) if kind == "cuda" and index.isascii() and index.isdigit() and len(index) < 6 else None


def _listed(count: int) -> str:
    return ", ".join(f"cuda:{i}" for i in range(count)) or "none"
