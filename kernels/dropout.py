"""What dropout keeps of a tile, drawn anew from the elements' flat indices: nothing is read for it."""

from __future__ import annotations

import triton
import triton.language as tl

from pykernels.kernels.lanes import draws

TILE = tl.constexpr(128)
"""Elements that 16 calls of Philox draw together, see :func:`pykernels.kernels.lanes.draws`."""


HALF = tl.constexpr(64)


@triton.jit
def half_draws(key, call, second, ROWS: tl.constexpr):
    """Draws of a half tile a row, [ROWS, 64], from the tile's calls [ROWS, 16]; the other half is lost."""
    zero = tl.zeros([ROWS, 16], tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, call.to(tl.uint32), (call >> 32).to(tl.uint32), zero, zero)
    pair = tl.join(tl.where(second, w2, w0), tl.where(second, w3, w1))  # [ROWS, lane, word]
    words = tl.reshape(tl.permute(pair, [0, 2, 1]), [ROWS, 32])
    return tl.interleave((words & 0xFFFF).to(tl.int32), (words >> 16).to(tl.int32))


@triton.jit
def kept(
    key, threshold, rows, begin, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILED: tl.constexpr
):
    """[ROWS, COLUMNS]: whether elements begin + .. of some rows of a matrix of so many columns stay.

    TILED: its rows are whole tiles of draws, and so are the elements asked for, or a half: a call serves
    eight elements, or four. Else each element makes a call of its own.
    """
    wide = rows[:, None].to(tl.int64) * columns
    if TILED and COLUMNS == HALF:
        call = (wide + begin // TILE * TILE) // 8 + tl.arange(0, 16)[None, :]
        draw = half_draws(key, call, begin % TILE != 0, ROWS)
    elif TILED:
        call = tl.reshape((wide + begin) // 8 + tl.arange(0, COLUMNS // 8)[None, :], [ROWS * COLUMNS // 8])
        draw = tl.reshape(draws(key, threshold * 0, call, ROWS * COLUMNS), [ROWS, COLUMNS])
    else:
        flat = wide + begin + tl.arange(0, COLUMNS)[None, :]
        inner = (flat % TILE).to(tl.int32)
        call = flat // TILE * 16 + inner % 32 // 2
        zero = tl.zeros([ROWS, COLUMNS], tl.uint32)
        w0, w1, w2, w3 = tl.philox(key, call.to(tl.uint32), (call >> 32).to(tl.uint32), zero, zero)
        low = tl.where(inner < 32, w0, w1)
        word = tl.where(inner < 64, low, tl.where(inner < 96, w2, w3))
        draw = tl.where(inner % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)
    return draw < threshold
