"""Timing on a device by events around replayed graphs, and on the host where a test stands in for one.

A graph holds several calls on rotating inputs, so that launches cost what they cost inside a program. Before
each sample a large read empties the second-level cache of what the last one left there, and keeps the device
busy while the host puts the sample into the queue: its events then enclose the sample and no waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

_FLUSH_BYTES = 512 << 20

Call = Callable[[], object]


class Clock(Protocol):
    """Seconds of work on one device."""

    device: torch.device
    cache: int
    """Bytes of the second-level cache."""

    def capture(self, calls: Call) -> Call:
        """The same work, ready to be replayed at the least cost; it was run before, to compile and load."""

    def seconds(self, call: Call) -> float:
        """How long one call takes, from a cold second-level cache."""

    def free(self) -> int:
        """Bytes of the device's memory that nobody holds."""


class CudaClock:
    """Graphs and events on a CUDA device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.randint(1, 1 << 30, (_FLUSH_BYTES // 4,), dtype=torch.int32, device=device)
        self._sum = torch.empty((), dtype=torch.int64, device=device)

    def capture(self, calls: Call) -> Call:
        """Warmed up on a stream of its own, as graphs must be.

        A graph knows addresses alone: what ``calls`` holds must live as long. A capture that fails leaves
        torch on the graph's stream, and here it goes back.
        """
        here = torch.cuda.current_stream(self.device)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            calls()
            calls()
        here.wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(here), torch.cuda.graph(graph):
            calls()
        return partial(_replay, graph, calls)

    def seconds(self, call: Call) -> float:
        """By two events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(self._flush, dim=0, out=self._sum)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def free(self) -> int:
        """As the driver counts, with what torch only caches."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


def _replay(graph: torch.cuda.CUDAGraph, held: Call) -> None:
    graph.replay()


class HostClock:
    """The same on the CPU: nothing is captured, nothing flushed."""

    device = torch.device("cpu")
    cache = 0

    def capture(self, calls: Call) -> Call:
        """Run once, to compile."""
        calls()
        return calls

    def seconds(self, call: Call) -> float:
        """By the wall."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def free(self) -> int:
        """A number that stands for plenty."""
        return 1 << 40


def clock_of(device: str) -> Clock:
    """The clock of "cuda", "cuda:1" or "cpu"."""
    return HostClock() if device == "cpu" else CudaClock(torch.device(device))
