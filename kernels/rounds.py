"""From the band around a k-th magnitude to the exact key and the last one kept among its equals.

Traffic: _collect reads (n + 1) * numel * sizeof(T) and writes the keys inside the band, 4 bytes each, and 4
bytes per tile and model. Each of the ROUNDS rounds, and _equals, reads those keys again; a tile that held
more than CAPACITY of them, or all tiles if the sample misled, they read from the tensors instead. _locate
reads one tile. Only integers are counted with atomics, so every run gives the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pykernels.kernels.lanes import KEYS
from pykernels.kernels.sample import (
    ABOVE,
    ALL_EQUALS,
    DATA,
    HIGH,
    INSIDE,
    LOW,
    NONE_KEPT,
    ROUNDS,
    STATE,
    keys_of,
    nth_equal,
)
from pykernels.kernels.table import FIRST, NUMEL, RANKS, integers, job_of

BINS = tl.constexpr(2048)
"""Counters of a round: three rounds settle 31 bits."""
GROUP = tl.constexpr(8)
"""Tiles whose stored keys one program of a round reads."""


@triton.jit
def band_of(state, row, m):
    """(low, high, above, inside, data): the band, or all keys where the sample's band misses the rank."""
    rank = tl.load(integers(row, RANKS) + m)
    above = tl.load(state + ABOVE)
    inside = tl.load(state + INSIDE)
    held = (above < rank) & (rank <= above + inside)
    low = tl.where(held, tl.load(state + LOW), 0)
    high = tl.where(held, tl.load(state + HIGH), KEYS)
    inside = tl.where(held, inside, tl.load(row + NUMEL))
    return low, high, tl.where(held, above, 0), inside, tl.where(held, tl.load(state + DATA), 1)


@triton.jit
def shift_of(low, high):
    """The least shift that maps the band into BINS."""
    step = tl.arange(0, 32)
    return tl.sum((high - low >= (tl.full([], BINS, tl.int64) << step.to(tl.int64))).to(tl.int32), 0)


@triton.jit
def tile_keys(
    row, m, tile, BASED: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The keys of one tile of one model, -1 past the tensor's end."""
    start = (tile - tl.load(row + FIRST)) * TILE
    lane = tl.arange(0, TILE)
    mask = lane < tl.load(row + NUMEL) - start
    return keys_of(row, m, start, lane, mask, BASED, IN, ALIGN)


@triton.jit
def stored_keys(buffer, counts, tiles, models, m, data, CAPACITY: tl.constexpr):
    """The keys [GROUP, CAPACITY] that _collect stored for some tiles, -1 in empty places."""
    count = tl.load(counts + tiles * models + m)
    count = tl.where((count > CAPACITY) | (data > 0), 0, count)
    slot = tl.arange(0, CAPACITY)
    place = buffer + (tiles * models + m)[:, None] * CAPACITY + slot[None, :]
    return tl.load(place, mask=slot[None, :] < count[:, None], other=-1)


@triton.jit(do_not_specialize=["jobs", "stride", "models"])
def _collect(
    rows, jobs, stride, models, states, counts, buffer,
    BASED: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Count the keys above and inside every model's band in one tile; store those inside, in order."""
    tile = tl.program_id(0).to(tl.int64)
    job, row = job_of(rows, jobs, stride, tile)
    m = 0
    while m < models:
        if tl.load(integers(row, RANKS) + m) > 0:
            state = states + (job * models + m) * STATE
            low = tl.load(state + LOW).to(tl.int32)
            high = tl.load(state + HIGH).to(tl.int32)
            keys = tile_keys(row, m, tile, BASED, IN, ALIGN, TILE)
            within = (keys >= low) & (keys <= high)
            count = tl.sum(within.to(tl.int32), 0)
            tl.atomic_add(state + ABOVE, tl.sum((keys > high).to(tl.int32), 0).to(tl.int64), sem="relaxed")
            tl.atomic_add(state + INSIDE, count.to(tl.int64), sem="relaxed")
            tl.store(counts + tile * models + m, count)
            if (low < high) & (count > 0) & (count <= CAPACITY):
                slot = tl.cumsum(within.to(tl.int32), 0) - 1
                tl.store(buffer + (tile * models + m) * CAPACITY + slot, keys, mask=within)
        m += 1


@triton.jit
def count_digits(bins, keys, low, high, shift):
    """One more in the bin of every key inside the band."""
    within = (keys >= low) & (keys <= high)
    digit = tl.where(within, keys - low.to(tl.int32), 0) >> shift
    tl.atomic_add(bins + digit, 1, mask=within, sem="relaxed")


@triton.jit(do_not_specialize=["jobs", "stride", "models", "copies"])
def _count(
    rows, jobs, stride, models, states, counts, buffer, bins, copies,
    BASED: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """A round's histogram over GROUP tiles of one model; bins stand in copies, lest equal keys queue up."""
    m = tl.program_id(0) % models
    group = (tl.program_id(0) // models).to(tl.int64)
    job, row = job_of(rows, jobs, stride, group * GROUP)
    search = job * models + m
    low, high, _, _, data = band_of(states + search * STATE, row, m)
    if (tl.load(integers(row, RANKS) + m) > 0) & (low < high):
        shift = shift_of(low, high)
        mine = bins + (search.to(tl.int64) * copies + group % copies) * BINS
        tiles = group * GROUP + tl.arange(0, GROUP)
        keys = stored_keys(buffer, counts, tiles, models, m, data, CAPACITY)
        count_digits(mine, keys, low, high, shift)
        for t in range(GROUP):
            tile = group * GROUP + t
            if (data > 0) | (tl.load(counts + tile * models + m) > CAPACITY):
                count_digits(mine, tile_keys(row, m, tile, BASED, IN, ALIGN, TILE), low, high, shift)


@triton.jit(do_not_specialize=["jobs", "stride", "models", "copies"])
def _narrow(rows, jobs, stride, models, states, bins, copies):
    """The bin that holds one model's rank becomes its band; the counters are zeroed for the next round."""
    search = tl.program_id(0)
    m = search % models
    row = rows + (search // models).to(tl.int64) * stride
    state = states + search * STATE
    low, high, above, _, data = band_of(state, row, m)
    rank = tl.load(integers(row, RANKS) + m)
    if (rank > 0) & (low < high):
        lane = tl.arange(0, BINS)
        count = tl.zeros([BINS], tl.int64)
        copy = 0
        while copy < copies:
            mine = bins + (search.to(tl.int64) * copies + copy) * BINS + lane
            count += tl.load(mine)
            tl.debug_barrier()  # whoever zeroes a counter, all have been read
            tl.store(mine, tl.zeros([BINS], tl.int32))
            copy += 1
        least = above + tl.sum(count, 0) - tl.cumsum(count, 0) + count  # keys in this bin, or larger
        digit = tl.sum((least >= rank).to(tl.int32), 0) - 1
        shift = shift_of(low, high).to(tl.int64)
        bottom = low + (digit.to(tl.int64) << shift)
        inside = tl.sum(tl.where(lane == digit, count, 0), 0)
        tl.store(state + LOW, bottom)
        tl.store(state + HIGH, tl.minimum(high, bottom + (tl.full([], 1, tl.int64) << shift) - 1))
        tl.store(state + ABOVE, tl.sum(tl.where(lane == digit, least, 0), 0) - inside)
        tl.store(state + INSIDE, inside)
        tl.store(state + DATA, data)
        tl.store(state + ROUNDS, tl.full([], 1, tl.int64))


@triton.jit(do_not_specialize=["jobs", "stride", "models"])
def _equals(
    rows, jobs, stride, models, states, counts, buffer,
    BASED: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """The number of keys equal to the k-th in each of GROUP tiles of one model, in place of those inside the
    band.

    A band of a single key needs nothing: those inside are the equals.
    """
    m = tl.program_id(0) % models
    group = (tl.program_id(0) // models).to(tl.int64)
    job, row = job_of(rows, jobs, stride, group * GROUP)
    state = states + (job * models + m) * STATE
    if (tl.load(integers(row, RANKS) + m) > 0) & (tl.load(state + ROUNDS) > 0):
        kth = tl.load(state + LOW).to(tl.int32)
        data = tl.load(state + DATA)
        part = tl.arange(0, GROUP)
        tiles = group * GROUP + part
        keys = stored_keys(buffer, counts, tiles, models, m, data, CAPACITY)
        equal = tl.sum((keys == kth).to(tl.int32), 1)
        for t in range(GROUP):
            tile = group * GROUP + t
            if (data > 0) | (tl.load(counts + tile * models + m) > CAPACITY):
                again = tile_keys(row, m, tile, BASED, IN, ALIGN, TILE)
                equal = tl.where(part == t, tl.sum((again == kth).to(tl.int32), 0), equal)
        tl.debug_barrier()  # every thread has read the counts that are now replaced
        tl.store(counts + tiles * models + m, equal)


@triton.jit(do_not_specialize=["jobs", "stride", "models"])
def _locate(
    rows, jobs, stride, models, states, counts, key, last, KEEP: tl.constexpr,
    BASED: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One model's cut: its key, and the flat index of the last equal to keep (with KEEP: all)."""
    search = tl.program_id(0)
    m = search % models
    row = rows + (search // models).to(tl.int64) * stride
    state = states + search * STATE
    rank = tl.load(integers(row, RANKS) + m)
    kth = tl.full([], NONE_KEPT, tl.int64)
    place = tl.full([], -1, tl.int64)
    if rank > 0:
        kth = tl.load(state + LOW)
        place = tl.full([], ALL_EQUALS, tl.int64)
        if not KEEP:
            first = tl.load(row + FIRST)
            lane = tl.arange(0, STEP)
            end = first + (tl.load(row + NUMEL) + TILE - 1) // TILE
            left = rank - tl.load(state + ABOVE)
            tile = first
            count = tl.load(counts + (tile + lane) * models + m, mask=tile + lane < end, other=0).to(tl.int64)
            total = tl.sum(count, 0)
            while total < left:
                left -= total
                tile += STEP
                place_of = counts + (tile + lane) * models + m
                count = tl.load(place_of, mask=tile + lane < end, other=0).to(tl.int64)
                total = tl.sum(count, 0)
            upto = tl.cumsum(count, 0)
            tile += tl.sum((upto < left).to(tl.int32), 0)
            left -= tl.max(tl.where(upto < left, upto, 0), 0)
            keys = tile_keys(row, m, tile, BASED, IN, ALIGN, TILE)
            place = (tile - first) * TILE + nth_equal(keys == kth, left)
    tl.store(key + search, kth)
    tl.store(last + search, place)
