"""Many small tensors in a few launches: jobs of one kind wait for each other and run together.

A kernel that takes a table of tensors costs one launch whatever their number. Backends submit their jobs
here; outside a group each runs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

import torch

SMALL = 1 << 22
"""Elements up to which a tensor waits for others: a larger one outlasts its own launches."""
WAITING = 1 << 25
"""Elements that wait at the most, which bounds the scratch memory of a group's selections."""
MANY = 1024
"""Jobs that wait at the most: a grid has no more than 65535 blocks along its second axis."""

Job = TypeVar("Job")
Run = Callable[[list[Job]], None]


class Group:
    """Jobs in the order given, by what one launch must have in common, its stream included."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[Callable[..., None], Hashable, torch.cuda.Stream | None], list[object]] = {}
        self._elements = self._count = 0

    def add(
        self, run: Callable[..., None], key: Hashable, job: object, elements: int, device: torch.device
    ) -> None:
        """Keep ``job`` for the stream that is current on its ``device``; run all that wait when many do."""
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._waiting.setdefault((run, key, stream), []).append(job)
        self._elements += elements
        self._count += 1
        if self._elements >= WAITING or self._count >= MANY:
            self.flush()

    def flush(self) -> None:
        """Run all that wait, the kind that came first first."""
        waiting, self._waiting = self._waiting, {}
        self._elements = self._count = 0
        for (run, _, stream), jobs in waiting.items():
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                run(jobs)


_group: ContextVar[Group | None] = ContextVar("pykernels_group", default=None)


@contextmanager
def grouped() -> Iterator[None]:
    """Let small merges inside the block share launches; their outputs are filled when the block ends.

    No merge inside may read what another one inside writes. On the CPU, and for whatever a backend does not
    submit, nothing changes. A block inside a block belongs to the outer one.
    """
    if _group.get() is not None:
        yield
        return
    group = Group()
    token = _group.set(group)
    try:
        yield
        group.flush()
    finally:
        _group.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Let jobs inside the block run at once, group or not: their results are needed."""
    token = _group.set(None)
    try:
        yield
    finally:
        _group.reset(token)


def submit(run: Run[Job], key: Hashable, job: Job, elements: int, device: torch.device) -> None:
    """Run ``job`` alone at once, or with others of its ``key`` later, when inside a group and small.

    ``device``: its tensors'. It runs on the stream that is current there now.
    """
    group = _group.get()
    if group is None or elements > SMALL:
        run([job])
    else:
        group.add(run, key, job, elements, device)
