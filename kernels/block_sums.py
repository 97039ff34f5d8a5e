"""Sums over blocks of 4096 elements in float64, by the fixed tree of all backends: 16 interleaved lanes in
order of the elements, then neighbouring lanes.

A program takes BLOCKS blocks of one model side by side, in steps of 128 elements of each, so that every lane
of every block has a thread and nothing is left to a reduction whose order is Triton's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pykernels.kernels.lanes import read
from pykernels.kernels.table import BASE, TUNED

BLOCKS = 8
"""Blocks a program sums: 128 lanes."""


@triton.jit
def places(first, step, BLOCKS: tl.constexpr):
    """Flat indices [BLOCKS * 128] of 128 elements of every block, from block ``first`` on."""
    lane = tl.arange(0, BLOCKS * 128)
    return (first + lane // 128) * 4096 + step * 128 + lane % 128


@triton.jit
def deltas(
    row, m, place, mask, BASED: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """float32 deltas at flat indices, 0 where masked."""
    delta = read(tl.load(row + TUNED + m), place * 0, place, mask, IN, ALIGN, WHOLE)
    if BASED:
        delta = delta - read(tl.load(row + BASE), place * 0, place, mask, IN, ALIGN, WHOLE)
    return delta


@triton.jit
def add_rows(total, values, BLOCKS: tl.constexpr):
    """Lanes [BLOCKS, 16] float64 plus values [BLOCKS * 128]: 8 rows of 16 a block, one after another."""
    by_lane = tl.permute(tl.reshape(values, [BLOCKS, 8, 16]), [0, 2, 1])
    even, odd = tl.split(tl.reshape(by_lane, [BLOCKS, 16, 4, 2]))
    from0, from2 = tl.split(tl.reshape(even, [BLOCKS, 16, 2, 2]))
    from1, from3 = tl.split(tl.reshape(odd, [BLOCKS, 16, 2, 2]))
    row0, row4 = tl.split(from0)
    row1, row5 = tl.split(from1)
    row2, row6 = tl.split(from2)
    row3, row7 = tl.split(from3)
    rows = (row0, row1, row2, row3, row4, row5, row6, row7)
    for r in tl.static_range(8):
        total += rows[r].to(tl.float64)
    return total


@triton.jit
def halves(lanes, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """Sums of neighbouring lanes: [BLOCKS, WIDTH] -> [BLOCKS, WIDTH // 2]."""
    left, right = tl.split(tl.reshape(lanes, [BLOCKS, WIDTH // 2, 2]))
    return left + right


@triton.jit
def tree(lanes, BLOCKS: tl.constexpr):
    """[BLOCKS, 16] -> [BLOCKS]: neighbours are added until one is left."""
    lanes = halves(lanes, 16, BLOCKS)
    lanes = halves(lanes, 8, BLOCKS)
    lanes = halves(lanes, 4, BLOCKS)
    left, right = tl.split(lanes)
    return left + right
