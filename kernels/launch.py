"""Jobs to launches: rows of addresses, put on the device without waiting, and kernels on its stream."""

from __future__ import annotations

import os
from array import array
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from triton.errors import TritonError

from pykernels.kernels import table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, on the CPU: few large blocks, for each costs milliseconds."""
TILE = 16384 if INTERPRETED else 4096
"""Elements that a row of a table is counted in; a multiple of BLOCK."""
BLOCK = 16384 if INTERPRETED else 1024
"""Elements a program merges: 16 bytes of bfloat16 a thread and tensor, so that n + 1 loads fly at once."""
WARPS = 4
UNROLLED = 64 if INTERPRETED else 4
"""Models up to which the loop over them is unrolled, so that all loads fly at once. (From numpy 2.4 on the
interpreter can not loop up to a number that it was given at run time.)"""

READS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
WRITES = {**READS, torch.float64: tl.float64}

Numbers = Sequence[float] | torch.Tensor | None
Tensors = Sequence[torch.Tensor]


@dataclass
class Job:
    """One tensor's merge or selection: what its row holds. Lists are of the host, tensors of the device."""

    out: torch.Tensor | None
    base: torch.Tensor | None
    tuned: Tensors
    weight: Numbers = None
    vote: Numbers = None
    share: Numbers = None
    lambda_: float | torch.Tensor = 1.0
    choice: Numbers = None
    place: Numbers = None
    ranks: Sequence[int] | None = None
    offset: int = 0
    key: int = 0
    grad: torch.Tensor | None = None

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.tuned[0].numel()

    def kind(self) -> tuple[Any, ...]:
        """What one launch must have in common: device, dtypes, number of models, alignment."""
        like = self.tuned[0]
        return (
            like.device,
            like.dtype,
            None if self.out is None else self.out.dtype,
            len(self.tuned),
            self.base is None,
            self.share is None,
            isinstance(self.weight, torch.Tensor),
            alignment(self),
        )


def alignment(job: Job) -> int:
    """16 where every tensor begins at a multiple of 16 bytes, 1 where at one of its elements, else 0."""
    tensors = [*job.tuned, *(t for t in (job.base, job.out, job.grad) if t is not None)]
    if all(t.data_ptr() % 16 == 0 for t in tensors):
        return 16
    return int(all(t.data_ptr() % t.element_size() == 0 for t in tensors))


def row(job: Job, first: int, address: int) -> list[int]:
    """The words of one job whose row begins at ``address``, see :mod:`pykernels.kernels.table`."""
    words = [0] * int(table.TUNED.value) + [t.data_ptr() for t in job.tuned]

    def listed(field: tl.constexpr, numbers: Numbers, code: str) -> None:
        if isinstance(numbers, torch.Tensor):
            words[field.value] = numbers.data_ptr()
        elif numbers is not None:
            words[field.value] = address + 8 * len(words)
            words.extend(_words(code, numbers))

    words[table.NUMEL.value] = job.numel
    words[table.FIRST.value] = first
    words[table.OFFSET.value] = job.offset
    words[table.KEY.value] = _signed(job.key)
    for field, tensor in ((table.OUT, job.out), (table.BASE, job.base), (table.GRAD, job.grad)):
        words[field.value] = 0 if tensor is None else tensor.data_ptr()
    lambda_ = job.lambda_ if isinstance(job.lambda_, torch.Tensor) else [job.lambda_]
    listed(table.LAMBDA, lambda_, "f")
    for field, numbers in ((table.WEIGHT, job.weight), (table.VOTE, job.vote), (table.SHARE, job.share)):
        listed(field, numbers, "f")
    for field, numbers in ((table.CHOICE, job.choice), (table.PLACE, job.place), (table.RANKS, job.ranks)):
        listed(field, numbers, "q")
    return words


def width(models: int) -> int:
    """Words that a row of so many models takes at the most: addresses, and every list in the row itself."""
    return int(table.TUNED.value) + models + 1 + 3 * ((models + 1) // 2) + 5 * models


def _words(code: str, numbers: Sequence[float]) -> list[int]:
    values = array(code, numbers)
    if len(values) * values.itemsize % 8:
        values.append(0)
    return memoryview(values).cast("B").cast("q").tolist()


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def pack(rows: torch.Tensor, words: list[int]) -> None:
    """Fill a table by launches that carry the words as arguments."""
    for start in range(0, len(words), table.WORDS):
        table._pack[(1,)](rows, start, *words[start : start + table.WORDS], num_warps=1)


def fill(rows: torch.Tensor, words: list[int], *, alone: bool = False) -> None:
    """Put words on the device, a multiple of what a launch carries; the host waits for nothing.

    ``alone``: they are few, and no memory of the host is made for them.
    """
    with on(rows.device):
        if rows.device.type != "cuda":
            rows[: len(words)] = torch.tensor(words, device="cpu")
        elif alone or torch.cuda.is_current_stream_capturing():
            pack(rows, words)
        else:  # the first words as in a graph, so that a warm-up compiles and loads what a capture needs
            pack(rows, words[: table.WORDS])
            rest = slice(table.WORDS, len(words))
            rows[rest].copy_(torch.tensor(words[rest], device="cpu").pin_memory(), non_blocking=True)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Launch:
    """A table of jobs on their device, and the launches that work from it."""

    def __init__(self, op: str, jobs: Sequence[Job], unit: int = 1) -> None:
        """Jobs have one ``kind``; every one takes a multiple of ``unit`` tiles."""
        self.op, self.jobs, self.models = op, jobs, len(jobs[0].tuned)
        self.device = jobs[0].tuned[0].device
        firsts, self.tiles = [], 0
        for job in jobs:
            firsts.append(self.tiles)
            self.tiles += -(-job.numel // (TILE * unit)) * unit
        self.stride = width(self.models)
        self.rows = self.empty(-(-len(jobs) * self.stride // table.WORDS) * table.WORDS)
        self._fill(firsts)

    def _fill(self, firsts: list[int]) -> None:
        """Put the rows on the device; the host waits for nothing, and one row needs no memory of the host."""
        words: list[int] = []
        for i, (job, first) in enumerate(zip(self.jobs, firsts, strict=True)):
            words += [0] * (i * self.stride - len(words))
            words += row(job, first, self.rows.data_ptr() + 8 * i * self.stride)
        words += [0] * (-len(words) % table.WORDS)
        fill(self.rows, words, alone=len(self.jobs) == 1)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Scratch memory of the device, zeroed on its stream."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def empty(self, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Scratch memory of the device."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def run(self, kernel: Any, programs: int, *args: object, num_warps: int = WARPS, **fixed: object) -> None:
        """``kernel`` over ``programs`` blocks, with the table in front of ``args``."""
        try:
            with on(self.device):
                kernel[(programs,)](
                    self.rows, len(self.jobs), self.stride, self.models, *args,
                    **fixed, num_warps=num_warps, enable_fp_fusion=False,
                )  # fmt: skip
        except (RuntimeError, TritonError) as error:
            shapes = ", ".join(str(list(job.tuned[0].shape)) for job in self.jobs[:4])
            raise RuntimeError(
                f"{self.op}: {len(self.jobs)} tensors ({shapes}{', ...' * (len(self.jobs) > 4)}) of "
                f"{self.models} models on {self.device}: the launch failed: {error}"
            ) from error


def merge(launch: Launch, kernel: Any, **policy: object) -> None:
    """Run a kernel of :mod:`pykernels.kernels.merge_loop` over all jobs of a launch."""
    job = launch.jobs[0]
    out = job.tuned[0] if job.out is None else job.out
    launch.run(
        kernel,
        launch.tiles * (TILE // BLOCK),
        SHARED=job.share is not None,
        SKIP=isinstance(job.weight, torch.Tensor),
        BASED=job.base is not None,
        IN=READS[job.tuned[0].dtype],
        TO=WRITES[out.dtype],
        ALIGN=alignment(job),
        MODELS=launch.models if launch.models <= UNROLLED else 0,
        BLOCK=BLOCK,
        TILE=TILE,
        **policy,
    )


def kind_of(job: Job, *policy: Hashable) -> Hashable:
    """The key under which a job waits for others."""
    return (*job.kind(), *policy)
