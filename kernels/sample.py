"""Where a k-th magnitude lies: exactly for a tensor that one program holds, else a band around it from a
sample.

Traffic: _select_small reads (n + 1) * numel * sizeof(T) once. _sample reads SAMPLE elements at equal
distances of base and of every model. Neither counts with atomics: a rank is found bit by bit in keys that
stay in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pykernels.kernels.lanes import KEYS, magnitude, read
from pykernels.kernels.table import BASE, NUMEL, RANKS, TUNED, integers

STATE = tl.constexpr(8)
"""Words of a model's search: the band (LOW to HIGH, both within), the number of keys ABOVE and INSIDE it,
whether the data are to be read again because the sample misled (DATA), whether a round has narrowed the band
(ROUNDS)."""
LOW = tl.constexpr(0)
HIGH = tl.constexpr(1)
ABOVE = tl.constexpr(2)
INSIDE = tl.constexpr(3)
DATA = tl.constexpr(4)
ROUNDS = tl.constexpr(5)

NONE_KEPT = tl.constexpr(0xFFFFFFFF)
ALL_EQUALS = tl.constexpr(1 << 62)


@triton.jit
def keys_of(row, m, start, lane, mask, BASED: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr):
    """int32 keys of one model's deltas; -1, below every key, where masked."""
    delta = read(tl.load(row + TUNED + m), start, lane, mask, IN, ALIGN, False)
    if BASED:
        delta = delta - read(tl.load(row + BASE), start, lane, mask, IN, ALIGN, False)
    return tl.where(mask, magnitude(delta), -1)


@triton.jit
def nth_equal(equal, n):
    """Position of the n-th (from 1) true element."""
    return tl.sum((tl.cumsum(equal.to(tl.int32), 0) < n).to(tl.int32), 0)


@triton.jit
def nth_key(keys, rank):
    """The rank-th largest of int32 keys, rank from 1: the largest key that so many keys reach, bit by bit."""
    found = rank * 0
    for i in range(31):
        bit = found | (1 << (30 - i))
        found = tl.where(tl.sum((keys >= bit).to(tl.int32), 0) >= rank, bit, found)
    return found


@triton.jit(do_not_specialize=["jobs", "stride", "models"])
def _select_small(
    rows, jobs, stride, models, key, last, KEEP: tl.constexpr,
    BASED: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """The whole selection of one model of a tensor of at most SMALL elements."""
    job = tl.program_id(0) // models
    m = tl.program_id(0) % models
    row = rows + job.to(tl.int64) * stride
    rank = tl.load(integers(row, RANKS) + m).to(tl.int32)
    kth = tl.full([], NONE_KEPT, tl.int64)
    place = tl.full([], -1, tl.int64)
    if rank > 0:
        lane = tl.arange(0, SMALL)
        keys = keys_of(row, m, 0, lane, lane < tl.load(row + NUMEL), BASED, IN, ALIGN)
        found = nth_key(keys, rank)
        kth = found.to(tl.int64)
        place = tl.full([], ALL_EQUALS, tl.int64)
        if not KEEP:
            above = tl.sum((keys > found).to(tl.int32), 0)
            place = nth_equal(keys == found, rank - above).to(tl.int64)
    tl.store(key + tl.program_id(0), kth)
    tl.store(last + tl.program_id(0), place)


@triton.jit(do_not_specialize=["jobs", "stride", "models"])
def _sample(
    rows, jobs, stride, models, states,
    BASED: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """The band [LOW, HIGH] of one model that holds the k-th key unless the sample misleads."""
    m = tl.program_id(0) % models
    row = rows + (tl.program_id(0) // models).to(tl.int64) * stride
    ranks = integers(row, RANKS) + m
    if tl.load(ranks) > 0:
        lane = tl.arange(0, SAMPLE)
        place = lane.to(tl.int64) * tl.load(row + NUMEL) // SAMPLE
        keys = keys_of(row, m, 0, place, lane >= 0, BASED, IN, ALIGN)
        high = tl.load(ranks + models).to(tl.int32)
        low = tl.load(ranks + 2 * models).to(tl.int32)
        state = states + tl.program_id(0) * STATE
        tl.store(state + HIGH, tl.where(high < 1, KEYS, nth_key(keys, high)).to(tl.int64))
        tl.store(state + LOW, tl.where(low > SAMPLE, 0, nth_key(keys, low)).to(tl.int64))
