"""Gradients of softmax, y * (g - sum(g * y)), and of log_softmax, g - e^y * sum(g).

Traffic: reads grad and y once and writes out once where a row stays in registers (16384 elements); longer
rows are read twice. Sums are float64, in an order that depends on the length of a row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.kernels import row_shapes
from pykernels.kernels.exponential import lifted_exp, narrowed
from pykernels.kernels.lanes import read, write
from pykernels.kernels.launch import READS
from pykernels.kernels.softmax_tile import inside, lines_of, place

LEAST = tl.constexpr(-104.0)
"""e^y is 0 in float32 below."""
SUMS = tl.constexpr(256)
"""Sums of chunks that are added up at a time."""
NUMBERS = ("out", "grad", "y", "n", "inner", "lines", "chunk", "chunks")


@triton.jit
def pair(
    grad, y, group, begin, end, n, inner, live,
    BY: tl.constexpr, IN: tl.constexpr, FORM: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr,
    N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """(g, y) [LINES, N] from ``begin`` on as float32, 0 past ``end``."""
    start, lane = place(group, begin, n, inner, FORM, LINES, N, ALIGN)
    exists = inside(live, end - begin, FORM, N, ALIGN, FULL)
    g = read(grad, start, lane, exists, BY, ALIGN, FULL and LINES == 1)
    return g, read(y, start, lane, exists, IN, ALIGN, FULL and LINES == 1)


@triton.jit
def sum_of(g, y, LOG: tl.constexpr):
    """[LINES, N] -> [LINES], float64."""
    terms = g if LOG else g * y
    return tl.sum(terms.to(tl.float64), 1)


@triton.jit
def put_gradient(
    out, g, y, total, scale, group, begin, end, n, inner, live,
    LOG: tl.constexpr, TO: tl.constexpr, FORM: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr,
    N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """scale * y * (g - total), or scale * (g - e^y * total), rounded."""
    start, lane = place(group, begin, n, inner, FORM, LINES, N, ALIGN)
    exists = inside(live, end - begin, FORM, N, ALIGN, FULL)
    by = total.to(tl.float32)[:, None]
    if LOG:
        w = tl.where(y < LEAST, 0.0, lifted_exp(y, total.to(tl.int32)[:, None] * 0, 6))
        d = g - (w * 2.0**-44) * by  # as small sums cannot be scaled down
    else:
        d = y * (g - by)
    write(out, start, lane, exists, narrowed(d * scale, TO), ALIGN, FULL and LINES == 1)


@triton.jit(do_not_specialize=NUMBERS)
def _softmax_backward_whole(
    out: tl.int64, grad: tl.int64, y: tl.int64, n: tl.int64, inner: tl.int64, lines: tl.int64, scale,
    LOG: tl.constexpr, BY: tl.constexpr, IN: tl.constexpr, TO: tl.constexpr,
    FORM: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr, N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Rows that one program holds. FULL: they have N elements."""
    group = tl.program_id(0).to(tl.int64)
    live = lines_of(group, inner, lines, FORM, LINES, ALIGN)[2]
    g, p = pair(grad, y, group, 0, n, n, inner, live, BY, IN, FORM, ALIGN, LINES, N, FULL)
    put_gradient(
        out, g, p, sum_of(g, p, LOG), scale, group, 0, n, n, inner, live,
        LOG, TO, FORM, ALIGN, LINES, N, FULL,
    )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _softmax_backward_chunks(
    out: tl.int64, grad: tl.int64, y: tl.int64, n: tl.int64, inner: tl.int64, lines: tl.int64, scale,
    sums, chunk: tl.int64, chunks: tl.int64,
    LOG: tl.constexpr, BY: tl.constexpr, IN: tl.constexpr, TO: tl.constexpr,
    FORM: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The first pass over longer rows: the sum of one chunk of some lines, [lines, chunks]."""
    group = (tl.program_id(0) // chunks).to(tl.int64)
    at = tl.program_id(0) % chunks * chunk
    end = tl.minimum(at + chunk, n)
    outer, column, live = lines_of(group, inner, lines, FORM, LINES, ALIGN)
    total = tl.zeros([LINES], tl.float64)
    while at < end:
        g, p = pair(grad, y, group, at, end, n, inner, live, BY, IN, FORM, ALIGN, LINES, N, False)
        total += sum_of(g, p, LOG)
        at += N
    tl.store(sums + (outer * inner + column) * chunks + tl.program_id(0) % chunks, total, mask=live)


@triton.jit
def joined(sums, line, live, chunks, LINES: tl.constexpr):
    """The sums of whole rows from those of their chunks, in order."""
    AT_ONCE: tl.constexpr = SUMS // LINES
    slot = tl.arange(0, AT_ONCE)[None, :]
    total = tl.zeros([LINES], tl.float64)
    c = chunks * 0
    while c < chunks:
        exists = live[:, None] & (c + slot < chunks)
        total += tl.sum(tl.load(sums + line[:, None] * chunks + c + slot, mask=exists, other=0), 1)
        c += AT_ONCE
    return total


@triton.jit(do_not_specialize=NUMBERS)
def _softmax_backward_joined(
    out: tl.int64, grad: tl.int64, y: tl.int64, n: tl.int64, inner: tl.int64, lines: tl.int64, scale,
    sums, chunk: tl.int64, chunks: tl.int64,
    LOG: tl.constexpr, BY: tl.constexpr, IN: tl.constexpr, TO: tl.constexpr,
    FORM: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The second pass: every program adds up all sums of its lines, in the same order, and writes a chunk."""
    group = (tl.program_id(0) // chunks).to(tl.int64)
    at = tl.program_id(0) % chunks * chunk
    end = tl.minimum(at + chunk, n)
    outer, column, live = lines_of(group, inner, lines, FORM, LINES, ALIGN)
    total = joined(sums, outer * inner + column, live, chunks, LINES)
    while at < end:
        g, p = pair(grad, y, group, at, end, n, inner, live, BY, IN, FORM, ALIGN, LINES, N, False)
        put_gradient(
            out, g, p, total, scale, group, at, end, n, inner, live, LOG, TO, FORM, ALIGN, LINES, N, False
        )  # fmt: skip
        at += N


@triton.jit(do_not_specialize=NUMBERS)
def _softmax_backward_walked(
    out: tl.int64, grad: tl.int64, y: tl.int64, n: tl.int64, inner: tl.int64, lines: tl.int64, scale,
    LOG: tl.constexpr, BY: tl.constexpr, IN: tl.constexpr, TO: tl.constexpr,
    FORM: tl.constexpr, ALIGN: tl.constexpr, LINES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Rows that one program walks twice."""
    group = tl.program_id(0).to(tl.int64)
    live = lines_of(group, inner, lines, FORM, LINES, ALIGN)[2]
    total = tl.zeros([LINES], tl.float64)
    at = n * 0
    while at < n:
        g, p = pair(grad, y, group, at, n, n, inner, live, BY, IN, FORM, ALIGN, LINES, N, False)
        total += sum_of(g, p, LOG)
        at += N
    at = n * 0
    while at < n:
        g, p = pair(grad, y, group, at, n, n, inner, live, BY, IN, FORM, ALIGN, LINES, N, False)
        put_gradient(
            out, g, p, total, scale, group, at, n, n, inner, live, LOG, TO, FORM, ALIGN, LINES, N, False
        )  # fmt: skip
        at += N


def _run(log: bool, op: str, out: torch.Tensor, grad: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    outer, n, inner = y.shape
    if not out.numel():
        return
    shape = row_shapes.shape_of(y.shape, row_shapes.BACKWARD)
    numbers = (
        out.data_ptr(),
        grad.data_ptr(),
        y.data_ptr(),
        n,
        inner,
        outer * inner,
        row_shapes.single(scale),
    )
    fixed = {
        "LOG": log,
        "BY": READS[grad.dtype],
        "IN": READS[y.dtype],
        "TO": READS[out.dtype],
        **shape.fixed(row_shapes.alignment(shape, y.shape, out, grad, y)),
    }
    chunks = shape.chunks(n)
    if chunks > 1:
        sums = torch.empty(outer * inner, chunks, dtype=torch.float64, device=y.device)
        for kernel in (_softmax_backward_chunks, _softmax_backward_joined):
            row_shapes.run(op, kernel, shape.groups * chunks, y, *numbers, sums, shape.chunk, chunks, **fixed)
    elif n > shape.tile:
        row_shapes.run(op, _softmax_backward_walked, shape.groups, y, *numbers, **fixed)
    else:
        row_shapes.run(op, _softmax_backward_whole, shape.groups, y, *numbers, **fixed, FULL=n == shape.tile)


def softmax_backward(out: torch.Tensor, grad: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    """out = scale * y * (grad - sum(grad * y)) over the middle of [outer, n, inner]."""
    _run(False, "softmax_backward", out, grad, y, scale)


def log_softmax_backward(out: torch.Tensor, grad: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    """out = scale * (grad - exp(y) * sum(grad)) over the middle of [outer, n, inner]."""
    _run(True, "log_softmax_backward", out, grad, y, scale)
