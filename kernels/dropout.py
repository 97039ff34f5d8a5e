"""What dropout keeps of a tile, drawn anew from the elements' flat indices: nothing is read for it."""

from __future__ import annotations

import triton
import triton.language as tl

from pykernels.kernels.lanes import draws

TILE = tl.constexpr(128)
"""Elements that 16 calls of Philox draw together, see :func:`pykernels.kernels.lanes.draws`."""


@triton.jit
def kept(
    key, threshold, rows, begin, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILED: tl.constexpr
):
    """[ROWS, COLUMNS]: whether elements begin + .. of some rows of a matrix of so many columns stay.

    TILED: its rows and the tile begin with a tile of draws and are whole ones, and each call serves eight
    elements; else each element makes a call of its own.
    """
    if TILED:
        first = (rows[:, None].to(tl.int64) * columns + begin) // 8
        call = tl.reshape(first + tl.arange(0, COLUMNS // 8)[None, :], [ROWS * COLUMNS // 8])
        draw = tl.reshape(draws(key, threshold * 0, call, ROWS * COLUMNS), [ROWS, COLUMNS])
    else:
        flat = rows[:, None].to(tl.int64) * columns + begin + tl.arange(0, COLUMNS)[None, :]
        inner = (flat % TILE).to(tl.int32)
        call = flat // TILE * 16 + inner % 32 // 2
        zero = tl.zeros([ROWS, COLUMNS], tl.uint32)
        w0, w1, w2, w3 = tl.philox(key, call.to(tl.uint32), (call >> 32).to(tl.uint32), zero, zero)
        low = tl.where(inner < 32, w0, w1)
        word = tl.where(inner < 64, low, tl.where(inner < 96, w2, w3))
        draw = tl.where(inner % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)
    return draw < threshold
