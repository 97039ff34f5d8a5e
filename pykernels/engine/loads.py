"""What is on a device together, and where it lies: a tensor, a chunk of one, or many small tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from pykernels.engine.files import TORCH_DTYPE
from pykernels.engine.passes import common_dtype
from pykernels.engine.units import Output, Source

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
    """Byte offsets of a part's tensors in its load: inputs, those of them that are widened again, output."""

    sources: tuple[int, ...]
    wide: tuple[int | None, ...]
    out: int


@dataclass(frozen=True)
class Slice:
    """``nbytes`` bytes of a source from byte ``first`` on, which go to ``at`` in a load."""

    source: Source
    first: int
    nbytes: int
    at: int


@dataclass(frozen=True)
class Load:
    """Parts that are on a device together: inputs first, widened inputs, then outputs from ``outs`` on."""

    parts: tuple[Part, ...]
    places: tuple[Place, ...]
    outs: int
    nbytes: int

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The bytes of files that it reads."""
        return tuple(
            replace(s.source, start=s.source.start + s.first, end=s.source.start + s.first + s.nbytes)
            for s in self.slices()
        )

    def slices(self) -> Iterator[Slice]:
        """Every input, in the order of its place."""
        for part, place in zip(self.parts, self.places, strict=True):
            for source, at in zip(part.out.sources, place.sources, strict=True):
                width = TORCH_DTYPE[source.dtype].itemsize
                yield Slice(source, part.first * width, part.count * width, at)

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

    sources = [tuple(take(p.count, TORCH_DTYPE[s.dtype]) for s in p.out.sources) for p in parts]
    wide = [tuple(take(p.count, to) if to is not None else None for to in widened(p.out)) for p in parts]
    outs = end
    out = [take(p.count, TORCH_DTYPE[p.out.dtype]) if merged else 0 for p in parts]
    return Load(tuple(parts), tuple(map(Place, sources, wide, out)), outs, end)


def widened(out: Output) -> list[torch.dtype | None]:
    """Per source the dtype that it is widened to, None where it has that dtype already."""
    common = common_dtype(out.sources)
    return [common if TORCH_DTYPE[source.dtype] != common else None for source in out.sources]
