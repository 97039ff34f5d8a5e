"""h = dropout(x) A^T for every row's adapter, and dh = dY B: from full width down to the rank.

Traffic: reads x once (2 M K bytes of 16-bit x) and the factors of every tile's adapters, writes h, 4 M r
bytes; where few rows are split along K, h's parts are written and read once more. One pass, or two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.kernels import lora_shapes
from pykernels.kernels.dropout import kept
from pykernels.kernels.launch import READS
from pykernels.kernels.lora_rows import Factors, Rows, factor_at, factor_places, next_adapter, rows_at
from pykernels.kernels.parts import multiply
from pykernels.kernels.row_shapes import run

JOINED = 1024
"""Elements that a program joins."""
VARYING = (
    "m", "ranks", "chunk", "splits", "lots", "adapters", "address", "across", "along", "rank", "threshold",
    "key",
)  # fmt: skip


@triton.jit
def shrunk(
    low, x, rows, mine, first, begin, end, k, sx0, sx1, address, across, along, rank, ranks, threshold, key,
    DROP: tl.constexpr, TILED: tl.constexpr, FORM: tl.constexpr, LOW: tl.constexpr, IN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Sums over [begin, end) of K, for the rows of one adapter and COLUMNS of its rank from ``first`` on."""
    slot = first + tl.arange(0, COLUMNS)
    lane = tl.arange(0, DEPTH)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, STEPS if STEPS > 0 else tl.cdiv(end - begin, DEPTH)):
        at = begin + step * DEPTH
        column = at + lane
        inside = column < end
        place = x + rows[:, None].to(tl.int64) * sx0 + column[None, :] * sx1
        part = tl.load(place, mask=mine[:, None] & inside[None, :], other=0)
        if DROP:
            part = tl.where(kept(key, threshold, rows, at, k, ROWS, DEPTH, TILED), part, 0)
        place = factor_places(address, across, along, slot[None, :], column[:, None], LOW, FORM)
        factor = tl.load(place, mask=(slot < rank)[None, :] & inside[:, None], other=0)
        acc = multiply(acc, part, factor, IN, LOW)
    tl.store(
        low + rows[:, None].to(tl.int64) * ranks + slot[None, :],
        acc,
        mask=mine[:, None] & (slot < ranks)[None, :],
    )


@triton.jit(do_not_specialize=VARYING)
def _lora_shrink(
    low, x, order, ids, table, m: tl.int64, k, sx0, sx1, ranks: tl.int64, chunk: tl.int64, splits: tl.int64,
    lots: tl.int32, adapters: tl.int32, address: tl.int64, across: tl.int64, along: tl.int64, rank: tl.int64,
    threshold, key: tl.int64,
    DROP: tl.constexpr, TILED: tl.constexpr, GROUPED: tl.constexpr, FIELD: tl.constexpr, FORM: tl.constexpr,
    LOW: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """A tile of rows, a stretch of the rank, a part of K, and every ``lots``-th adapter of the tile."""
    pid = tl.program_id(0).to(tl.int64)
    across_rank = tl.cdiv(ranks, COLUMNS)
    first = pid % across_rank * COLUMNS
    split = pid // across_rank % splits
    lot = (pid // (across_rank * splits) % lots).to(tl.int32)
    place = pid // (across_rank * splits * lots) * ROWS + tl.arange(0, ROWS)
    rows, mine, exists = rows_at(order, ids, place, m, adapters, GROUPED)
    begin = split * chunk
    end = tl.minimum(begin + chunk, k)
    low += split * m * ranks
    if GROUPED:
        adapter = next_adapter(mine, -1, adapters, lot, lots)
        while adapter < adapters:
            address, across, along, rank = factor_at(table, adapter, 0, 0, 0, 0, FIELD, True)
            if first < rank:
                shrunk(
                    low, x, rows, mine == adapter, first, begin, end, k, sx0, sx1, address, across, along,
                    rank, ranks, threshold, key, DROP, TILED, FORM, LOW, IN, ROWS, COLUMNS, DEPTH, STEPS,
                )  # fmt: skip
            adapter = next_adapter(mine, adapter, adapters, lot, lots)
    else:
        shrunk(
            low, x, rows, exists, first, begin, end, k, sx0, sx1, address, across, along, rank,
            ranks, threshold, key, DROP, TILED, FORM, LOW, IN, ROWS, COLUMNS, DEPTH, STEPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "splits"])
def _lora_join(low, parts, count: tl.int64, splits, BLOCK: tl.constexpr):
    """Adds the parts of h in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros([BLOCK], tl.float32)
    split = splits * 0
    while split < splits:
        total += tl.load(parts + split * count + at, mask=inside, other=0)
        split += 1
    tl.store(low + at, total, mask=inside)


def shrink(
    low: torch.Tensor,
    x: torch.Tensor,
    rows: Rows,
    factors: Factors,
    field: tl.constexpr,
    drop: tuple[int, int],
) -> None:
    """low [M, ranks], contiguous float32 = x [M, K] without what is dropped, times every row's own factor.

    In rows without an adapter, and beyond an adapter's rank, ``low`` becomes 0.
    """
    (m, k), ranks, grouped = x.shape, low.shape[1], rows.ids is not None
    if not low.numel():
        return
    shape = lora_shapes.shrink(m, ranks, x.dtype, factors.dtype)
    tiles = -(-m // shape.rows) * -(-ranks // shape.columns)
    lots = min(len(factors.given), max(1, lora_shapes.PROGRAMS // tiles)) if grouped else 1
    parts = lora_shapes.splits(tiles * lots, k, lora_shapes.LEAST_DEPTH)
    chunk = -(-k // (parts * shape.depth)) * shape.depth
    to = low if parts == 1 else low.new_empty((parts, m, ranks))
    if grouped:
        to.zero_()
    if not lots:
        low.zero_()
        return
    threshold, key = drop
    run(
        "lora_linear", _lora_shrink, tiles * lots * parts, x,
        to, x, rows.order, rows.ids, m=m, k=k, sx0=x.stride(0), sx1=x.stride(1), ranks=ranks, chunk=chunk,
        splits=parts, lots=lots, adapters=len(factors.given), threshold=threshold, key=key,
        DROP=threshold < DROPS_NOTHING, TILED=lora_shapes.tiled(k, shape.depth),
        LOW=READS[factors.dtype], IN=READS[x.dtype],
        **factors.of(field), **shape.fixed(-(-min(chunk, k) // shape.depth)),
    )  # fmt: skip
    if parts > 1:
        programs = -(-low.numel() // JOINED)
        run("lora_linear", _lora_join, programs, x, low, to, low.numel(), parts, BLOCK=JOINED)


DROPS_NOTHING = 65536
"""The threshold below which every draw lies."""
