"""The blocks of LoRA's kernels, by dtype, rank and number of rows: every choice of sizes stands here.

They follow from sizes and the device's shared memory alone; none was measured. Ranks are padded to a power
of two from 16 on, ranks above a block go round.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pykernels.kernels.launch import INTERPRETED
from pykernels.kernels.row_shapes import power_of_two

FEW = 32
"""Rows up to which a call streams the weight for one tile of rows."""
PROGRAMS = 256
"""As many programs a launch is cut into where its tiles alone would leave a device idle."""
LARGE_TILE = 200 << 10
"""Bytes of shared memory of a block, and more, where accumulators are outside of the threads' operands."""
LEAST_DEPTH = 256
"""Elements of the summed dimension that a part of a split sum has at the least."""


class Shape(NamedTuple):
    """A program's tile [rows, columns], the depth of a step of its sum, and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def fixed(self, steps: int) -> dict[str, int]:
        """Constants of a kernel. The interpreter can not loop up to a number given at run time."""
        return {
            "ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "num_warps": self.warps,
            "num_stages": self.stages, "STEPS": max(1, steps) if INTERPRETED else 0,
        }  # fmt: skip


FEW_ROWS = Shape(32, 32, 128, 4, 4)
SOME_ROWS = Shape(64, 128, 64, 8, 3)
MANY_ROWS = Shape(128, 128, 64, 8, 3)
MOST_ROWS = Shape(128, 256, 64, 8, 3)
LOW_ALONE = Shape(64, 128, 32, 8, 2)
"""Without the frozen product, which is torch's own in float32."""
RANKS = 16
"""Ranks of a step of the adapter's term."""
SHRINK = Shape(32, 32, 128, 8, 3)
SHRINK_WIDE = Shape(64, 16, 64, 8, 3)
"""Of a float32 factor: each warp holds all of its tile, in three parts."""
SHRINK_WIDEST = Shape(64, 16, 32, 8, 3)
"""Of float32 alone."""
REDUCE = Shape(32, 128, 32, 8, 3)
REDUCE_WIDE = Shape(16, 64, 32, 4, 3)
"""Columns are of the wide operand, rows of the rank; depth counts rows of x."""
MERGE = Shape(64, 128, 16, 8, 2)
MERGE_SCALED = Shape(16, 128, 16, 4, 2)
"""Of float32 factors, with magnitudes, and for their norms; depth counts the rank."""


def rank_block(rank: int, most: int) -> int:
    """A power of two from 16 to ``most``."""
    return min(most, max(16, power_of_two(rank)))


def product(m: int, dtype: torch.dtype, device: torch.device, plain: bool, singly: bool = False) -> Shape:
    """Of the frozen product with the adapter's term, or of that term alone.

    ``plain``: one 16-bit adapter and nothing dropped; all else takes registers that a large tile has not, and
    most of all what is dropped where it is drawn ``singly``, element by element.
    """
    if dtype == torch.float32:
        return LOW_ALONE
    if m <= FEW:
        return FEW_ROWS
    if singly:
        return SOME_ROWS
    if _shared_memory(device) >= LARGE_TILE:
        return MOST_ROWS if plain else MANY_ROWS
    return MANY_ROWS if plain else SOME_ROWS


def shrink(m: int, rank: int, dtype: torch.dtype, factor: torch.dtype) -> Shape:
    """Of h = x A^T; columns are of the rank."""
    shape = SHRINK
    if factor == torch.float32:
        shape = SHRINK_WIDEST if dtype == torch.float32 else SHRINK_WIDE
    if m <= FEW // 2:
        shape = shape._replace(rows=16, warps=4)
    return shape._replace(columns=rank_block(rank, shape.columns))


def reduce(rank: int, dtype: torch.dtype) -> Shape:
    """Of the gradients of A and B."""
    shape = REDUCE_WIDE if dtype == torch.float32 else REDUCE
    return shape._replace(rows=rank_block(rank, shape.rows))


def tiled(columns: int, block: int) -> bool:
    """Whether what is dropped can be drawn by whole tiles of 128 elements, or by halves of them."""
    return columns % 128 == 0 and block % 64 == 0 and (block == 64 or block % 128 == 0)


def splits(programs: int, length: int, least: int) -> int:
    """Parts of a sum over ``length`` so that about PROGRAMS run, each of ``least`` terms or more."""
    return max(1, min(length // least, PROGRAMS // max(1, programs)))


def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may take; the interpreter takes what there is."""
    if device.type != "cuda":
        return 0
    found: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return found
