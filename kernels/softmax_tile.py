"""Tiles [LINES, N] of rows: where their elements lie, what logits they give, and the sums of stretches.

A line is one reduction of [outer, n, inner]. Three forms differ in which elements are neighbours: CONTIGUOUS
lines (inner is 1), STRIDED ones (inner is small), and COLUMNS, whose tiles are neighbours along inner.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pykernels.kernels.exponential import (
    INFINITY,
    capped,
    finite,
    in_range,
    larger,
    largest,
    lifted_exp,
    nearest_exponent,
    reference,
)
from pykernels.kernels.lanes import read

CONTIGUOUS = tl.constexpr(0)
STRIDED = tl.constexpr(1)
COLUMNS = tl.constexpr(2)


@triton.jit
def lines_of(group, inner, lines, FORM: tl.constexpr, LINES: tl.constexpr, ALIGN: tl.constexpr):
    """(outer, place along inner, whether there is such a line), each [LINES], of one program."""
    r = tl.arange(0, LINES)
    if FORM == COLUMNS:
        across = tl.cdiv(inner, LINES)
        first = group % across * LINES
        outer = group // across + r * 0
        column = first + r
        left = tl.minimum(inner - first, LINES).to(tl.int32)
        if ALIGN == 16:
            left = tl.multiple_of(left, 8)
        live = r < left
    else:
        line = group * LINES + r
        live = line < lines
        if FORM == STRIDED:
            outer = line // inner
            column = line % inner
        else:
            outer = line
            column = r.to(tl.int64) * 0
    return outer, column, live


@triton.jit
def place(
    group, begin, n, inner,
    FORM: tl.constexpr, LINES: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(flat index of the tile's first element, the others' distances [LINES, N]) from ``begin`` of a row.

    Hints stand on results of operations: on an argument they would be lost with the call.
    """
    r = tl.arange(0, LINES)[:, None]
    k = tl.arange(0, N)[None, :]
    if FORM == CONTIGUOUS:
        start = group * LINES * n + begin
        if LINES == 1:
            lane = k + r
        else:
            rows = r * n.to(tl.int32)  # rows that share a program are short
            lane = (tl.multiple_of(rows, (8, 8)) if ALIGN == 16 else rows) + k
    elif FORM == STRIDED:
        line = group * LINES + r
        start = begin * inner
        lane = line // inner * n * inner + line % inner + k * inner
    else:
        across = tl.cdiv(inner, LINES)
        start = (group // across * n + begin) * inner + group % across * LINES
        steps = k * inner
        lane = (tl.multiple_of(steps, (8, 8)) if ALIGN == 16 else steps) + r
    return start, lane


@triton.jit
def inside(
    live, left, FORM: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """Which elements [LINES, N] exist, ``left`` in a line; FULL: all N do."""
    k = tl.arange(0, N)
    count = tl.minimum(left, N).to(tl.int32)
    if FORM == CONTIGUOUS and ALIGN == 16:
        count = tl.multiple_of(count, 8)
    if FULL:
        mask = live[:, None] & (k >= 0)[None, :]
    else:
        mask = live[:, None] & (k < count)[None, :]
    return mask


@triton.jit
def masked(
    z, mask, outer, column, begin, exists, s0, s1, s2,
    MASK: tl.constexpr, FORM: tl.constexpr, DENSE: tl.constexpr, ALIGN: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """z through a mask of strides s0, s1, s2. DENSE: neighbours in a tile are neighbours in the mask."""
    k, base = begin + tl.arange(0, N), outer * s0
    along = k * s1 if FORM == COLUMNS or not DENSE else k
    if ALIGN == 16:
        base, along = tl.multiple_of(base, 16), tl.multiple_of(along, 16)
    base += column if FORM == COLUMNS and DENSE else column * s2
    lane = base[:, None] + along[None, :]
    if MASK == tl.int1:
        place = mask.to(tl.pointer_type(tl.uint8))
        if ALIGN == 16:
            place = tl.multiple_of(place, 16)
        z = tl.where(tl.load(place + lane, mask=exists, other=0) != 0, z, -INFINITY)
    else:
        z = z + read(mask, 0, lane, exists, MASK, ALIGN, False)
    return z


@triton.jit
def logits(
    x, mask, group, begin, end, n, inner, lines, s0, s1, s2, temperature, softcap,
    IN: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr,
    FORM: tl.constexpr, DENSE: tl.constexpr, ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr,
    LINES: tl.constexpr, N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """z [LINES, N] from ``begin`` on, -inf past ``end``: softcap, temperature, mask, rounded at each step."""
    outer, column, live = lines_of(group, inner, lines, FORM, LINES, ALIGN)
    start, lane = place(group, begin, n, inner, FORM, LINES, N, ALIGN)
    exists = inside(live, end - begin, FORM, N, ALIGN, FULL)
    z = read(x, start, lane, exists, IN, ALIGN, FULL and LINES == 1)
    if CAPPED:
        z = capped(z, softcap)
    if TEMPERED:
        z = tl.div_rn(z, temperature)
    if MASK is not None:
        z = masked(
            z, mask, outer, column, begin, exists, s0, s1, s2, MASK, FORM, DENSE, MASK_ALIGN, N
        )  # fmt: skip
    if not FULL:
        z = tl.where(exists, z, -INFINITY)
    return z


@triton.jit
def sum_of(z, exponent, DEGREE: tl.constexpr):
    """(w, its sum in units of 2^(E - 44)) of a tile."""
    w = lifted_exp(z, exponent[:, None], DEGREE)
    return w, tl.sum(w.to(tl.int64), 1)


@triton.jit
def stretch(
    most, x, mask, group, begin, end, n, inner, lines, s0, s1, s2, temperature, softcap,
    DEGREE: tl.constexpr,
    IN: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr,
    FORM: tl.constexpr, DENSE: tl.constexpr, ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr,
    LINES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """(largest z, sum) of elements [begin, end) of some lines, tile after tile; ``most`` is known already.

    The exponent rises with the largest z so far, which shifts the sum to the right. Rows whose largest z lies
    past LARGEST are read again, shifted by it. So are columns, always: their sums are then those of whole
    rows, bit for bit.
    """
    total = tl.zeros([LINES], tl.int64)
    exponent = nearest_exponent(most)
    at = begin
    while at < end:
        z = logits(
            x, mask, group, at, end, n, inner, lines, s0, s1, s2, temperature, softcap,
            IN, MASK, CAPPED, TEMPERED, FORM, DENSE, ALIGN, MASK_ALIGN, LINES, N, False,
        )  # fmt: skip
        most = larger(most, largest(z))
        if FORM != COLUMNS:
            raised = nearest_exponent(most)
            total = total >> tl.minimum(raised - exponent, 63).to(tl.int64)
            exponent = raised
            total += sum_of(z, exponent, DEGREE)[1]
        at += N
    beyond = finite(most) & (in_range(most) == 0)
    again = tl.max(beyond.to(tl.int32), 0)
    if FORM == COLUMNS:
        again = again * 0 + 1
    if again > 0:
        shift, exponent = reference(most)
        sums = tl.zeros([LINES], tl.int64)
        at = begin
        while at < end:
            z = logits(
                x, mask, group, at, end, n, inner, lines, s0, s1, s2, temperature, softcap,
                IN, MASK, CAPPED, TEMPERED, FORM, DENSE, ALIGN, MASK_ALIGN, LINES, N, False,
            )  # fmt: skip
            sums += sum_of(z - shift[:, None], exponent, DEGREE)[1]
            at += N
        total = tl.where(beyond | (FORM == COLUMNS), sums, total)
    return most, total
