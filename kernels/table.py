"""The table that a launch works from: a row of 64-bit words per tensor, and how a block finds its row.

A row holds addresses, so inputs are read where they are; a float or integer list of the host stands behind
the addresses in the same row, a tensor of the device at an address of its own: kernels see no difference.
Traffic: a block reads its row, (16 + n) * 8 bytes, and log2(jobs) words to find it.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUMEL = tl.constexpr(0)
FIRST = tl.constexpr(1)  # the job's first tile in the launch
OFFSET = tl.constexpr(2)  # flat index of element 0 in its tensor
OUT = tl.constexpr(3)
BASE = tl.constexpr(4)
KEY = tl.constexpr(5)  # of the draws, 64 bits
LAMBDA = tl.constexpr(6)  # from here on addresses: float32 [1]
WEIGHT = tl.constexpr(7)  # float32 [n]
VOTE = tl.constexpr(8)  # float32 [n]
SHARE = tl.constexpr(9)  # float32 [n]
CHOICE = tl.constexpr(10)  # int64 [n]: cut keys, or thresholds of the draws
PLACE = tl.constexpr(11)  # int64 [n]: flat indices of the last kept, or model numbers of the draws
RANKS = tl.constexpr(12)  # int64 [3, n]: k, and the ranks in the sample that enclose it
GRAD = tl.constexpr(13)
TUNED = tl.constexpr(16)  # n addresses

WORDS = 40


@triton.jit
def job_of(rows, jobs, stride, tile):
    """(number, row) of the job that ``tile`` belongs to: the last one that does not begin behind it."""
    low = jobs * 0
    high = jobs
    while low + 1 < high:
        middle = (low + high) // 2
        before = tl.load(rows + middle.to(tl.int64) * stride + FIRST) <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, rows + low.to(tl.int64) * stride


@triton.jit
def floats(row, FIELD: tl.constexpr):
    """The float32 list behind a field."""
    return tl.load(row + FIELD).to(tl.pointer_type(tl.float32))


@triton.jit
def integers(row, FIELD: tl.constexpr):
    """The int64 list behind a field."""
    return tl.load(row + FIELD).to(tl.pointer_type(tl.int64))


@triton.jit(do_not_specialize=list(range(1, 42)))
def _pack(
    table, start: tl.int64,
    w0: tl.int64, w1: tl.int64, w2: tl.int64, w3: tl.int64, w4: tl.int64, w5: tl.int64, w6: tl.int64,
    w7: tl.int64, w8: tl.int64, w9: tl.int64, w10: tl.int64, w11: tl.int64, w12: tl.int64, w13: tl.int64,
    w14: tl.int64, w15: tl.int64, w16: tl.int64, w17: tl.int64, w18: tl.int64, w19: tl.int64, w20: tl.int64,
    w21: tl.int64, w22: tl.int64, w23: tl.int64, w24: tl.int64, w25: tl.int64, w26: tl.int64, w27: tl.int64,
    w28: tl.int64, w29: tl.int64, w30: tl.int64, w31: tl.int64, w32: tl.int64, w33: tl.int64, w34: tl.int64,
    w35: tl.int64, w36: tl.int64, w37: tl.int64, w38: tl.int64, w39: tl.int64,
):  # fmt: skip
    """Write 40 words that came as arguments: a table without a copy from the host, fit for a CUDA graph."""
    words = (
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15, w16, w17, w18, w19, w20, w21,
        w22, w23, w24, w25, w26, w27, w28, w29, w30, w31, w32, w33, w34, w35, w36, w37, w38, w39,
    )  # fmt: skip
    for i in tl.static_range(40):
        tl.store(table + start + i, words[i])
