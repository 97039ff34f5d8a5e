"""Tensors that adapters change, on a device: what goes there of one, and how it is put together there.

Bytes up: the rows of the base, the same rows of B and all of A, laid out in float32 by the host
(``Factors``). The device runs on them the steps that the CPU runs (``AdaptedTensors``), for the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch

from pykernels.adapters.change import ADD, REPLACE, ROWS, VECTOR, Change
from pykernels.engine.adapted import AdaptedTensors, cut_at
from pykernels.engine.factors import Factors
from pykernels.engine.files import TORCH_DTYPE
from pykernels.engine.shard import TensorInfo
from pykernels.engine.units import Adapted, Source
from pykernels.ops.merge_lora import merge_in_order

SINGLE = torch.float32.itemsize
NORMED = 4096
"""Columns whose squares make one sum."""


@dataclass(frozen=True)
class Piece:
    """All of A, and rows ``first`` to ``first + count`` of B, of a change or of one of its experts."""

    change: Change
    expert: int
    first: int
    count: int

    @property
    def columns(self) -> int:
        """Of A, as it is added to rows."""
        a, b = self.change.tensors[:2]
        return b.shape[0] if self.change.transposed else prod(a.shape) // a.shape[0]


@dataclass(frozen=True)
class Factor:
    """A or the rows of B of a piece, float32."""

    piece: Piece
    is_b: bool

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.piece.change.rank * (self.piece.count if self.is_b else self.piece.columns) * SINGLE

    def made(self, factors: Factors) -> torch.Tensor:
        """The bytes, on the host."""
        p = self.piece
        pair = factors.piece(p.change, torch.float32, p.expert, p.first, p.count)
        return pair[self.is_b].reshape(-1).view(torch.uint8)


Read = Source | Factor
"""Bytes of a file, or what the host makes of some."""
Held = Sequence[tuple[Read, int]]
"""What lies where in a region of a device's memory."""


def rows_of(source: Adapted, first: int, count: int) -> tuple[int, int]:
    """The rows, first and end, that hold ``count`` elements from flat index ``first`` on."""
    return first // source.columns, -(-(first + count) // source.columns)


def reads(source: Adapted, begin: int, end: int) -> Iterator[Read]:
    """All that ``AdaptedTensors.rows`` asks for to make rows ``begin`` to ``end``; the base comes first."""
    columns = source.columns
    yield stored(source, begin * columns, (end - begin) * columns)
    for kind, group in groupby(source.changes, key=lambda c: c.kind):
        changes = list(group)
        if kind == REPLACE:
            yield stored(changes[-1].tensors[0], begin * columns, (end - begin) * columns)
        for change in changes:
            if kind == VECTOR:
                yield stored(change.tensors[0], begin, end - begin)
            elif kind == ROWS:
                inside = (i for i, row in enumerate(change.index) if begin <= row < end)
                yield from (stored(change.tensors[0], i * columns, columns) for i in inside)
            elif kind == ADD:
                yield from _added(source, change, begin, end)


def _added(source: Adapted, change: Change, begin: int, end: int) -> Iterator[Read]:
    for first, last in cut_at(begin, end, source.shape[1] if source.is_stack else source.rows):
        expert, start = divmod(first, source.shape[1]) if source.is_stack else (change.expert or 0, first)
        piece = Piece(change, expert, start + change.offset, last - first)
        yield Factor(piece, False)
        yield Factor(piece, True)
        if len(change.tensors) > 2:
            yield stored(change.tensors[2], piece.first, piece.count)


def stored(info: TensorInfo | Source, first: int, count: int) -> Source:
    """``count`` elements of a tensor from flat index ``first`` on, as bytes of its file."""
    width = TORCH_DTYPE[info.dtype].itemsize
    start = info.start + first * width
    return Source(-1, info.file, info.dtype, start, start + count * width, info.name)


def most_reads(source: Adapted, count: int) -> tuple[int, int]:
    """Bytes, and how many tensors, that ``reads`` names at the most for ``count`` elements in a row."""
    rows, columns = _most_rows(source, count), source.columns
    nbytes, tensors = rows * columns * TORCH_DTYPE[source.dtype].itemsize, 1
    for change in source.changes:
        width = TORCH_DTYPE[change.tensors[0].dtype].itemsize
        if change.kind == ADD:
            experts = min(rows // source.shape[1] + 2, change.experts) if source.is_stack else 1
            nbytes += change.rank * (rows + experts * columns) * SINGLE
            nbytes += sum(rows * TORCH_DTYPE[m.dtype].itemsize for m in change.tensors[2:])
            tensors += experts * len(change.tensors)
        else:
            nbytes += rows * columns * width
            tensors += len(change.index) or 1
    return nbytes, tensors


def scratch(source: Adapted, count: int) -> int:
    """Bytes that the device takes beside the load, at the most, to put ``count`` elements together.

    Joined factors, B in float64 while it is scaled, sums of squares, and copies of rows between steps.
    """
    rows, columns = _most_rows(source, count), source.columns
    adds = [c for c in source.changes if c.kind == ADD]
    merged = min(rows, source.shape[1]) if source.is_stack else rows
    nbytes = sum(c.rank * (28 * merged + 8 * columns) for c in adds)
    if any(len(c.tensors) > 2 for c in adds):
        nbytes += 16 * merged * (columns // NORMED + 4)
    if len(adds) < len(source.changes):
        nbytes += 3 * rows * columns * max(8 if columns == 1 else 0, TORCH_DTYPE[source.dtype].itemsize)
    return nbytes


def _most_rows(source: Adapted, count: int) -> int:
    return min(source.rows, count // max(1, source.columns) + 2)


class Gathered:
    """Reads from a region of a device's memory what ``reads`` named, as ``AdaptedTensors`` asks for it."""

    def __init__(self, region: torch.Tensor, held: Held) -> None:
        self._region = region
        self._stored = {(r.file, r.start, r.end): at for r, at in held if isinstance(r, Source)}
        self._factors = {(r.piece, r.is_b): at for r, at in held if isinstance(r, Factor)}

    def read(self, info: TensorInfo | Source, first: int, count: int) -> torch.Tensor:
        """``count`` elements of a tensor from flat index ``first`` on."""
        asked = stored(info, first, count)
        return cut(self._region, self._stored[asked.file, asked.start, asked.end], count, _dtype(info))

    def piece(
        self, change: Change, dtype: torch.dtype, expert: int, first: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A, and rows of B: as :meth:`Factors.piece`; ``dtype`` is float32."""
        wanted = Piece(change, expert, first, count)
        sides = ((False, (change.rank, wanted.columns)), (True, (count, change.rank)))
        a, b = (cut(self._region, self._factors[wanted, is_b], prod(s), dtype).view(s) for is_b, s in sides)
        return a, b


def gather(
    region: torch.Tensor, held: Held, source: Adapted, first: int, count: int, out: torch.Tensor | None
) -> torch.Tensor:
    """``count`` elements from flat index ``first`` on, 1-D, where the base's rows lay or in ``out``.

    ``out``: of the source's dtype, for whole rows.
    """
    begin, end = rows_of(source, first, count)
    gathered = Gathered(region, held)
    tensors = AdaptedTensors(gathered.read, gathered, merge_in_order)
    target = gathered.read(source, begin * source.columns, (end - begin) * source.columns)
    whole = target if out is None else out
    rows = tensors.rows(source, begin, end - begin, whole.view(end - begin, -1))
    return rows.reshape(-1)[first - begin * source.columns :][:count]


def cut(region: torch.Tensor, at: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """``count`` elements that lie at byte ``at`` of a region."""
    return region[at : at + count * dtype.itemsize].view(dtype)


def _dtype(info: TensorInfo | Source) -> torch.dtype:
    return TORCH_DTYPE[info.dtype]
