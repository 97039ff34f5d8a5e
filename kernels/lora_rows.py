"""Which rows take which adapter, and where its factors lie: found on the device, without waiting for it.

Rows are sorted by adapter, stably, so a tile of them holds few adapters and each adapter's rows lie together;
a kernel goes through the adapters that its tile holds. Rows of -1 take none; rows whose index names no
adapter become NaN, as no error could be raised without waiting.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pykernels.kernels import table
from pykernels.kernels.launch import fill

FACTOR_A = tl.constexpr(0)  # address, stride along the rank, stride along the other dimension
FACTOR_B = tl.constexpr(3)
RANK = tl.constexpr(6)
SCALING = tl.constexpr(7)  # bits of a float32
GRADIENT_A = tl.constexpr(8)  # address of [r, K], 0: not asked for
GRADIENT_B = tl.constexpr(9)
WORDS = tl.constexpr(10)

LOOSE, ALONG, ACROSS = 0, 1, 2
"""How factors lie: anyhow; aligned and contiguous along their long dimension; or along the rank."""

FEW_WORDS = 3 * table.WORDS
"""Words that launches carry to the device sooner than a copy from pinned memory is made."""

Adapter = tuple[torch.Tensor, torch.Tensor, float]
Gradients = Sequence[torch.Tensor | None]


@triton.jit
def rows_at(order, ids, place, m, adapters, GROUPED: tl.constexpr):
    """(rows, their adapters, whether they exist) at places of the order: int32, which takes few registers.

    A row that does not exist is 0; an adapter is -1 for none, and ``adapters`` where the index names none.
    """
    exists = place < m
    if GROUPED:
        rows = tl.load(order + place, mask=exists, other=0).to(tl.int32)
        named = tl.load(ids + place, mask=exists, other=-1)
        mine = tl.where((named < -1) | (named >= adapters), adapters, named).to(tl.int32)
    else:
        rows = tl.where(exists, place, 0).to(tl.int32)
        mine = tl.where(exists, 0, -1).to(tl.int32)
    return rows, mine, exists


@triton.jit
def next_adapter(mine, last, count, lot, lots):
    """The least adapter of a tile's rows above ``last`` that falls to a lot; ``count`` behind the last."""
    taken = (mine > last) & (mine < count) & (mine % lots == lot)
    return tl.min(tl.where(taken, mine, count), 0)


@triton.jit
def factor_at(rows, adapter, address, across, along, rank, FIELD: tl.constexpr, GROUPED: tl.constexpr):
    """(address, stride along the rank, other stride, rank) of a factor: from the table, or as given."""
    if GROUPED:
        row = rows + adapter.to(tl.int64) * WORDS
        address = tl.load(row + FIELD)
        across = tl.load(row + FIELD + 1)
        along = tl.load(row + FIELD + 2)
        rank = tl.load(row + RANK)
    return address, across, along, rank


@triton.jit
def scaling_at(rows, adapter, scaling, GROUPED: tl.constexpr):
    """An adapter's scaling, float32."""
    if GROUPED:
        scaling = tl.load(rows + adapter * WORDS + SCALING).to(tl.int32).to(tl.float32, bitcast=True)
    return scaling


@triton.jit
def factor_places(address, across, along, slot, lane, LOW: tl.constexpr, FORM: tl.constexpr):
    """Pointers to elements of a factor: ``slot`` counts the rank, ``lane`` the other dimension."""
    if FORM != 0:
        address = tl.multiple_of(address, 16)
    place = address.to(tl.pointer_type(LOW))
    if FORM == 1:
        place = place + slot * tl.multiple_of(across, 8) + lane
    elif FORM == 2:
        place = place + slot + lane * tl.multiple_of(along, 8)
    else:
        place = place + slot * across + lane * along
    return place


class Rows(NamedTuple):
    """Rows in the order of their adapters; None where all take the one there is."""

    order: torch.Tensor | None
    ids: torch.Tensor | None


class Factors(NamedTuple):
    """The adapters of a call, of one dtype: their table, or the words of the only one."""

    given: Sequence[Adapter]
    rows: torch.Tensor | None
    forms: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        """Of every factor; of none: any."""
        return self.given[0][0].dtype if self.given else torch.float32

    @property
    def ranks(self) -> int:
        """The largest rank."""
        return max((a.shape[0] for a, _, _ in self.given), default=0)

    def of(self, field: tl.constexpr) -> dict[str, object]:
        """What a kernel is told of the factors A or B."""
        form = self.forms[field.value // FACTOR_B.value]
        words = [0] * 4 if self.rows is not None else _words(self.given[0])
        start = 0 if self.rows is not None else field.value
        return {
            "table": self.rows, "address": words[start], "across": words[start + 1],
            "along": words[start + 2], "rank": 0 if self.rows is not None else words[RANK.value],
            "FIELD": field.value, "FORM": form, "GROUPED": self.rows is not None,
        }  # fmt: skip


def sort_rows(index: torch.Tensor | None) -> Rows:
    """The stable order of rows by adapter; nothing waits for the device."""
    if index is None:
        return Rows(None, None)
    ids, order = torch.sort(index, stable=True)
    return Rows(order, ids)


def factors_of(
    adapters: Sequence[Adapter], index: torch.Tensor | None, by_a: Gradients = (), by_b: Gradients = ()
) -> Factors:
    """The adapters as kernels take them: in memory as they are, those of mixed dtypes as float32."""
    wide = len({a.dtype for a, _, _ in adapters}) > 1
    given = [(_stored(a, wide), _stored(b, wide), s) for a, b, s in adapters]
    forms = _form([a for a, _, _ in given]), _form([b.t() for _, b, _ in given])
    if index is None:
        return Factors(given, None, forms)
    words: list[int] = []
    for i, adapter in enumerate(given):
        words += _words(adapter)
        words += [0 if i >= len(by) or (t := by[i]) is None else t.data_ptr() for by in (by_a, by_b)]
    words += [0] * (-len(words) % table.WORDS or table.WORDS * (not words))
    rows = torch.empty(len(words), dtype=torch.int64, device=index.device)
    fill(rows, words, alone=len(words) <= FEW_WORDS)
    return Factors(given, rows, forms)


def single_bits(number: float) -> int:
    """The bits of a number that was rounded to float32."""
    return memoryview(array("f", [number])).cast("B").cast("i")[0]


def _stored(factor: torch.Tensor, wide: bool) -> torch.Tensor:
    factor = factor.resolve_neg()
    return factor.float() if wide else factor


def _words(adapter: Adapter) -> list[int]:
    a, b, scaling = adapter
    return [a.data_ptr(), *a.stride(), b.data_ptr(), *b.t().stride(), a.shape[0], single_bits(scaling)]


def _form(factors: Sequence[torch.Tensor]) -> int:
    """How all of some factors [r, *] lie."""
    if any(t.data_ptr() % 16 for t in factors):
        return LOOSE
    for form, unit, step in ((ALONG, 1, 0), (ACROSS, 0, 1)):
        if all(t.stride(unit) == 1 and t.stride(step) % 8 == 0 for t in factors):
            return form
    return LOOSE
