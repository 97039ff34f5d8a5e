"""In which units a merge on devices goes, in which order, on which device, and what the budgets allow.

Nothing here touches a device: a schedule follows from the plan and the budgets alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pykernels import grouping
from pykernels.adapters.change import ADD
from pykernels.engine.compute import check_memory
from pykernels.engine.files import TORCH_DTYPE
from pykernels.engine.loads import ALIGN, Load, Part, most_bytes, place, scratch_of, widened
from pykernels.engine.passes import BLOCK, chunks, common_dtype, input_width, is_adapted, model_statistic
from pykernels.engine.units import Adapted, Output, Plan
from pykernels.methods import METHODS

STAGES = 4
"""Pinned buffers of a reading thread: one is filled while the others are on their way."""
RING = 4
"""Pieces that the writer's ring holds."""
PIECE, LEAST_PIECE = 32 << 20, 1 << 20
UNIT = 128 << 20
"""Bytes on a device: an upload of two to three milliseconds, far longer than what starting it costs."""
SCRATCH = 16 << 10
"""Bytes per model that a selection may take of a device for the tiniest tensor; a batch is charged for it."""


@dataclass(frozen=True)
class Unit:
    """What one device does without a break: loads that are only looked at, round by round, then merges.

    ``survey`` is empty unless a statistic needs more than is on the device at once. Its chunks are read again
    every round, and again to be merged.
    """

    loads: tuple[Load, ...]
    survey: tuple[Load, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that go through the device, by which units are dealt."""
        return sum(load.nbytes for load in (*self.survey, *self.loads))


@dataclass(frozen=True)
class DeviceBudget:
    """How two budgets are shared out: ``memory`` bytes of the host, ``device_memory`` bytes of every device.

    Half of ``memory`` is for pinned buffers of ``piece`` bytes: ``STAGES`` per device to read into, ``RING``
    (at least 2 MiB) to write from, one for small outputs that wait for their place in the file. The other
    half is for tensors that the CPU merges (float64) and for what Python takes.

    ``room``, three quarters of ``device_memory``, holds inputs and outputs, in a ring. A quarter is left to
    the kernels' scratch: a selection takes up to a quarter of what it selects from. Chunks and batches of
    small tensors take ``unit`` bytes, so that three are on a device at once: one arrives, one is merged, one
    leaves. A tensor that needs a statistic of all of it stays there as a whole where it fits in ``room``.
    ``adapters``: the devices' kernels merge adapters, with the CPU's bits.
    """

    piece: int
    unit: int
    room: int
    adapters: bool = True

    @staticmethod
    def of(plan: Plan, memory: int, device_memory: int, devices: int, adapters: bool = True) -> DeviceBudget:
        """Raises ValueError for less memory than the smallest chunks need."""
        check_memory(memory)
        smallest = [(out, min(out.numel, _grain(out))) for _, out in _merged(plan, adapters)]
        needs = (max(most_bytes(*chunk), 3 * scratch_of(*chunk)) for chunk in smallest)
        least = max(needs, default=0)
        if device_memory // 4 * 3 < least:
            raise ValueError(
                f"device_memory must be at least {math.ceil(least / 3) * 4} bytes for this merge, "
                f"got {device_memory}"
            )
        # Locking pages is dear: the buffers stay small beside the input.
        piece = min(
            PIECE, memory // 2 // (STAGES * devices + RING + 1), max(LEAST_PIECE, plan.total_read // 16)
        )
        room = device_memory // 4 * 3
        return DeviceBudget(1 << piece.bit_length() - 1, min(UNIT, room // 3), room, adapters)


@dataclass
class _Batch:
    """Small outputs that will be one unit, as long as they fit."""

    parts: list[Part] = field(default_factory=list)
    charged: int = 0
    out_bytes: int = 0

    def add(self, load: Load, budget: DeviceBudget) -> bool:
        """Whether there was room for another."""
        charge = max(load.nbytes, SCRATCH * len(load.parts[0].out.tuned))
        charged, out_bytes = self.charged + charge, self.out_bytes + _tail(load)
        if self.parts and (charged > budget.unit or out_bytes > budget.piece):
            return False
        self.parts += load.parts
        self.charged, self.out_bytes = charged, out_bytes
        return True


def schedule(plan: Plan, budget: DeviceBudget) -> list[Unit]:
    """The units of all outputs that devices merge, in the order in which the file needs their first bytes."""
    method = METHODS[plan.method]
    modelwide = model_statistic(plan) is not None
    units: list[Unit | _Batch] = []
    batch = _Batch()
    for number, out in _merged(plan, budget.adapters):
        whole = place((_part(number, out, 0, out.numel),))
        if out.numel <= grouping.SMALL and whole.nbytes <= budget.unit and _tail(whole) <= budget.piece:
            if not batch.parts or not batch.add(whole, budget):
                batch = _Batch()
                batch.add(whole, budget)
                units.append(batch)
            continue
        statistic = (
            out.action == "merge" and not modelwide and method.statistic(out.params, out.numel) is not None
        )
        if _stays_whole(out, whole, budget) if statistic else whole.nbytes <= budget.unit:
            units.append(Unit((whole,)))
            continue
        parts = [_part(number, out, *chunk) for chunk in chunks(out.numel, _step(out, budget))]
        loads = tuple(place((part,)) for part in parts)
        if statistic:
            units.append(Unit(loads, tuple(place((part,), merged=False) for part in parts)))
        else:
            units += [Unit((load,)) for load in loads]
    return [Unit((place(unit.parts),)) if isinstance(unit, _Batch) else unit for unit in units]


def model_survey(plan: Plan, budget: DeviceBudget) -> Unit:
    """Scope "model": every merged tensor to be looked at, none to be merged; small ones share a load."""
    loads: list[Load] = []
    held: list[Part] = []
    filled = 0
    for out in plan.segment():
        for first, count in chunks(out.numel, _step(out, budget)):
            part = Part(-1, out, first, count, (out.flat or 0) + first)
            nbytes = place((part,), merged=False).nbytes
            if held and filled + nbytes > budget.unit:
                loads.append(place(held, merged=False))
                held, filled = [], 0
            held.append(part)
            filled += nbytes
    if held:
        loads.append(place(held, merged=False))
    return Unit((), tuple(loads))


def deal(units: Sequence[Unit], devices: int) -> list[int]:
    """The device of every unit: the one that has the fewest bytes so far, the first among equals."""
    dealt = [0] * devices
    places = []
    for unit in units:
        places.append(dealt.index(min(dealt)))
        dealt[places[-1]] += unit.nbytes
    return places


def on_device(out: Output, adapters: bool) -> bool:
    """Whether a device has anything to do for an output: no copies, no float64.

    ``adapters``: its kernels merge adapters, with the CPU's bits. The CPU keeps those that it must merge as a
    whole, and PEFT's roundings, which are torch's.
    """
    if out.action == "copy" or out.numel == 0 or common_dtype(out.sources) == torch.float64:
        return False
    adapted = [source for source in out.sources if isinstance(source, Adapted)]
    if out.action == "adapt" and not any(c.kind == ADD for source in adapted for c in source.changes):
        return False
    return not adapted or (adapters and not any(s.whole or s.rounding == "peft" for s in adapted))


def _merged(plan: Plan, adapters: bool) -> Iterator[tuple[int, Output]]:
    return ((number, out) for number, out in enumerate(plan.outputs) if on_device(out, adapters))


def _part(number: int, out: Output, first: int, count: int) -> Part:
    return Part(number, out, first, min(count, out.numel - first), first)


def _tail(load: Load) -> int:
    return load.nbytes - load.outs


def _stays_whole(out: Output, whole: Load, budget: DeviceBudget) -> bool:
    """Whether a statistic may be taken of all of a tensor at once: beside a selection's own memory there is
    a quarter of a unit left for what joining factors takes."""
    return whole.nbytes <= budget.room and scratch_of(out, out.numel) <= budget.unit // 4


def _grain(out: Output) -> int:
    """Elements of which chunks are multiples: blocks, or rows where nothing but adapters is to be merged."""
    [*_, last] = out.sources
    return last.columns if out.action == "adapt" and isinstance(last, Adapted) else BLOCK


def _step(out: Output, budget: DeviceBudget) -> int:
    """Elements of a chunk that takes ``budget.unit`` bytes at the most, one block (or row) at the least."""
    grain = _grain(out)
    wide = sum(to.itemsize for to in widened(out) if to is not None)
    each = input_width(out) + wide + TORCH_DTYPE[out.dtype].itemsize
    slack = ALIGN * (2 * len(out.sources) + 1)
    step = max(1, (budget.unit - slack) // each // grain)
    while is_adapted(out) and step > 1 and most_bytes(out, step * grain) > budget.unit:
        step -= -(-step // 8)
    return step * grain
