"""One output tensor through its method: sources in, chunks or whole, straight into the writer's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pykernels.engine.arena import Arena
from pykernels.engine.files import TORCH_DTYPE
from pykernels.engine.mapped import Inputs
from pykernels.engine.passes import (
    BLOCK,
    chunks,
    common_dtype,
    input_width,
    is_adapted,
    merge_whole,
    model_statistic,
)
from pykernels.engine.units import Adapted, Output, Plan
from pykernels.methods import METHODS, Method, Statistic

CHUNK_BYTES = 8 << 20
MIN_MEMORY = 1_000_000
LEAST_WHOLE = 32 << 20
"""Bytes of output up to which a tensor is worth computing at once even in the smallest merges."""


class Sink(Protocol):
    """Where outputs go: memory for the next bytes of the current file."""

    def reserve(
        self, nbytes: int, dtype: torch.dtype, tensor: int | None, *, last: bool = False
    ) -> torch.Tensor:
        """The next ``nbytes`` bytes as a 1-D tensor to fill."""


@dataclass(frozen=True)
class Budget:
    """How ``memory`` bytes of anonymous memory are shared out for one plan."""

    chunk: int
    whole: int
    ring: int

    @staticmethod
    def of(plan: Plan, memory: int) -> Budget:
        """``chunk`` bytes of output at a time; a tensor of up to ``whole`` bytes may be computed at once.

        The ring then holds two of the largest, so that one is computed while the other is written.
        Raises ValueError for less memory than the smallest chunks need.
        """
        check_memory(memory)
        method = METHODS[plan.method]
        merged = [out for out in plan.outputs if out.action == "merge"]
        scratch = max((method.scratch(o.numel, len(o.tuned)) for o in merged), default=0)
        chunk = max(min(CHUNK_BYTES, max(BLOCK * 8, memory // 16)), _longest_row(plan))
        # The first touch of the ring is dear: it stays small beside the output.
        room = min((memory - scratch - (4 << 20)) // 2, max(LEAST_WHOLE, plan.total_write // 16))
        whole = room if scratch and room > 0 else 0
        largest = max((out.nbytes for out in merged if out.nbytes <= whole), default=0)
        return Budget(chunk, whole, max(4 * chunk, 2 * largest + 2 * BLOCK))


def check_memory(memory: int) -> None:
    """Raise ValueError for less than the smallest chunks need."""
    if memory < MIN_MEMORY:
        raise ValueError(f"memory must be at least {MIN_MEMORY} bytes, got {memory}")


def _longest_row(plan: Plan) -> int:
    """Bytes of the longest row that adapters change; pieces are whole rows."""
    adapted = (o for o in plan.outputs if o.action == "adapt" and o.numel)
    rows = (
        s.columns * TORCH_DTYPE[o.dtype].itemsize for o in adapted for s in o.tuned if isinstance(s, Adapted)
    )
    return max(rows, default=0)


class Compute:
    """Runs the outputs of one plan. ``done(nbytes, name)`` hears after every chunk how much was moved."""

    def __init__(self, plan: Plan, inputs: Inputs, budget: Budget, done: Callable[[int, str], None]) -> None:
        self._plan = plan
        self._method: Method = METHODS[plan.method]
        self._inputs = inputs
        self._budget = budget
        self._done = done
        self.model_stats: Any = None
        self._wide: list[torch.Tensor] = []

    def arena(self) -> Arena:
        """Memory to write outputs from."""
        return Arena(self._budget.ring)

    def reads(self) -> Sequence[Output]:
        """What is read on the calling thread, in this order."""
        return self._plan.outputs

    def close(self) -> None:
        """Let go of the memory that widened inputs are kept in."""
        self._wide.clear()

    def survey(self) -> None:
        """Scope "model": the passes over all merged tensors that must come before the first is merged."""
        statistic = model_statistic(self._plan)
        if statistic is None:
            return
        while not statistic.done:
            for out in self._plan.segment():
                self._observe(statistic, out, out.flat or 0)
                for source in out.sources:
                    self._inputs.drop(source)
            statistic.next_round()
        self.model_stats = statistic.finish()

    def run(self, index: int, out: Output, sink: Sink) -> None:
        """Output number ``index`` of the plan, into ``sink``."""
        if out.nbytes == 0:
            return
        if out.action == "copy":
            self._copy(index, out, sink)
        elif out.action == "adapt":
            self._adapt(index, out, sink)
        else:
            self._merge(index, out, sink)

    def _copy(self, index: int, out: Output, sink: Sink) -> None:
        for start in range(0, out.nbytes, self._budget.chunk):
            count = min(self._budget.chunk, out.nbytes - start)
            target = sink.reserve(count, torch.uint8, index, last=start + count == out.nbytes)
            target.copy_(self._inputs.bytes(out.sources[0], start, count))
            self._done(count * (1 + len(out.sources)), out.name)

    def _adapt(self, index: int, out: Output, sink: Sink) -> None:
        """The one source, rows at a time, straight into the file's memory where it has the file's dtype."""
        source, dtype = out.sources[0], TORCH_DTYPE[out.dtype]
        columns = source.columns if isinstance(source, Adapted) else 1
        step = max(1, self._budget.chunk // (columns * dtype.itemsize)) * columns
        for first, count in chunks(out.numel, step):
            target = sink.reserve(count * dtype.itemsize, dtype, index, last=first + count == out.numel)
            if source.dtype == out.dtype:
                self._inputs.elements(source, first, count, target)
            else:
                target.copy_(self._inputs.elements(source, first, count))
            self._done(count * (dtype.itemsize + input_width(out)), out.name)

    def _merge(self, index: int, out: Output, sink: Sink) -> None:
        dtype, p, method = TORCH_DTYPE[out.dtype], out.params, self._method
        stats, statistic = None, None
        if self.model_stats is not None:
            stats = self.model_stats.at(out.flat or 0)
        else:
            statistic = method.statistic(p, out.numel)
        step = self._step(out)
        if statistic is not None and out.nbytes <= self._budget.whole and out.numel <= self._exact(out):
            target = sink.reserve(out.nbytes, dtype, index, last=True)
            base, tuned = self._tensors(out, 0, out.numel)
            merge_whole(method, p, target, base, tuned, statistic)
            self._done(out.nbytes + sum(s.nbytes for s in out.sources), out.name)
            return
        if statistic is not None:
            stats = self._stats(statistic, out)
        for first, count in chunks(out.numel, step):
            target = sink.reserve(count * dtype.itemsize, dtype, index, last=first + count == out.numel)
            base, tuned = self._tensors(out, first, count)
            method.merge(p, target, base, tuned, first, stats)
            self._done(count * (dtype.itemsize + input_width(out)), out.name)

    def _stats(self, statistic: Statistic, out: Output) -> Any:
        while not statistic.done:
            self._observe(statistic, out, 0)
            statistic.next_round()
        return statistic.finish()

    def _observe(self, statistic: Statistic, out: Output, start: int) -> None:
        """Show all of ``out`` to a statistic of which it begins at flat index ``start``."""
        # Mapped inputs cost no memory: one chunk for the whole tensor lets the selection finish in one round.
        step = self._exact(out) if self._exact(out) < out.numel else max(out.numel, 1)
        for first, count in chunks(out.numel, step):
            base, tuned = self._tensors(out, first, count)
            statistic.update(base, tuned, start + first)

    def _step(self, out: Output) -> int:
        """Elements per chunk of the merge pass."""
        fit = self._budget.chunk // TORCH_DTYPE[out.dtype].itemsize // BLOCK * BLOCK
        return max(BLOCK, min(fit, self._exact(out)))

    def _exact(self, out: Output) -> int:
        """Elements that inputs can give at once: all, or what fits where they are widened or adapted."""
        if len({source.dtype for source in out.sources}) == 1 and not is_adapted(out):
            return out.numel
        fit = self._budget.chunk * 2 // (common_dtype(out.sources).itemsize * len(out.sources))
        return max(BLOCK, fit // BLOCK * BLOCK)

    def _tensors(self, out: Output, first: int, count: int) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Base and tuned chunks in one dtype: aliases of the files, or widened where dtypes differ."""
        read = [self._inputs.elements(source, first, count) for source in out.sources]
        common = common_dtype(out.sources)
        if any(chunk.dtype != common for chunk in read):
            read = [self._widened(i, chunk, common) for i, chunk in enumerate(read)]
        return (read[0], read[1:]) if out.base else (None, read)

    def _widened(self, place: int, chunk: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        while len(self._wide) <= place:
            self._wide.append(torch.empty(0, dtype=torch.uint8, device="cpu"))
        need = chunk.numel() * dtype.itemsize
        if self._wide[place].numel() < need:
            self._wide[place] = torch.empty(need, dtype=torch.uint8, device="cpu")
        return self._wide[place][:need].view(dtype).copy_(chunk)
