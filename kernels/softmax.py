"""softmax, log_softmax and logsumexp over the middle of [outer, n, inner], with the options of attention and
sampling in the load.

Traffic: reads x once and writes out once where a row stays in registers (16384 elements); reads x twice, the
second time from the cache where it holds the rows of all programs, up to 131072; twice, all from memory,
beyond. Columns that do not fit are read three times. logsumexp: reads x once, columns twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.kernels import row_shapes
from pykernels.kernels.exponential import (
    INFINITY,
    LN2,
    finite,
    in_range,
    inverse_of,
    larger,
    largest,
    lifted_exp,
    narrowed,
    nearest_exponent,
    reference,
)
from pykernels.kernels.lanes import read, write
from pykernels.kernels.launch import READS
from pykernels.kernels.softmax_backward import log_softmax_backward, softmax_backward
from pykernels.kernels.softmax_tile import COLUMNS, inside, lines_of, logits, place, stretch, sum_of

__all__ = ["log_softmax", "log_softmax_backward", "logsumexp", "softmax", "softmax_backward"]

SOFTMAX = tl.constexpr(0)
LOG = tl.constexpr(1)
SUM = tl.constexpr(2)
STATES = tl.constexpr(256)
"""States of chunks that are joined at a time."""
NUMBERS = (
    "x", "out", "mask", "sink", "n", "inner", "lines", "s0", "s1", "s2", "t0", "t1", "safe", "chunk", "chunks"
)  # fmt: skip
"""Addresses, sizes and strides: a kernel is compiled for their types alone."""


@triton.jit
def sinks(sink, outer, column, live, t0, t1, SINK: tl.constexpr):
    """The sinks of some lines, -inf where there are none."""
    if SINK:
        b = read(sink, 0, outer * t0 + column * t1, live, tl.float32, 1, False)
    else:
        b = outer.to(tl.float32) * 0 - INFINITY
    return b


@triton.jit
def with_sink(total, b, most, SINK: tl.constexpr):
    """A sum in float64 and the sink's term, which no element gets."""
    wide = total.to(tl.float64)
    if SINK:
        shift, exponent = reference(most)
        wide += lifted_exp(b - shift, exponent, 6).to(tl.int64).to(tl.float64)
    return wide


@triton.jit
def scale_of(most, total, safe):
    """What turns w to probabilities: 1 / sum; NaN or 0 where there is none."""
    nothing = tl.where((safe != 0) & (most == -INFINITY), 0.0, most - most)
    return tl.where(finite(most), inverse_of(total), nothing)


@triton.jit
def logarithm_of(most, total, safe):
    """(high, rest, lse): y = (z - shift - high) - rest.

    The logarithm is taken of the sum in units of the largest element's own term, so that what exponentials
    are off by cancels where one element is all that counts: there y is exactly 0.
    """
    shift, exponent = reference(most)
    lead = most - shift
    term = lifted_exp(lead, exponent, 6).to(tl.float64)
    log_sum = lead.to(tl.float64) + tl.log(total / term)
    nothing = tl.where((safe != 0) & (most == -INFINITY), INFINITY, most - most)
    high = log_sum.to(tl.float32)
    rest = tl.where(finite(most), (log_sum - high.to(tl.float64)).to(tl.float32), 0.0)
    lse = tl.where(finite(most), (shift.to(tl.float64) + log_sum).to(tl.float32), most)
    return tl.where(finite(most), high, nothing), rest, lse


@triton.jit
def put(
    out, y, group, begin, end, n, inner, lines, live,
    TO: tl.constexpr, FORM: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr, N: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Round a tile and write it."""
    start, lane = place(group, begin, n, inner, FORM, LINES, N, ALIGN)
    exists = inside(live, end - begin, FORM, N, ALIGN, FULL)
    write(out, start, lane, exists, narrowed(y, TO), ALIGN, FULL and LINES == 1)


@triton.jit
def put_sums(out, lse, outer, column, live, inner, TO: tl.constexpr, ALIGN: tl.constexpr):
    """logsumexp's results, one a line."""
    write(out, 0, outer * inner + column, live, narrowed(lse, TO), min(ALIGN, 1), False)


@triton.jit
def put_stretch(
    out, most, total, safe, x, mask, group, begin, end, n, inner, lines, s0, s1, s2, temperature, softcap,
    KIND: tl.constexpr, DEGREE: tl.constexpr,
    IN: tl.constexpr, TO: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr,
    FORM: tl.constexpr, DENSE: tl.constexpr, ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr,
    LINES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Results of elements [begin, end) of lines whose sums are known."""
    live = lines_of(group, inner, lines, FORM, LINES, ALIGN)[2]
    shift, exponent = reference(most)
    scale = scale_of(most, total, safe)
    high, rest, _ = logarithm_of(most, total, safe)
    at = begin
    while at < end:
        z = logits(
            x, mask, group, at, end, n, inner, lines, s0, s1, s2, temperature, softcap,
            IN, MASK, CAPPED, TEMPERED, FORM, DENSE, ALIGN, MASK_ALIGN, LINES, N, False,
        )  # fmt: skip
        z = z - shift[:, None]
        if KIND == SOFTMAX:
            y = lifted_exp(z, exponent[:, None], DEGREE) * scale[:, None]
        else:
            y = (z - high[:, None]) - rest[:, None]
        put(out, y, group, at, end, n, inner, lines, live, TO, FORM, ALIGN, LINES, N, False)
        at += N


@triton.jit(do_not_specialize=NUMBERS)
def _whole(
    out: tl.int64, x: tl.int64, mask: tl.int64, sink: tl.int64, n: tl.int64, inner: tl.int64,
    lines: tl.int64, s0: tl.int64, s1: tl.int64, s2: tl.int64, t0: tl.int64, t1: tl.int64,
    temperature, softcap, safe,
    KIND: tl.constexpr, DEGREE: tl.constexpr, IN: tl.constexpr, TO: tl.constexpr, SINK: tl.constexpr,
    MASK: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr, DENSE: tl.constexpr,
    MASK_ALIGN: tl.constexpr, FORM: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr, N: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Rows that one program holds. FULL: they have N elements."""
    group = tl.program_id(0).to(tl.int64)
    outer, column, live = lines_of(group, inner, lines, FORM, LINES, ALIGN)
    z = logits(
        x, mask, group, 0, n, n, inner, lines, s0, s1, s2, temperature, softcap,
        IN, MASK, CAPPED, TEMPERED, FORM, DENSE, ALIGN, MASK_ALIGN, LINES, N, FULL,
    )  # fmt: skip
    b = sinks(sink, outer, column, live, t0, t1, SINK)
    most = larger(largest(z), b) if SINK else largest(z)
    shift, exponent = reference(most)
    z = z - shift[:, None]
    w, units = sum_of(z, exponent, DEGREE)
    total = with_sink(units, b, most, SINK)
    if KIND == SOFTMAX:
        y = w * scale_of(most, total, safe)[:, None]
        put(out, y, group, 0, n, n, inner, lines, live, TO, FORM, ALIGN, LINES, N, FULL)
    else:
        high, rest, lse = logarithm_of(most, total, safe)
        if KIND == LOG:
            y = (z - high[:, None]) - rest[:, None]
            put(out, y, group, 0, n, n, inner, lines, live, TO, FORM, ALIGN, LINES, N, FULL)
        else:
            put_sums(out, lse, outer, column, live, inner, TO, ALIGN)


@triton.jit(do_not_specialize=NUMBERS)
def _walked(
    out: tl.int64, x: tl.int64, mask: tl.int64, sink: tl.int64, n: tl.int64, inner: tl.int64,
    lines: tl.int64, s0: tl.int64, s1: tl.int64, s2: tl.int64, t0: tl.int64, t1: tl.int64,
    temperature, softcap, safe,
    KIND: tl.constexpr, DEGREE: tl.constexpr, IN: tl.constexpr, TO: tl.constexpr, SINK: tl.constexpr,
    MASK: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr, DENSE: tl.constexpr,
    MASK_ALIGN: tl.constexpr, FORM: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Rows that one program walks twice."""
    group = tl.program_id(0).to(tl.int64)
    outer, column, live = lines_of(group, inner, lines, FORM, LINES, ALIGN)
    b = sinks(sink, outer, column, live, t0, t1, SINK)
    most, units = stretch(
        b, x, mask, group, n * 0, n, n, inner, lines, s0, s1, s2, temperature, softcap,
        DEGREE, IN, MASK, CAPPED, TEMPERED, FORM, DENSE, ALIGN, MASK_ALIGN, LINES, N,
    )  # fmt: skip
    total = with_sink(units, b, most, SINK)
    if KIND == SUM:
        put_sums(out, logarithm_of(most, total, safe)[2], outer, column, live, inner, TO, ALIGN)
    else:
        put_stretch(
            out, most, total, safe,
            x, mask, group, n * 0, n, n, inner, lines, s0, s1, s2, temperature, softcap,
            KIND, DEGREE, IN, TO, MASK, CAPPED, TEMPERED, FORM, DENSE, ALIGN, MASK_ALIGN, LINES, N,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _chunked(
    out: tl.int64, x: tl.int64, mask: tl.int64, sink: tl.int64, n: tl.int64, inner: tl.int64,
    lines: tl.int64, s0: tl.int64, s1: tl.int64, s2: tl.int64, t0: tl.int64, t1: tl.int64,
    temperature, softcap, safe, mosts, sums, chunk: tl.int64, chunks: tl.int64,
    KIND: tl.constexpr, DEGREE: tl.constexpr, IN: tl.constexpr, TO: tl.constexpr, SINK: tl.constexpr,
    MASK: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr, DENSE: tl.constexpr,
    MASK_ALIGN: tl.constexpr, FORM: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The first pass over huge rows: the state of one chunk of some lines, [lines, chunks]."""
    group = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * chunk
    outer, column, live = lines_of(group, inner, lines, FORM, LINES, ALIGN)
    most, units = stretch(
        sinks(sink, outer, column, live, t0, t1, False),
        x, mask, group, begin, tl.minimum(begin + chunk, n), n, inner, lines, s0, s1, s2,
        temperature, softcap,
        DEGREE, IN, MASK, CAPPED, TEMPERED, FORM, DENSE, ALIGN, MASK_ALIGN, LINES, N,
    )  # fmt: skip
    state = (outer * inner + column) * chunks + tl.program_id(0) % chunks
    tl.store(mosts + state, most, mask=live)
    tl.store(sums + state, units, mask=live)


@triton.jit
def logarithm_of_unit(most):
    """log of what a state's sum is in units of, float64."""
    return tl.where(in_range(most), nearest_exponent(most).to(tl.float64) * LN2, most.to(tl.float64))


@triton.jit
def joined(mosts, sums, most, line, live, chunks, LINES: tl.constexpr):
    """(largest z, sum in float64) of whole rows from the states of their chunks, in order, and the sink's."""
    AT_ONCE: tl.constexpr = STATES // LINES
    slot = tl.arange(0, AT_ONCE)[None, :]
    c = chunks * 0
    while c < chunks:
        exists = live[:, None] & (c + slot < chunks)
        part = tl.load(mosts + line[:, None] * chunks + c + slot, mask=exists, other=-INFINITY)
        most = larger(most, largest(part))
        c += AT_ONCE
    unit = logarithm_of_unit(most)
    total = tl.zeros([LINES], tl.float64)
    c = chunks * 0
    while c < chunks:
        exists = live[:, None] & (c + slot < chunks)
        place = line[:, None] * chunks + c + slot
        part = tl.load(mosts + place, mask=exists, other=-INFINITY)
        units = tl.load(sums + place, mask=exists, other=0).to(tl.float64)
        total += tl.sum(units * tl.exp(logarithm_of_unit(part) - unit[:, None]), 1)
        c += AT_ONCE
    return most, total


@triton.jit(do_not_specialize=NUMBERS)
def _joined(
    out: tl.int64, x: tl.int64, mask: tl.int64, sink: tl.int64, n: tl.int64, inner: tl.int64,
    lines: tl.int64, s0: tl.int64, s1: tl.int64, s2: tl.int64, t0: tl.int64, t1: tl.int64,
    temperature, softcap, safe, mosts, sums, chunk: tl.int64, chunks: tl.int64,
    KIND: tl.constexpr, DEGREE: tl.constexpr, IN: tl.constexpr, TO: tl.constexpr, SINK: tl.constexpr,
    MASK: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr, DENSE: tl.constexpr,
    MASK_ALIGN: tl.constexpr, FORM: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The second pass: every program joins all states of its lines, in the same order, and writes a chunk."""
    pieces = chunks if KIND != SUM else chunks * 0 + 1
    group = (tl.program_id(0) // pieces).to(tl.int64)
    outer, column, live = lines_of(group, inner, lines, FORM, LINES, ALIGN)
    b = sinks(sink, outer, column, live, t0, t1, SINK)
    most, total = joined(mosts, sums, b, outer * inner + column, live, chunks, LINES)
    total = with_sink(total, b, most, SINK)
    if KIND == SUM:
        put_sums(out, logarithm_of(most, total, safe)[2], outer, column, live, inner, TO, ALIGN)
    else:
        begin = tl.program_id(0) % pieces * chunk
        put_stretch(
            out, most, total, safe,
            x, mask, group, begin, tl.minimum(begin + chunk, n), n, inner, lines, s0, s1, s2,
            temperature, softcap,
            KIND, DEGREE, IN, TO, MASK, CAPPED, TEMPERED, FORM, DENSE, ALIGN, MASK_ALIGN, LINES, N,
        )  # fmt: skip


def _run(
    kind: tl.constexpr,
    op: str,
    out: torch.Tensor,
    x: torch.Tensor,
    temperature: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sink: torch.Tensor | None,
    safe: bool,
) -> None:
    outer, n, inner = x.shape
    shape = row_shapes.shape_of(x.shape, row_shapes.FORWARD if softcap is None else row_shapes.CAPPED)
    s0, s1, s2 = (0, 0, 0) if mask is None else mask.stride()
    neighbours = s2 if shape.form == COLUMNS.value else s1
    numbers = (
        out.data_ptr(), x.data_ptr(), 0 if mask is None else mask.data_ptr(),
        0 if sink is None else sink.data_ptr(), n, inner, outer * inner, s0, s1, s2,
        *((0, 0) if sink is None else sink.stride()),
        float(temperature), float(softcap or 0), int(safe),
    )  # fmt: skip
    fixed = {
        "KIND": kind.value,
        "DEGREE": 4 if kind.value == SOFTMAX.value and out.dtype != torch.float32 else 6,
        "IN": READS[x.dtype],
        "TO": READS[out.dtype],
        "SINK": sink is not None,
        "MASK": None if mask is None else MASKS[mask.dtype],
        "CAPPED": softcap is not None,
        "TEMPERED": temperature != 1.0,
        "DENSE": neighbours == 1,
        "MASK_ALIGN": 1 if mask is None else _mask_alignment(mask, neighbours, shape),
        **shape.fixed(row_shapes.alignment(shape, x.shape, out, x)),
    }
    if shape.chunks(n) > 1:
        chunks = shape.chunks(n)
        states = (outer * inner, chunks)
        mosts = torch.empty(states, dtype=torch.float32, device=x.device)
        sums = torch.empty(states, dtype=torch.int64, device=x.device)
        rest = (mosts, sums, shape.chunk, chunks)
        row_shapes.run(op, _chunked, shape.groups * chunks, x, *numbers, *rest, **fixed)
        pieces = 1 if kind.value == SUM.value else chunks
        row_shapes.run(op, _joined, shape.groups * pieces, x, *numbers, *rest, **fixed)
    elif n > shape.tile:
        row_shapes.run(op, _walked, shape.groups, x, *numbers, **fixed)
    else:
        row_shapes.run(op, _whole, shape.groups, x, *numbers, **fixed, FULL=n == shape.tile)


MASKS = {**READS, torch.bool: tl.int1}


def _mask_alignment(mask: torch.Tensor, neighbours: int, shape: row_shapes.Shape) -> int:
    if mask.data_ptr() % mask.element_size():
        return 0
    steps = mask.stride()[:2] if shape.form == COLUMNS.value else mask.stride()[:1]
    wide = neighbours == 1 and mask.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in steps)
    return 16 if wide and shape.form != 1 else 1


def softmax(
    out: torch.Tensor,
    x: torch.Tensor,
    temperature: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sink: torch.Tensor | None,
    safe: bool,
) -> None:
    """out = softmax over the middle of x [outer, n, inner]; mask as x, sink [outer, inner]."""
    if out.numel():
        _run(SOFTMAX, "softmax", out, x, temperature, softcap, mask, sink, safe)


def log_softmax(
    out: torch.Tensor,
    x: torch.Tensor,
    temperature: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sink: None,
    safe: bool,
) -> None:
    """The logarithm of :func:`softmax`."""
    if out.numel():
        _run(LOG, "log_softmax", out, x, temperature, softcap, mask, None, safe)


def logsumexp(out: torch.Tensor, x: torch.Tensor, temperature: float) -> None:
    """out [outer, inner] = log(sum(exp(x / temperature))) over the middle of x [outer, n, inner]."""
    if x.shape[1] == 0:
        out.fill_(-torch.inf)
    elif out.numel():
        _run(SUM, "logsumexp", out, x, temperature, None, None, None, False)
