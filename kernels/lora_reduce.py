"""dA = s dh^T dropout(x) and dB^T = s h^T dY, per adapter: sums over its rows, in a fixed order.

Traffic: reads x or dY once a block of the rank (2 M K bytes), h or dh once a tile of columns, writes and
reads the parts of sums over the rows, about PROGRAMS tiles of float32, and writes the gradient. Two passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.kernels import lora_shapes
from pykernels.kernels.dropout import kept
from pykernels.kernels.lanes import rounded
from pykernels.kernels.launch import READS
from pykernels.kernels.lora_rows import (
    FACTOR_A,
    GRADIENT_A,
    GRADIENT_B,
    RANK,
    WORDS,
    Factors,
    Rows,
    scaling_at,
)
from pykernels.kernels.lora_shrink import DROPS_NOTHING
from pykernels.kernels.parts import multiply
from pykernels.kernels.row_shapes import run, single

LEAST_ROWS = 256
"""Rows that a part of a sum has at the least."""
FINISHED = 1024
VARYING = ("m", "ranks", "rank", "splits", "adapters", "threshold", "key")


@triton.jit
def stretch_of(starts, adapter, split, splits, m, DEPTH: tl.constexpr, GROUPED: tl.constexpr):
    """The places [begin, end) of a part of an adapter's rows; parts begin at multiples of DEPTH of them."""
    begin = m * 0
    end = m
    if GROUPED:
        begin = tl.load(starts + adapter)
        end = tl.load(starts + adapter + 1)
    length = tl.cdiv(tl.cdiv(end - begin, splits), DEPTH) * DEPTH
    begin += split * length
    return begin, tl.minimum(begin + length, end)


@triton.jit(do_not_specialize=VARYING)
def _lora_reduce(
    parts, low, x, order, starts, table, m: tl.int64, n, sx0, sx1, ranks: tl.int64, rank: tl.int64,
    splits: tl.int64, adapters: tl.int64, threshold, key: tl.int64,
    DROP: tl.constexpr, TILED: tl.constexpr, GROUPED: tl.constexpr, FIELD: tl.constexpr, IN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """parts [splits, adapters, ranks, n]: ROWS of the rank, COLUMNS of x, a part of an adapter's rows."""
    pid = tl.program_id(0).to(tl.int64)
    wide = tl.cdiv(n, COLUMNS)
    tall = tl.cdiv(ranks, ROWS)
    at = pid % wide * COLUMNS
    first = pid // wide % tall * ROWS
    adapter = pid // (wide * tall) % adapters
    split = pid // (wide * tall * adapters)
    begin, end = stretch_of(starts, adapter, split, splits, m, DEPTH, GROUPED)
    if GROUPED:
        rank = tl.load(table + adapter * WORDS + RANK)
        asked = tl.load(table + adapter * WORDS + FIELD) != 0
        end = tl.where(asked & (first < rank), end, begin)
    slot = first + tl.arange(0, ROWS)
    columns = at + tl.arange(0, COLUMNS)
    inside = columns < n
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, STEPS if STEPS > 0 else tl.cdiv(end - begin, DEPTH)):
        rows = begin + step * DEPTH + tl.arange(0, DEPTH)
        exists = rows < end
        if GROUPED:
            rows = tl.load(order + rows, mask=exists, other=0)
        place = low + rows[None, :] * ranks + slot[:, None]
        h = tl.load(place, mask=exists[None, :] & (slot < rank)[:, None], other=0)
        place = x + rows[:, None] * sx0 + columns[None, :] * sx1
        part = tl.load(place, mask=exists[:, None] & inside[None, :], other=0)
        if DROP:
            part = tl.where(kept(key, threshold, rows, at, n, DEPTH, COLUMNS, TILED), part, 0)
        acc = multiply(acc, h, part, tl.float32, IN)
    to = parts + ((split * adapters + adapter) * ranks + slot[:, None]) * n + columns[None, :]
    tl.store(to, acc, mask=(slot < ranks)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["ranks", "rank", "splits", "adapters", "address", "scaling"])
def _lora_finish(
    parts, table, n, ranks: tl.int64, rank: tl.int64, splits: tl.int64, adapters: tl.int64, address: tl.int64,
    scaling, GROUPED: tl.constexpr, FIELD: tl.constexpr, TURNED: tl.constexpr, TO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """An adapter's gradient [r, n], or TURNED [n, r]: its parts summed in their order, scaled, rounded."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(ranks * n, BLOCK)
    adapter = pid // blocks
    if GROUPED:
        rank = tl.load(table + adapter * WORDS + RANK)
        address = tl.load(table + adapter * WORDS + FIELD)
    at = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (at < rank * n) & (address != 0)
    total = tl.zeros([BLOCK], tl.float32)
    split = splits * 0
    while split < splits:
        total += tl.load(parts + (split * adapters + adapter) * ranks * n + at, mask=inside, other=0)
        split += 1
    bits = rounded(total * scaling_at(table, adapter, scaling, GROUPED), TO)
    if TURNED:
        at = at % n * rank + at // n
    tl.store(address.to(tl.pointer_type(bits.dtype)) + at, bits, mask=inside)


def reduce(
    targets: list[torch.Tensor | None],
    low: torch.Tensor,
    x: torch.Tensor,
    rows: Rows,
    starts: torch.Tensor | None,
    factors: Factors,
    field: tl.constexpr,
    drop: tuple[int, int],
) -> None:
    """Every target, contiguous: the gradient of A from low = dh and x, or of B from low = h and x = dY.

    ``starts`` [adapters + 1]: places of each adapter's rows in the order; the table holds the addresses.
    """
    if all(t is None for t in targets) or not low.shape[1]:
        return
    (m, n), ranks, count, grouped = x.shape, low.shape[1], len(targets), rows.ids is not None
    shape, (threshold, key) = lora_shapes.reduce(ranks, x.dtype), drop
    tiles = -(-n // shape.columns) * -(-ranks // shape.rows) * count
    splits = lora_shapes.splits(tiles, m, LEAST_ROWS)
    parts = low.new_empty((splits, count, ranks, n))
    one = None if grouped else targets[0]
    shared = {
        "table": factors.rows, "n": n, "ranks": ranks, "rank": ranks, "splits": splits, "adapters": count,
        "GROUPED": grouped, "FIELD": (GRADIENT_A if field is FACTOR_A else GRADIENT_B).value,
    }  # fmt: skip
    run(
        "lora_linear_backward", _lora_reduce, tiles * splits, x, parts, low, x, rows.order, starts,
        m=m, sx0=x.stride(0), sx1=x.stride(1), threshold=threshold, key=key, DROP=threshold < DROPS_NOTHING,
        TILED=lora_shapes.tiled(n, shape.columns), IN=READS[x.dtype], **shared,
        **shape.fixed(-(-m // shape.depth)),
    )  # fmt: skip
    run(
        "lora_linear_backward", _lora_finish, -(-ranks * n // FINISHED) * count, x, parts,
        address=0 if one is None else one.data_ptr(),
        scaling=0.0 if grouped else single(factors.given[0][2]),
        TURNED=field is not FACTOR_A, TO=READS[factors.dtype], BLOCK=FINISHED, **shared,
    )  # fmt: skip
