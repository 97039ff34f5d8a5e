"""The exact cut of every model, and histograms for a cut over many chunks.

Traffic: kth_magnitude reads (n + 1) * numel * sizeof(T) once and a little again
(:mod:`pykernels.kernels.selection`). magnitude_histogram reads 2 * n * numel * sizeof(T) and counts with
integer atomics into 8 copies of its bins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.cut import Cut
from pykernels.kernels import selection
from pykernels.kernels.launch import READS, TILE, Job, Launch, Tensors, alignment
from pykernels.kernels.rounds import tile_keys
from pykernels.kernels.table import CHOICE, integers
from pykernels.rows import NONE_KEPT

BINS = 65536
COPIES = 8


def kth_magnitude(base: torch.Tensor | None, tuned: Tensors, k: list[int]) -> Cut:
    """The exact cut of every model, int64 tensors [n] on the device; the lowest index first."""
    numel = tuned[0].numel()
    if not numel:
        none = torch.full((len(k),), NONE_KEPT, dtype=torch.int64, device=tuned[0].device)
        return Cut(none, torch.full_like(none, -1))
    job = Job(None, base, tuned, ranks=selection.ranks(k, numel))
    key, last = selection.room([job])
    selection.select(Launch("kth_magnitude", [job], selection.unit([job])), key, last)
    return Cut(key[0], last[0])


@triton.jit(do_not_specialize=["jobs", "stride", "models", "shift", "copies"])
def _magnitude_histogram(
    rows, jobs, stride, models, bins, shift, copies, PREFIXED: tl.constexpr,
    BASED: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of one model. The lowest bin is counted before it is added to: unmoved elements are many."""
    m = tl.program_id(0) % models
    tile = (tl.program_id(0) // models).to(tl.int64)
    keys = tile_keys(rows, m, tile, BASED, IN, ALIGN, TILE)
    digit = keys >> shift
    counted = keys >= 0
    if PREFIXED:
        counted = counted & ((digit >> 16) == tl.load(integers(rows, CHOICE) + m))
    digit = digit & 0xFFFF
    mine = bins + ((tile % copies) * models + m) * 65536
    tl.atomic_add(mine, tl.sum((counted & (digit == 0)).to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(mine + digit, tl.full([TILE], 1, tl.int64), mask=counted & (digit != 0), sem="relaxed")


def magnitude_histogram(
    base: torch.Tensor | None, tuned: Tensors, shift: int, prefix: list[int] | None
) -> torch.Tensor:
    """Counts [n, 65536], int64, of (key >> shift) & 0xFFFF over keys whose higher bits equal the prefix."""
    n, numel = len(tuned), tuned[0].numel()
    bins = torch.zeros(COPIES, n, BINS, dtype=torch.int64, device=tuned[0].device)
    if numel:
        job = Job(None, base, tuned, choice=prefix)
        launch = Launch("magnitude_histogram", [job])
        launch.run(
            _magnitude_histogram, launch.tiles * n, bins, shift, COPIES,
            PREFIXED=prefix is not None, BASED=base is not None, IN=READS[tuned[0].dtype],
            ALIGN=min(1, alignment(job)), TILE=TILE, num_warps=8,
        )  # fmt: skip
    return bins.sum(0)
