"""Which form a reduction over rows takes on a device, by length of the row alone, and how it is launched.

A row that fits is held in the registers of one program, several short ones together; a longer one is walked
tile by tile, twice; a huge one is cut into chunks that programs share. No choice depends on the number of
rows, so a row has the same bits in every batch.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import torch
from triton.errors import TritonError

from pykernels.kernels.exponential import MOST_TERMS
from pykernels.kernels.launch import INTERPRETED, on
from pykernels.kernels.softmax_tile import COLUMNS, CONTIGUOUS, STRIDED

TILE = 65536 if INTERPRETED else 4096
"""Elements of several short rows that a program holds."""
WALKED = 131072
"""Longest row that one program walks: a device's programs find such rows in its cache the second time."""
SPLIT_TILE = 4096
"""Elements of a tile of a longer row; chunks are a multiple of it."""
CHUNKS = 512
"""As many chunks a row is cut into before they grow."""
WIDE = 32
"""Columns that programs take side by side: 64 bytes or more, where there are as many."""
FEW = 8
"""Fewer columns are taken for rows of strided elements."""


class Reach(NamedTuple):
    """What one kind of kernel holds: longest row in registers, tile of a walk, and elements of a thread."""

    whole: int
    walk: int
    each: int


FORWARD = BACKWARD = Reach(whole=16384, walk=16384, each=16)
CAPPED = Reach(whole=4096, walk=4096, each=8)
"""A softcap is worked out in float64, which takes twice the registers."""


class Shape(NamedTuple):
    """A launch over [outer, n, inner]: form, lines of a program, elements of a tile, chunks of a row."""

    form: int
    lines: int
    tile: int
    warps: int
    groups: int
    chunk: int

    def chunks(self, n: int) -> int:
        """Chunks of a row; 1 unless it is huge."""
        return -(-n // self.chunk)

    def fixed(self, aligned: int) -> dict[str, Any]:
        """Constants of a kernel."""
        return {
            "FORM": self.form, "ALIGN": aligned, "LINES": self.lines, "N": self.tile, "num_warps": self.warps
        }  # fmt: skip


def power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def shape_of(sizes: torch.Size, reach: Reach) -> Shape:
    """The form of rows [outer, n, inner]."""
    outer, n, inner = sizes
    tile, chunk = max(16, power_of_two(n)), max(n, 1)
    if inner >= FEW:
        form, lines = COLUMNS, min(WIDE, power_of_two(inner))
        groups = outer * -(-inner // lines)
    else:
        form, lines, groups = (CONTIGUOUS if inner == 1 else STRIDED), 1, outer * inner
    if n > WALKED:
        chunk = min(MOST_TERMS, max(SPLIT_TILE, power_of_two(-(-n // CHUNKS))))
        tile = min(SPLIT_TILE, reach.walk) // lines
    elif tile * lines > reach.whole:
        tile = reach.walk // (2 * lines if form == COLUMNS else 1)
    elif lines == 1 and tile < TILE:
        lines = TILE // tile
        groups = -(-groups // lines)
    return Shape(form.value, lines, tile, max(4, lines * tile // (32 * reach.each)), groups, chunk)


def alignment(shape: Shape, sizes: torch.Size, *tensors: torch.Tensor) -> int:
    """16 where every load of a tile may be of 16 bytes, 1 where elements lie at multiples of their size."""
    _, n, inner = sizes
    step = {COLUMNS.value: inner, STRIDED.value: 1}.get(shape.form, n)
    if step % 8 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors):
        return 16
    return int(all(t.data_ptr() % t.element_size() == 0 for t in tensors))


def single(number: float) -> float:
    """Rounded to float32, as kernels take it."""
    return array("f", [number])[0]


def run(op: str, kernel: Any, programs: int, like: torch.Tensor, *args: object, **fixed: Any) -> None:
    """Launch on the device and stream of ``like``."""
    try:
        with on(like.device):
            kernel[(programs,)](*args, **fixed, enable_fp_fusion=False)
    except (RuntimeError, TritonError) as error:
        raise RuntimeError(
            f"{op}: rows {list(like.shape)} of {like.dtype} on {like.device}: the launch failed: {error}"
        ) from error
