"""Where a merge runs: on the CPU or on devices, within which memory, with whose kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pykernels import backends
from pykernels.adapters.change import ADD
from pykernels.engine.compute import Budget, Compute
from pykernels.engine.device import Accelerator, open_devices
from pykernels.engine.least_memory import check_adapted
from pykernels.engine.mapped import Inputs
from pykernels.engine.offload import Offload
from pykernels.engine.passes import is_adapted
from pykernels.engine.schedule import DeviceBudget, on_device
from pykernels.engine.sizes import parse_size
from pykernels.engine.station import Busy
from pykernels.engine.units import Adapted, Plan, Source
from pykernels.methods import METHODS
from pykernels.ops.merge_lora import serves_in_order

SHARE = 2
"""Without a stated device memory a merge takes at most the free memory divided by this."""

Engine = Compute | Offload


@dataclass(frozen=True)
class DeviceUse:
    """What a merge took of a device: ``held`` bytes for its tensors, of ``allowed`` that it might take.

    ``backend`` merged there: "cuda", "triton" or "ref". ``stated``: somebody gave ``allowed``.
    """

    name: str
    model: str
    backend: str
    held: int
    allowed: int
    stated: bool


class Target:
    """The CPU, or one or more devices; no memory is taken before ``engine``."""

    def __init__(self, device: str, device_memory: str | int | None) -> None:
        """Raises ValueError for a device that is not there and for more memory than it has free."""
        self._devices: Sequence[Accelerator] = open_devices(device)
        self._stated = device_memory is not None
        self._allowed = _allowed(self._devices, device_memory)

    def backend(self, plan: Plan) -> str:
        """Whose kernels merge. Raises ValueError when a forced backend cannot run there."""
        where = [device.torch_device for device in self._devices] or [torch.device("cpu")]
        try:
            found = {backends.chosen(METHODS[plan.method].op, torch.empty(0, device=d)) for d in where}
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        return " ".join(sorted(str(name) for name in found))

    def budget(self, plan: Plan, memory: int) -> Budget | DeviceBudget:
        """How the memory is shared out. Raises ValueError for less than is needed."""
        check_adapted(plan, memory)
        if not self._devices:
            return Budget.of(plan, memory)
        return DeviceBudget.of(plan, memory, self._allowed, len(self._devices), self._merge_adapters())

    def engine(
        self, plan: Plan, inputs: Inputs, budget: Budget | DeviceBudget, done: Callable[[int, str], None]
    ) -> Engine:
        """What computes the outputs; ``close`` it. Raises ValueError when a device cannot give the memory."""
        if isinstance(budget, DeviceBudget):
            return Offload(plan, inputs, budget, self._devices, done)
        return Compute(plan, inputs, budget, done)

    def notes(self, plan: Plan) -> list[str]:
        """What a user should know before a merge starts there."""
        if not self._devices:
            return []
        names = ", ".join(device.name for device in self._devices)
        told = self._left(plan, names)
        if self.backend(plan) != "ref":
            return told
        return [
            *told,
            f"{names}: the references merge there, slowly, and averages may differ from those of the CPU's "
            "kernels in the last bit",
        ]

    def _merge_adapters(self) -> bool:
        """Whether all devices do, with the CPU's bits."""
        try:
            return all(serves_in_order(device.torch_device) for device in self._devices)
        except RuntimeError:  # a forced backend that does not run there; `backend` says so
            return False

    def _left(self, plan: Plan, names: str) -> list[str]:
        """Which tensors with adapters the CPU merges, and why."""
        able = self._merge_adapters()
        left = [out for out in plan.outputs if is_adapted(out) and not on_device(out, able)]
        left = [out for out in left if out.numel and any(_adds(s) for s in out.sources)]
        if not left:
            return []
        why = "norms of columns, float64 and rounding peft are its own" if able else "no CUDA kernels there"
        return [f"{len(left)} tensors with adapters are merged on the CPU, not on {names}: {why}"]

    def used(self, plan: Plan, engine: Engine | None) -> tuple[DeviceUse, ...]:
        """What was taken of every device; without an engine nothing was."""
        held = engine.ring if isinstance(engine, Offload) else 0
        return tuple(
            DeviceUse(d.name, d.model, self.backend(plan), held, self._allowed, self._stated)
            for d in self._devices
        )


def _adds(source: Source) -> bool:
    return isinstance(source, Adapted) and any(change.kind == ADD for change in source.changes)


def busy(engine: Engine | None, writing: float) -> Busy | None:
    """How long each part of a merge on devices worked; None on the CPU."""
    if not isinstance(engine, Offload):
        return None
    return engine.busy().worst(Busy(writing=writing))


def _allowed(devices: Sequence[Accelerator], device_memory: str | int | None) -> int:
    """Bytes that may be taken of every device: those stated, else half of what the fullest has free."""
    if device_memory is not None and not devices:
        raise ValueError("device_memory is for a merge on devices: give device too, or leave it out")
    free = {device.name: device.free() for device in devices}
    if device_memory is None:
        return min(free.values(), default=0) // SHARE
    size = parse_size(device_memory, "device_memory")
    for name, left in free.items():
        if size > left:
            raise ValueError(f"device_memory must be at most what {name} has free, {left} bytes, got {size}")
    return size
