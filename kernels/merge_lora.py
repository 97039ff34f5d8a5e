"""W + sum of f_i B_i A_i, many adapters and many layers in one launch, and the norms that DoRA divides by.

Traffic: reads W once and writes it once, 2 * numel * sizeof(T); the factors stay in the cache, of which a
tile reads 64 rows of B (16, of float32) and 128 columns of A. A magnitude costs one more read of W, for the
norms. The adapters' products are summed in float32, scaled there, and rounded once with W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pykernels import dora_norm_torch, grouping
from pykernels.kernels import lora_shapes, table
from pykernels.kernels.lanes import read, rounded, write
from pykernels.kernels.launch import READS, WRITES, fill
from pykernels.kernels.lora_rows import single_bits
from pykernels.kernels.parts import multiply
from pykernels.kernels.row_shapes import run
from pykernels.kernels.table import FIRST, job_of

OUT = tl.constexpr(0)
WEIGHT = tl.constexpr(2)
LINES = tl.constexpr(3)
COLUMNS_OF = tl.constexpr(4)
SCALE = tl.constexpr(5)  # address of float32 [out]
COUNT = tl.constexpr(6)
ADAPTERS = tl.constexpr(7)

LEFT = tl.constexpr(0)  # address, stride along the weight's rows, stride along the rank
RIGHT = tl.constexpr(3)  # address, stride along the rank, stride along the weight's columns
RANK = tl.constexpr(6)
FACTOR = tl.constexpr(7)  # bits of a float32, or with magnitudes the address of float32 [out]
WORDS = tl.constexpr(8)

Tensors = Sequence[torch.Tensor]


@triton.jit
def low_rank(
    row, line, column, lines, columns,
    LOW: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """B A of one adapter in a tile, its left and right factors as the weight lies."""
    left = tl.load(row + LEFT)
    right = tl.load(row + RIGHT)
    rank = tl.load(row + RANK)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = rank * 0
    while first < rank:
        slot = first + tl.arange(0, DEPTH)
        live = slot < rank
        place = line[:, None] * tl.load(row + LEFT + 1) + slot[None, :] * tl.load(row + LEFT + 2)
        a = read(left, 0, place, (line < lines)[:, None] & live[None, :], LOW, ALIGN, False)
        place = slot[:, None] * tl.load(row + RIGHT + 1) + column[None, :] * tl.load(row + RIGHT + 2)
        b = read(right, 0, place, live[:, None] & (column < columns)[None, :], LOW, ALIGN, False)
        acc = multiply(acc, a, b, LOW, LOW)
        first += DEPTH
    return acc


@triton.jit
def along(address, line, column, lines, columns, BY_COLUMN: tl.constexpr):
    """float32 numbers of the weight's outputs, [.., 1] or [1, ..]."""
    place = address.to(tl.pointer_type(tl.float32))
    if BY_COLUMN:
        number = tl.load(place + column, mask=column < columns, other=0)[None, :]
    else:
        number = tl.load(place + line, mask=line < lines, other=0)[:, None]
    return number


@triton.jit
def tile_at(rows, jobs, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr):
    """(row of the table, lines and columns of the weight, first of both) of this program."""
    tile = tl.program_id(0).to(tl.int64)
    _, row = job_of(rows, jobs, stride, tile)
    lines = tl.load(row + LINES)
    columns = tl.load(row + COLUMNS_OF)
    if ALIGN == 16:
        columns = tl.multiple_of(columns, 8)
    tile -= tl.load(row + FIRST)
    wide = tl.cdiv(columns, COLUMNS)
    return row, lines, columns, tile // wide * ROWS, tile % wide * COLUMNS


@triton.jit(do_not_specialize=["jobs", "stride"])
def _merge_lora(
    rows, jobs, stride, SCALED: tl.constexpr, BY_COLUMN: tl.constexpr, LOW: tl.constexpr, IN: tl.constexpr,
    TO: tl.constexpr, ALIGN: tl.constexpr, LOW_ALIGN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of one weight."""
    row, lines, columns, top, begin = tile_at(rows, jobs, stride, ROWS, COLUMNS, ALIGN)
    line = top + tl.arange(0, ROWS)
    column = begin + tl.arange(0, COLUMNS)
    mask = (line < lines)[:, None] & (column < columns)[None, :]
    lane = tl.arange(0, ROWS)[:, None] * columns + tl.arange(0, COLUMNS)[None, :]
    start = top * columns + begin
    value = read(tl.load(row + WEIGHT), start, lane, mask, IN, ALIGN, False)
    if SCALED:
        value *= along(tl.load(row + SCALE), line, column, lines, columns, BY_COLUMN)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    count = tl.load(row + COUNT)
    i = count * 0
    while i < count:
        adapter = row + ADAPTERS + i * WORDS
        delta = low_rank(adapter, line, column, lines, columns, LOW, LOW_ALIGN, ROWS, COLUMNS, DEPTH)
        factor = tl.load(adapter + FACTOR)
        if SCALED:
            total += delta * along(factor, line, column, lines, columns, BY_COLUMN)
        else:
            total += delta * factor.to(tl.int32).to(tl.float32, bitcast=True)
        i += 1
    write(tl.load(row + OUT), start, lane, mask, rounded(value + total, TO), ALIGN, False)


@triton.jit(do_not_specialize=["jobs", "stride"])
def _lora_squares(
    rows, jobs, stride, sums, BY_COLUMN: tl.constexpr, LOW: tl.constexpr, IN: tl.constexpr,
    ALIGN: tl.constexpr, LOW_ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """sums [blocks, out], float64: of squares of W + s B A over a tile's columns, or its rows BY_COLUMN."""
    row, lines, columns, top, begin = tile_at(rows, jobs, stride, ROWS, COLUMNS, ALIGN)
    line = top + tl.arange(0, ROWS)
    column = begin + tl.arange(0, COLUMNS)
    mask = (line < lines)[:, None] & (column < columns)[None, :]
    lane = tl.arange(0, ROWS)[:, None] * columns + tl.arange(0, COLUMNS)[None, :]
    value = read(tl.load(row + WEIGHT), top * columns + begin, lane, mask, IN, ALIGN, False)
    adapter = row + ADAPTERS
    delta = low_rank(adapter, line, column, lines, columns, LOW, LOW_ALIGN, ROWS, COLUMNS, DEPTH)
    value += delta * tl.load(adapter + FACTOR).to(tl.int32).to(tl.float32, bitcast=True)
    wide = value.to(tl.float64)
    if BY_COLUMN:
        tl.store(sums + top // ROWS * columns + column, tl.sum(wide * wide, 0), mask=column < columns)
    else:
        tl.store(sums + begin // COLUMNS * lines + line, tl.sum(wide * wide, 1), mask=line < lines)


class Job(NamedTuple):
    """One weight, its adapters and what they are multiplied by: a number each, or [out] each and a scale."""

    out: torch.Tensor | None
    weight: torch.Tensor
    A: Tensors
    B: Tensors
    factors: Sequence[float] | Tensors
    scale: torch.Tensor | None
    fan_in_fan_out: bool

    @property
    def shape(self) -> lora_shapes.Shape:
        """A program's tile."""
        half = self.A[0].dtype != torch.float32
        plain = half and self.scale is None and self.out is not None
        return lora_shapes.MERGE if plain else lora_shapes.MERGE_SCALED

    def tiles(self) -> int:
        """Programs that it takes."""
        rows, columns = self.weight.shape
        return -(-rows // self.shape.rows) * -(-columns // self.shape.columns)

    def constants(self) -> dict[str, object]:
        """What a launch is compiled for."""
        shape = self.shape
        weights = [t for t in (self.weight, self.out) if t is not None]
        aligned = 16 if all(t.data_ptr() % 16 == 0 for t in weights) and self.weight.shape[1] % 8 == 0 else 1
        return {
            "BY_COLUMN": self.fan_in_fan_out, "LOW": READS[self.A[0].dtype], "IN": READS[self.weight.dtype],
            "ALIGN": aligned if _by_element(weights) else 0, "LOW_ALIGN": _by_element([*self.A, *self.B]),
            "ROWS": shape.rows, "COLUMNS": shape.columns, "DEPTH": shape.depth, "num_warps": shape.warps,
        }  # fmt: skip

    def words(self, first: int) -> list[int]:
        """Its row of the table; the job's first tile in the launch is ``first``."""
        words = [
            0 if self.out is None else self.out.data_ptr(), first, self.weight.data_ptr(), *self.weight.shape,
            0 if self.scale is None else self.scale.data_ptr(), len(self.A),
        ]  # fmt: skip
        for a, b, factor in zip(self.A, self.B, self.factors, strict=True):
            left, right = (a.t(), b.t()) if self.fan_in_fan_out else (b, a)
            words += [left.data_ptr(), *left.stride(), right.data_ptr(), *right.stride(), a.shape[0]]
            words.append(factor.data_ptr() if isinstance(factor, torch.Tensor) else single_bits(factor))
        return words


def _by_element(tensors: Tensors) -> int:
    return int(all(t.data_ptr() % t.element_size() == 0 for t in tensors))


def _launch(jobs: Sequence[Job], kernel: object, *more: object, **fixed: object) -> None:
    """``kernel`` over every tile of jobs of one kind; the host waits for nothing."""
    like, words, tiles = jobs[0].weight, [], 0
    stride = ADAPTERS.value + WORDS.value * max(len(job.A) for job in jobs)
    for i, job in enumerate(jobs):
        words += [0] * (i * stride - len(words)) + job.words(tiles)
        tiles += job.tiles()
    words += [0] * (-len(words) % table.WORDS)
    rows = torch.empty(len(words), dtype=torch.int64, device=like.device)
    fill(rows, words, alone=len(jobs) == 1)
    run("merge_lora", kernel, tiles, like, rows, len(jobs), stride, *more, **fixed, **jobs[0].constants())


def merge_lora(
    out: torch.Tensor,
    weight: torch.Tensor,
    A: Tensors,
    B: Tensors,
    scaling: Sequence[float],
    magnitude: Sequence[torch.Tensor | None],
    fan_in_fan_out: bool,
) -> None:
    """out = weight + sum(scaling * B @ A): one pass, and one more over the weight per magnitude."""
    wide = len({a.dtype for a in A}) > 1
    A, B = ([_stored(t, wide) for t in factors] for factors in (A, B))
    factors: Sequence[float] | Tensors = scaling
    scale = None
    if any(m is not None for m in magnitude):
        factors, scale = _behind(weight, A, B, scaling, magnitude, fan_in_fan_out)
    job = Job(out, weight, A, B, factors, scale, fan_in_fan_out)
    fixed = job.constants()
    kind = (weight.device, out.dtype, scale is None, *fixed.values())
    grouping.submit(_merge, kind, job, out.numel(), out.device)


def _merge(jobs: list[Job]) -> None:
    first = jobs[0]
    to = WRITES[first.weight.dtype if first.out is None else first.out.dtype]
    _launch(jobs, _merge_lora, SCALED=first.scale is not None, TO=to)


def dora_norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """Norms [out], float32, of the rows of weight + scaling * B @ A: one read of the weight.

    The kernel takes rows or columns that lie one behind the other; other weights go through torch's products.
    """
    if weight.is_contiguous():
        return row_norms(weight, A, B, scaling).float()
    if weight.t().is_contiguous():
        return row_norms(weight.t(), A, B, scaling, True).float()
    return dora_norm_torch.dora_norm(weight, A, B, scaling)


def row_norms(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, fan_in_fan_out: bool = False
) -> torch.Tensor:
    """The norms [out] of the rows (``fan_in_fan_out``: columns) of weight + scaling * B @ A, float64."""
    job = Job(None, weight, [A], [B], [scaling], None, fan_in_fan_out)
    (rows, columns), shape = weight.shape, job.shape
    blocks = -(-rows // shape.rows) if fan_in_fan_out else -(-columns // shape.columns)
    outputs = columns if fan_in_fan_out else rows
    sums = torch.empty((blocks, outputs), dtype=torch.float64, device=weight.device)
    _launch([job], _lora_squares, sums)
    return sums.sum(0).sqrt_()


def _behind(
    weight: torch.Tensor,
    A: Tensors,
    B: Tensors,
    scaling: Sequence[float],
    magnitude: Sequence[torch.Tensor | None],
    fan_in_fan_out: bool,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What every adapter and the weight are multiplied by, [out] float32: later magnitudes over norms too."""
    behind = torch.ones(len(B[0]), dtype=torch.float64, device=weight.device)
    factors: list[torch.Tensor] = []
    for a, b, s, m in zip(*map(reversed, (A, B, scaling, magnitude)), strict=True):  # type: ignore[call-overload]
        if m is not None:
            behind = behind * (m.double() / row_norms(weight, a, b, s, fan_in_fan_out))
        factors.insert(0, (behind * s).float())
    return factors, behind.float()


def _stored(factor: torch.Tensor, wide: bool) -> torch.Tensor:
    factor = factor.resolve_neg()
    return factor.float() if wide else factor
