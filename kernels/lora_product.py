"""y = x W^T + s h B^T + bias and dX = dY W + mask (s dh A): one product whose sums start from the low rank.

Traffic: reads x and W as often as their tiles leave the cache (at the least once: 2 (M K + N K) bytes), h and
B once a tile, writes y once, 2 M N bytes; the adapter costs r / K of the operations, three times that where
h, a float32, meets 16 bits. In float32 the adapter's term and bias are written, 4 M N bytes, and torch's own
product is added in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.kernels import lora_shapes
from pykernels.kernels.dropout import TILE, kept
from pykernels.kernels.lanes import rounded
from pykernels.kernels.launch import READS
from pykernels.kernels.lora_rows import (
    Factors,
    Rows,
    factor_at,
    factor_places,
    next_adapter,
    rows_at,
    scaling_at,
)
from pykernels.kernels.lora_shrink import DROPS_NOTHING
from pykernels.kernels.parts import dot, multiply
from pykernels.kernels.row_shapes import run, single

TOGETHER = tl.constexpr(8)
"""Tiles of rows that go through the columns side by side, for the cache's sake."""
VARYING = (
    "m", "ranks", "tiles", "adapters", "address", "across", "along", "rank", "scaling", "threshold", "key"
)  # fmt: skip


@triton.jit
def raised(
    acc, low, rows, mine, columns, inside, ranks, address, across, along, rank, scaling,
    FORM: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """acc + (scaling * low) B^T of a tile, for the rows of one adapter; the product is a float32."""
    first = rank * 0
    while first < rank:
        slot = first + tl.arange(0, RANKS)
        live = slot < rank
        h = tl.load(
            low + rows[:, None].to(tl.int64) * ranks + slot[None, :],
            mask=mine[:, None] & live[None, :],
            other=0,
        )
        place = factor_places(address, across, along, slot[:, None], columns[None, :], LOW, FORM)
        factor = tl.load(place, mask=live[:, None] & inside[None, :], other=0)
        acc = multiply(acc, h * scaling, factor, tl.float32, LOW)
        first += RANKS
    return acc


@triton.jit
def frozen(
    acc, x, weight, rows, columns, inside, k, sx0, sx1, sw0, sw1,
    EVEN: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """acc + x [M, K] W [K, N] of a tile."""
    lane = tl.arange(0, DEPTH).to(tl.int64)
    depth = tl.full([], DEPTH, tl.int64)  # strides are of 32 bits where they fit, steps need not
    left = x + rows[:, None].to(tl.int64) * sx0 + lane[None, :] * sx1
    right = weight + lane[:, None] * sw0 + columns[None, :] * sw1
    for step in range(0, STEPS if STEPS > 0 else tl.cdiv(k, DEPTH)):
        if EVEN:
            a = tl.load(left)
            b = tl.load(right)
        else:
            rest = lane < k - step * DEPTH
            a = tl.load(left, mask=rest[None, :], other=0)
            b = tl.load(right, mask=rest[:, None] & inside[None, :], other=0)
        acc = dot(acc, a, b)
        left += depth * sx1
        right += depth * sw0
    return acc


@triton.jit(do_not_specialize=VARYING)
def _lora_product(
    out, x, weight, bias, low, order, ids, table, m: tl.int64, n, k, sx0, sx1, sw0, sw1, ranks: tl.int64,
    tiles: tl.int64, adapters: tl.int32, address: tl.int64, across: tl.int64, along: tl.int64, rank: tl.int64,
    scaling, threshold, key: tl.int64,
    FROZEN: tl.constexpr, BIASED: tl.constexpr, DROP: tl.constexpr, TILED: tl.constexpr,
    GROUPED: tl.constexpr, FIELD: tl.constexpr, FORM: tl.constexpr, LOW: tl.constexpr, IN: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    RANKS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, COLUMNS] of the result."""
    pid = tl.program_id(0).to(tl.int64)
    wide = tl.cdiv(n, COLUMNS)
    first = pid // (TOGETHER * wide) * TOGETHER
    beside = tl.minimum(tiles - first, TOGETHER)
    inner = pid % (TOGETHER * wide)
    begin = inner // beside * COLUMNS
    place = (first + inner % beside) * ROWS + tl.arange(0, ROWS)
    rows, mine, exists = rows_at(order, ids, place, m, adapters, GROUPED)
    columns = begin + tl.arange(0, COLUMNS)
    inside = columns < n
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if GROUPED:
        adapter = next_adapter(mine, -1, adapters, 0, 1)
        while adapter < adapters:
            address, across, along, rank = factor_at(table, adapter, 0, 0, 0, 0, FIELD, True)
            acc = raised(
                acc, low, rows, mine == adapter, columns, inside, ranks, address, across, along, rank,
                scaling_at(table, adapter, 0, True), FORM, LOW, ROWS, COLUMNS, RANKS,
            )  # fmt: skip
            adapter = next_adapter(mine, adapter, adapters, 0, 1)
    else:
        acc = raised(
            acc, low, rows, exists, columns, inside, ranks, address, across, along, rank, scaling,
            FORM, LOW, ROWS, COLUMNS, RANKS,
        )  # fmt: skip
    if DROP:
        acc = tl.where(kept(key, threshold, rows, begin, n, ROWS, COLUMNS, TILED), acc, 0)
    if BIASED:
        acc += tl.load(bias + columns, mask=inside, other=0).to(tl.float32)[None, :]
    if FROZEN:
        acc = frozen(acc, x, weight, rows, columns, inside, k, sx0, sx1, sw0, sw1, EVEN, DEPTH, STEPS)
    if GROUPED:
        acc = tl.where((mine == adapters)[:, None], float("nan"), acc)
    bits = rounded(acc, IN)
    to = out.to(tl.pointer_type(bits.dtype)) + rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(to, bits, mask=exists[:, None] & inside[None, :])


def product(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    low: torch.Tensor,
    rows: Rows,
    factors: Factors,
    field: tl.constexpr,
    bias: torch.Tensor | None,
    drop: tuple[int, int],
) -> None:
    """out [M, N], contiguous = x [M, K] weight [K, N] + bias + what every row's adapter makes of ``low``.

    ``drop`` takes out of the adapter's term. float32: torch's own product is added to that.
    """
    (m, k), n, whole = x.shape, weight.shape[1], x.dtype != torch.float32
    threshold, key = drop
    drops = threshold < DROPS_NOTHING
    plain = rows.ids is None and not drops and factors.dtype == x.dtype
    shape = lora_shapes.product(m, x.dtype, x.device, plain, drops and n % TILE.value != 0)
    tiles = -(-m // shape.rows)
    run(
        "lora_linear", _lora_product, tiles * -(-n // shape.columns), x,
        out, x, weight, bias, low, rows.order, rows.ids, m=m, n=n, k=k, sx0=x.stride(0), sx1=x.stride(1),
        sw0=weight.stride(0), sw1=weight.stride(1), ranks=low.shape[1], tiles=tiles,
        adapters=len(factors.given), threshold=threshold, key=key,
        scaling=0.0 if rows.ids is not None else single(factors.given[0][2]),
        FROZEN=whole, BIASED=bias is not None, DROP=drops,
        TILED=lora_shapes.tiled(n, shape.columns), LOW=READS[factors.dtype], IN=READS[x.dtype],
        EVEN=k % shape.depth == 0 and n % shape.columns == 0,
        RANKS=lora_shapes.RANKS,
        **factors.of(field), **shape.fixed(-(-k // shape.depth)),
    )  # fmt: skip
    if not whole:
        out.addmm_(x, weight)
