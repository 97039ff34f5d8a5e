"""A merge on devices as seen from the loop that writes files in their order: ``Compute``, but somewhere else.

Bytes: every input once from its file to the device (statistics of tensors beyond the device's memory again),
every output once back, straight into the writer's ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import reduce
from typing import Any

import torch

from pykernels.engine.arena import HUGE, Arena, PinnedArena
from pykernels.engine.compute import Budget, Compute, Sink
from pykernels.engine.device import Accelerator
from pykernels.engine.files import TORCH_DTYPE
from pykernels.engine.gathered import cut
from pykernels.engine.lane import Held, Lane
from pykernels.engine.loads import ALIGN
from pykernels.engine.mapped import Inputs
from pykernels.engine.passes import input_width, model_statistic
from pykernels.engine.schedule import (
    RING,
    STAGES,
    DeviceBudget,
    deal,
    model_survey,
    on_device,
    schedule,
)
from pykernels.engine.station import Board, Busy, Station, Stopped
from pykernels.engine.units import Output, Plan
from pykernels.methods import METHODS


class Offload:
    """Runs a plan's outputs on devices, with ``Compute``'s calls: ``survey``, then ``run`` in file order.

    ``close`` must be called, whatever happened. ``done`` hears on the calling thread how much was moved.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Inputs,
        budget: DeviceBudget,
        devices: Sequence[Accelerator],
        done: Callable[[int, str], None],
    ) -> None:
        """Raises ValueError when a device has not the memory that it said was free."""
        self._plan = plan
        self._inputs = inputs
        self._piece = budget.piece
        self._adapters = budget.adapters
        self._done = done
        self._units = schedule(plan, budget)
        survey = model_survey(plan, budget) if model_statistic(plan) is not None else None
        self._surveyed = survey if self._on_devices(plan.segment()) else None
        loads = [
            load for u in (*self._units, *([survey] if survey else [])) for load in (*u.survey, *u.loads)
        ]
        largest = max((load.nbytes for load in loads), default=0)
        self.ring = min(budget.room, 2 * largest + budget.unit, sum(load.nbytes for load in loads) or ALIGN)
        self._board = Board()
        self._lanes: list[Lane] = []
        self._order: Iterator[int] = iter(())
        self._batched = {
            p.number for u in self._units for load in u.loads if len(load.parts) > 1 for p in load.parts
        }
        self._waiting: dict[int, torch.Tensor] = {}
        self._host = Compute(plan, inputs, Budget(budget.piece, 0, 0), done)
        self._stations = [Station(device, self.ring, STAGES, budget.piece) for device in devices]
        self._arena = PinnedArena(devices[0].pinned(max(RING * budget.piece, HUGE)))
        self._small = devices[0].pinned(budget.piece)

    def arena(self) -> Arena:
        """Memory to write outputs from, which devices copy to."""
        return self._arena

    def reads(self) -> Sequence[Output]:
        """What is read on the calling thread: copies, and what the CPU merges."""
        return [out for out in self._plan.outputs if not on_device(out, self._adapters)]

    def survey(self) -> None:
        """Scope "model": the passes over all merged tensors, on the first device; then everything starts."""
        stats: Any = None
        if self._surveyed is not None:
            lane = self._lane(0, [self._surveyed], None)
            self._lanes.append(lane)
            stats = self._wait(lane.survey)
            lane.join()
        else:
            self._host.survey()
            stats = self._host.model_stats
        # A statistic that saw all of its scope at once may lie on the device that found it.
        seen = [part for load in self._surveyed.survey for part in load.parts] if self._surveyed else []
        count = 1 if len(seen) == 1 else len(self._stations)
        places = deal(self._units, count)
        self._order = (at for at, unit in zip(places, self._units, strict=True) for _ in unit.loads)
        shared = [[u for u, at in zip(self._units, places, strict=True) if at == i] for i in range(count)]
        self._lanes = [self._lane(i, units, stats) for i, units in enumerate(shared)]

    def run(self, index: int, out: Output, sink: Sink) -> None:
        """Output number ``index`` of the plan, into ``sink``."""
        if not on_device(out, self._adapters):
            self._host.run(index, out, sink)
        elif index in self._batched:
            self._run_small(index, out, sink)
        else:
            done = 0
            while done < out.numel:
                done += self._run_load(index, out, sink)

    def busy(self) -> Busy:
        """How long each part worked; of several devices the longest."""
        return reduce(Busy.worst, (station.busy for station in self._stations))

    def close(self) -> None:
        """Stop all threads and wait for what the devices still do."""
        self._board.stop()
        for lane in self._lanes:
            lane.join()
        for station in self._stations:
            with suppress(RuntimeError):  # a device that failed has said so before
                station.device.synchronize()

    def _on_devices(self, segment: Sequence[Output]) -> bool:
        """Whether scope "model" spans no tensor that is the CPU's."""
        return all(on_device(out, self._adapters) for out in segment if out.numel)

    def _lane(self, at: int, units: Sequence[Any], stats: Any) -> Lane:
        method = METHODS[self._plan.method]
        return Lane(self._stations[at], units, self._inputs, method, self._board, stats)

    def _wait(self, what: Callable[[], Any]) -> Any:
        """What a lane gives; raises what went wrong on any thread."""
        try:
            return what()
        except Stopped:
            if self._board.failure is None:
                raise
        raise self._board.failure

    def _fetch(self) -> tuple[int, Held]:
        at = next(self._order)
        held: Held = self._wait(self._lanes[at].fetch)
        return at, held

    def _run_load(self, index: int, out: Output, sink: Sink) -> int:
        """The next load of a tensor, a piece at a time; the number of its elements."""
        at, held = self._fetch()
        [part], [place] = held.load.parts, held.load.places
        dtype = TORCH_DTYPE[out.dtype]
        step = self._piece // dtype.itemsize
        for first in range(0, part.count, step):
            count = min(step, part.count - first)
            last = part.first + first + count == out.numel
            target = sink.reserve(count * dtype.itemsize, dtype, index, last=last)
            source = cut(held.region, place.out + first * dtype.itemsize, count, dtype)
            self._stations[at].download(target, source)
            self._done(count * (dtype.itemsize + input_width(out)), out.name)
        self._lanes[at].give_back(held)
        return part.count

    def _run_small(self, index: int, out: Output, sink: Sink) -> None:
        """One of many that were merged together: they wait in host memory for their places in the file."""
        if index not in self._waiting:
            at, held = self._fetch()
            kept = self._small[: held.load.nbytes - held.load.outs]
            self._stations[at].download(kept, held.region[held.load.outs :])
            self._lanes[at].give_back(held)
            for part, place in zip(held.load.parts, held.load.places, strict=True):
                dtype = TORCH_DTYPE[part.out.dtype]
                self._waiting[part.number] = cut(kept, place.out - held.load.outs, part.count, dtype)
        values = self._waiting.pop(index)
        sink.reserve(out.nbytes, values.dtype, index, last=True).copy_(values)
        self._done(out.nbytes + sum(source.nbytes for source in out.sources), out.name)
