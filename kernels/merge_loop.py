"""The streaming merge that linear, TIES with known cuts and DARE share: keep policy x combine policy.

Traffic: reads base and n tuned tensors once, writes out once: (n + 2) * numel * sizeof(T). One pass. The
order of operations is that of ``csrc/cpu/merge_loop.h`` and ``csrc/math/elect.h``, so the bits are those of
the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pykernels.kernels.lanes import KEYS, NUMBERS, draws, read, rounded, write
from pykernels.kernels.table import (
    BASE,
    CHOICE,
    FIRST,
    KEY,
    LAMBDA,
    NUMEL,
    OFFSET,
    OUT,
    PLACE,
    SHARE,
    TUNED,
    VOTE,
    WEIGHT,
    floats,
    integers,
    job_of,
)

ALL = tl.constexpr(0)
LARGE = tl.constexpr(1)
RANDOM = tl.constexpr(2)
SUM = tl.constexpr(0)
WEIGHTED = tl.constexpr(1)
PLAIN = tl.constexpr(2)


@triton.jit
def edge_of(row, m, start, BLOCK: tl.constexpr):
    """Last lane of the block whose key may equal the cut's; -1 where none may, BLOCK where all."""
    edge = tl.load(integers(row, PLACE) + m) - tl.load(row + OFFSET) - start
    return tl.maximum(tl.minimum(edge, BLOCK), -1).to(tl.int32)


@triton.jit
def below(cut):
    """The largest magnitude with a key below ``cut``, for one comparison of floats to decide; NaN if none."""
    return tl.where(cut > 0, cut - 1, KEYS).to(tl.float32, bitcast=True)


@triton.jit
def dropped_small(row, m, delta, start, lane, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """By magnitude: a key below the cut's, or equal to it behind the last one kept. A NaN is kept."""
    cut = tl.minimum(tl.load(integers(row, CHOICE) + m), NUMBERS).to(tl.int32)
    after = tl.minimum(cut + 1, NUMBERS)
    edge = edge_of(row, m, start, BLOCK)
    if WHOLE:  # the edge is not inside the block
        least = below(tl.where(edge >= 0, cut, after))
    else:
        least = below(tl.where(lane <= edge, cut, after))
    return tl.abs(delta) <= least


@triton.jit
def dropped_random(row, m, delta, start, BLOCK: tl.constexpr):
    """At random: a 16-bit draw not below the threshold. A NaN is kept whatever its draw."""
    threshold = tl.load(integers(row, CHOICE) + m).to(tl.int32)
    model = tl.load(integers(row, PLACE) + m)
    call = (tl.load(row + OFFSET) + start) // 8 + tl.arange(0, BLOCK // 8)
    draw = draws(tl.load(row + KEY), model, call, BLOCK)
    return (draw >= threshold) & (delta == delta)


@triton.jit
def mean_of(pos, neg, up, down, wup, wdown, SHARED: tl.constexpr):
    """The side with the heavier vote; a draw, or a NaN vote, elects the positive one."""
    negative = pos < -neg
    mean = tl.where(negative, down, up)
    if SHARED:
        share = tl.where(negative, wdown, wup)
        mean = tl.div_rn(mean, tl.where(share == 0, 1.0, share))
    return mean


@triton.jit
def merge_lanes(
    row, start, limit, models,
    KEEP: tl.constexpr, COMBINE: tl.constexpr, SHARED: tl.constexpr, SKIP: tl.constexpr, BASED: tl.constexpr,
    IN: tl.constexpr, TO: tl.constexpr, ALIGN: tl.constexpr, MODELS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Elements ``start`` to ``start + limit`` of one job. With SKIP a model of weight +0 takes no part, its
    NaN neither (-0 is a weight that became 0); a list holds none, for the ops drop such models. MODELS is
    their number where the loop is to be unrolled, else 0: then it goes round by four, or, where draws need
    the registers, by one.
    """
    lane = tl.arange(0, BLOCK)
    mask = lane < limit
    zero = tl.zeros([BLOCK], tl.float32)
    base = zero
    if BASED:
        base = read(tl.load(row + BASE), start, lane, mask, IN, ALIGN, WHOLE)
    pos = zero
    neg = zero
    up = zero
    down = zero
    wup = zero
    wdown = zero
    UNROLL: tl.constexpr = MODELS if MODELS > 0 else (1 if KEEP == RANDOM else 4)
    for m in tl.range(0, MODELS if MODELS > 0 else models, loop_unroll_factor=UNROLL):
        delta = read(tl.load(row + TUNED + m), start, lane, mask, IN, ALIGN, WHOLE)
        if BASED:
            delta = delta - base
        weight = tl.load(floats(row, WEIGHT) + m)
        if SKIP:
            delta = tl.where(weight.to(tl.int32, bitcast=True) != 0, delta, 0.0)
        value = delta * weight
        vote = value
        if COMBINE == PLAIN:
            vote = delta * tl.load(floats(row, VOTE) + m)
        if KEEP == LARGE:
            vote = tl.where(dropped_small(row, m, delta, start, lane, BLOCK, WHOLE), 0.0, vote)
        if KEEP == RANDOM:
            vote = tl.where(dropped_random(row, m, delta, start, BLOCK), 0.0, vote)
        if COMBINE == SUM:
            pos += vote
        else:
            pos += tl.maximum(vote, 0.0, propagate_nan=tl.PropagateNan.ALL)
            neg += tl.minimum(vote, 0.0)  # of a NaN: 0
        right = vote <= 0  # false for a NaN, which so reaches the result through the positive side
        left = vote < 0
        if COMBINE == PLAIN:
            up = tl.where(right, up, up + value)
            down = tl.where(left, down + value, down)
        if SHARED:
            share = tl.load(floats(row, SHARE) + m)
            wup = tl.where(right, wup, wup + share)
            wdown = tl.where(left, wdown + share, wdown)
    if COMBINE == SUM:
        mean = pos
    elif COMBINE == WEIGHTED:
        mean = mean_of(pos, neg, pos, neg, wup, wdown, SHARED)
    else:
        mean = mean_of(pos, neg, up, down, wup, wdown, SHARED)
    merged = base + tl.load(floats(row, LAMBDA)) * mean
    write(tl.load(row + OUT), start, lane, mask, rounded(merged, TO), ALIGN, WHOLE)


@triton.jit
def uncut(row, start, models, MODELS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether no model's equals are kept in one part of the block and dropped in another."""
    whole = start >= 0
    UNROLL: tl.constexpr = MODELS if MODELS > 0 else 4
    for m in tl.range(0, MODELS if MODELS > 0 else models, loop_unroll_factor=UNROLL):
        edge = edge_of(row, m, start, BLOCK)
        whole = whole & ((edge < 0) | (edge >= BLOCK - 1))
    return whole


@triton.jit
def merge_block(
    rows, jobs, stride, models,
    KEEP: tl.constexpr, COMBINE: tl.constexpr, SHARED: tl.constexpr, SKIP: tl.constexpr, BASED: tl.constexpr,
    IN: tl.constexpr, TO: tl.constexpr, ALIGN: tl.constexpr, MODELS: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program's BLOCK of the launch."""
    block = tl.program_id(0).to(tl.int64)
    tile = block // (TILE // BLOCK)
    _, row = job_of(rows, jobs, stride, tile)
    start = (tile - tl.load(row + FIRST)) * TILE + block % (TILE // BLOCK) * BLOCK
    limit = tl.minimum(tl.load(row + NUMEL) - start, BLOCK).to(tl.int32)
    whole = limit == BLOCK
    if KEEP == LARGE:
        whole = whole & uncut(row, start, models, MODELS, BLOCK)
    if ALIGN == 16 and whole:
        merge_lanes(
            row, start, limit, models, KEEP, COMBINE, SHARED, SKIP, BASED, IN, TO, ALIGN, MODELS, BLOCK, True
        )
    elif limit > 0:
        merge_lanes(
            row, start, limit, models, KEEP, COMBINE, SHARED, SKIP, BASED, IN, TO, ALIGN, MODELS, BLOCK, False
        )
