"""Two threads per device: one reads and copies up, one merges. Results wait on the device to be fetched."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

import torch

from pykernels.engine.device import Mark
from pykernels.engine.files import TORCH_DTYPE
from pykernels.engine.gathered import Held as Lying
from pykernels.engine.gathered import cut, gather
from pykernels.engine.loads import Load, Part, Place
from pykernels.engine.mapped import Inputs
from pykernels.engine.passes import common_dtype, merge_whole
from pykernels.engine.prefetch import Prefetcher
from pykernels.engine.schedule import Unit
from pykernels.engine.station import Board, Station, Stopped
from pykernels.engine.units import Adapted, Source
from pykernels.grouping import alone, grouped
from pykernels.methods import Method

T = TypeVar("T")


@dataclass(frozen=True)
class Held:
    """A load in its region of the device's ring; ``mark``: its last copy up."""

    load: Load
    start: int
    region: torch.Tensor
    mark: Mark


class Lane:
    """Runs the units of one device in their order. ``stats``: what scope "model" found out before, or None.

    Deadlock is impossible as long as loads are fetched and given back in order: a thread waits only for room
    that earlier loads hold, and for loads that come earlier.
    """

    def __init__(
        self,
        station: Station,
        units: Sequence[Unit],
        inputs: Inputs,
        method: Method,
        board: Board,
        stats: Any,
    ) -> None:
        self._station = station
        self._units = units
        self._inputs = inputs
        self._method = method
        self._board = board
        self._stats = stats
        self._arrived: deque[Held] = deque()
        self._merged: deque[Held] = deque()
        self._verdicts: deque[bool] = deque()
        self._surveys: deque[tuple[Any]] = deque()
        self._prefetcher = Prefetcher([load for unit in units for load in unit.survey or unit.loads], inputs)
        self._threads = [
            # A forced backend is a context variable, and a new thread would begin without it.
            Thread(target=copy_context().run, args=(self._guard, work), name=f"pykernels-{name}", daemon=True)
            for name, work in (("read", self._read), ("merge", self._merge))
        ]
        for thread in self._threads:
            thread.start()

    def fetch(self) -> Held:
        """The next merged load, in the order of the units. Raises Stopped."""
        return self._take(self._merged)

    def survey(self) -> Any:
        """What the next unit without loads found out. Raises Stopped."""
        return self._take(self._surveys)[0]

    def give_back(self, held: Held) -> None:
        """The load's memory is free again."""
        with self._board.change():
            self._station.regions.give_back(held.start)

    def join(self) -> None:
        """Return when both threads have ended: their work is done, or the board was stopped."""
        for thread in self._threads:
            thread.join()
        self._prefetcher.stop()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Stopped:
            pass
        except BaseException as error:  # raised again on the calling thread
            self._board.stop(error)

    def _take(self, queue: deque[T]) -> T:
        return self._board.wait(lambda: queue.popleft() if queue else None)

    def _put(self, queue: deque[T], item: T) -> None:
        with self._board.change():
            queue.append(item)

    def _read(self) -> None:
        for unit in self._units:
            fresh, settled = True, not unit.survey
            while not settled:
                for load in unit.survey:
                    self._up(load, fresh)
                fresh, settled = False, self._take(self._verdicts)
            for load in unit.loads:
                self._up(load, fresh)
        self._station.settle()

    def _up(self, load: Load, fresh: bool) -> None:
        start = self._board.wait(lambda: self._station.regions.take(load.nbytes))
        region = self._station.memory[start : start + load.nbytes]
        mark = self._station.upload(load, region, self._inputs)
        self._put(self._arrived, Held(load, start, region, mark))
        if fresh:
            self._prefetcher.advance(load)

    def _merge(self) -> None:
        for unit in self._units:
            stats = self._survey(unit) if unit.survey else None
            if not unit.loads:
                self._put(self._surveys, (stats,))
            for _ in unit.loads:
                held = self._take(self._arrived)
                self._run(held, self._merge_part, stats)
                self._put(self._merged, held)

    def _survey(self, unit: Unit) -> Any:
        """Round by round over the unit's chunks, until its statistic is settled."""
        total = sum(part.count for load in unit.survey for part in load.parts)
        statistic: Any = self._method.statistic(unit.survey[0].parts[0].out.params, total)
        while not statistic.done:
            for _ in unit.survey:
                held = self._take(self._arrived)
                self._run(held, self._observe, statistic)
                self.give_back(held)
            # In the queue of the merges: what it computes on the device, they read.
            self._station.busy.merging += self._station.device.merge(statistic.next_round, held.mark)
            self._put(self._verdicts, statistic.done)
        found: list[Any] = []
        self._station.device.merge(lambda: found.append(statistic.finish()), held.mark)
        return found[0]

    def _run(self, held: Held, work: Callable[[Part, torch.Tensor, Place, Any], None], extra: Any) -> None:
        def all_parts() -> None:
            with alone(), grouped():  # small tensors of one load share launches, and no other's
                for part, place in zip(held.load.parts, held.load.places, strict=True):
                    work(part, held.region, place, extra)

        self._station.busy.merging += self._station.device.merge(all_parts, held.mark)

    def _observe(self, part: Part, region: torch.Tensor, place: Place, statistic: Any) -> None:
        statistic.update(*_inputs(part, region, place), part.at)

    def _merge_part(self, part: Part, region: torch.Tensor, place: Place, stats: Any) -> None:
        out, p, method = part.out, part.out.params, self._method
        target = cut(region, place.out, part.count, TORCH_DTYPE[out.dtype])
        if out.action == "adapt":
            return _adapt(part, region, place.sources[0], target)
        base, tuned = _inputs(part, region, place)
        if stats is None and self._stats is not None:
            stats = self._stats.at(out.flat or 0)
        if stats is None and part.count == out.numel:
            merge_whole(method, p, target, base, tuned)
        else:
            method.merge(p, target, base, tuned, part.first, stats)


def _inputs(part: Part, region: torch.Tensor, place: Place) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Base and tuned tensors in one dtype: as they were copied up, or widened where dtypes differ."""
    common = common_dtype(part.out.sources)
    read = []
    for source, held, wide in zip(part.out.sources, place.sources, place.wide, strict=True):
        raw = _elements(part, region, source, held)
        read.append(raw if wide is None else cut(region, wide, part.count, common).copy_(raw))
    return (read[0], read[1:]) if part.out.base else (None, read)


def _elements(
    part: Part, region: torch.Tensor, source: Source, held: Lying, out: torch.Tensor | None = None
) -> torch.Tensor:
    """A part's elements of a source, as they were copied up or made of that; adapters may fill ``out``."""
    if isinstance(source, Adapted):
        return gather(region, held, source, part.first, part.count, out)
    return cut(region, held[0][1], part.count, TORCH_DTYPE[source.dtype])


def _adapt(part: Part, region: torch.Tensor, held: Lying, target: torch.Tensor) -> None:
    """The one source of an output that is no merge, in whole rows."""
    source = part.out.sources[0]
    if source.dtype == part.out.dtype:
        _elements(part, region, source, held, target)
    else:
        target.copy_(_elements(part, region, source, held))
