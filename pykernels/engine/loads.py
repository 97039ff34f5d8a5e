"""What is on a device together, and where it lies: a tensor, a chunk of one, or many small tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from pykernels.engine.files import TORCH_DTYPE
from pykernels.engine.gathered import Held, Read, most_reads, reads, rows_of, scratch, stored
from pykernels.engine.mapped import Inputs
from pykernels.engine.passes import common_dtype
from pykernels.engine.units import Adapted, Output, Source

ALIGN = 256
"""Bytes; every tensor on a device begins at a multiple of it, wherever it lies in its file."""


@dataclass(frozen=True)
class Part:
    """``count`` elements of output number ``number`` from ``first`` on.

    ``at``: the flat index of the first of them in the scope of the statistic that sees them.
    """

    number: int
    out: Output
    first: int
    count: int
    at: int = 0


@dataclass(frozen=True)
class Place:
    """What lies at which byte of a load for a part: per input what is read of it, then where it is widened
    to where its dtype differs; then the output."""

    sources: tuple[Held, ...]
    wide: tuple[int | None, ...]
    out: int


@dataclass(frozen=True)
class Slice:
    """``nbytes`` bytes of what is read from byte ``first`` on, which go to ``at`` in a load."""

    source: Read
    first: int
    nbytes: int
    at: int


@dataclass(frozen=True)
class Load:
    """Parts that are on a device together: inputs first, widened inputs, then outputs from ``outs`` on.

    Before these is left out of the ring what the device takes elsewhere to put adapted inputs together.
    """

    parts: tuple[Part, ...]
    places: tuple[Place, ...]
    outs: int
    nbytes: int

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The bytes of files that it reads; factors of adapters, which are read again and again, are not."""
        return tuple(s.source for s in self.slices() if isinstance(s.source, Source))

    def slices(self) -> Iterator[Slice]:
        """Everything that is read, in the order of its place."""
        for place in self.places:
            for held in place.sources:
                yield from (Slice(read, 0, read.nbytes, at) for read, at in held)

    def windows(self, piece: int) -> Iterator[tuple[int, int, list[Slice]]]:
        """(start, end, what lies there) of stretches of at most ``piece`` bytes that cover all inputs."""
        start = end = 0
        held: list[Slice] = []
        for whole in self.slices():
            done = 0
            while done < whole.nbytes:
                at = whole.at + done
                if at - start >= piece:
                    yield start, end, held
                    start, held = at, []
                count = min(whole.nbytes - done, start + piece - at)
                held.append(Slice(whole.source, whole.first + done, count, at))
                done, end = done + count, at + count
        yield start, end, held


def place(parts: Sequence[Part], *, merged: bool = True) -> Load:
    """Lay parts out one after another; without ``merged`` they are only looked at and have no outputs."""
    end = 0

    def take(count: int, dtype: torch.dtype) -> int:
        nonlocal end
        start, end = end, end + -(-count * dtype.itemsize // ALIGN) * ALIGN
        return start

    def hold(read: Read) -> tuple[Read, int]:
        return read, take(read.nbytes, torch.uint8)

    sources = [tuple(tuple(map(hold, _reads(s, p.first, p.count))) for s in p.out.sources) for p in parts]
    wide = [tuple(take(p.count, to) if to is not None else None for to in widened(p.out)) for p in parts]
    take(max(scratch_of(p.out, p.count) for p in parts), torch.uint8)
    outs = end
    out = [take(p.count, TORCH_DTYPE[p.out.dtype]) if merged else 0 for p in parts]
    return Load(tuple(parts), tuple(map(Place, sources, wide, out)), outs, end)


def read_bytes(inputs: Inputs, part: Slice) -> torch.Tensor:
    """The bytes of a slice on the host."""
    if isinstance(part.source, Source):
        return inputs.bytes(part.source, part.first, part.nbytes)
    return part.source.made(inputs.adapted.factors)[part.first :][: part.nbytes]


def _reads(source: Source, first: int, count: int) -> Iterator[Read]:
    if isinstance(source, Adapted):
        yield from reads(source, *rows_of(source, first, count))
    else:
        yield stored(source, first, count)


def scratch_of(out: Output, count: int) -> int:
    """Bytes of its own that a device takes, at the most, to put ``count`` adapted elements together.

    One input after another: what one took, the next can have.
    """
    return max((scratch(s, count) for s in out.sources if isinstance(s, Adapted)), default=0)


def most_bytes(out: Output, count: int) -> int:
    """What a load of ``count`` elements of ``out`` takes at the most, wherever they begin."""
    widths = [to.itemsize for to in (TORCH_DTYPE[out.dtype], *widened(out)) if to is not None]
    sizes = [count * width for width in widths] + [scratch_of(out, count)]
    for source in out.sources:
        if isinstance(source, Adapted):
            nbytes, tensors = most_reads(source, count)
            sizes += [nbytes, *[ALIGN] * tensors]
        else:
            sizes.append(count * TORCH_DTYPE[source.dtype].itemsize)
    return sum(-(-size // ALIGN) * ALIGN for size in sizes)


def widened(out: Output) -> list[torch.dtype | None]:
    """Per source the dtype that it is widened to, None where it has that dtype already."""
    common = common_dtype(out.sources)
    return [common if TORCH_DTYPE[source.dtype] != common else None for source in out.sources]
