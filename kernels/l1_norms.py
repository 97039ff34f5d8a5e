"""Sums of |delta| and of the kept |delta| per block of 4096 elements: the norms of mergekit's DARE rescale.

Traffic: reads 2 * n * numel * sizeof(T), of which base n times from the cache, and writes 16 * n bytes a
block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.kernels.block_sums import BLOCKS, add_rows, deltas, places, tree
from pykernels.kernels.lanes import draws
from pykernels.kernels.launch import READS, Job, Launch, Tensors, alignment
from pykernels.kernels.table import CHOICE, KEY, NUMEL, OFFSET, PLACE, integers
from pykernels.rows import SUM_BLOCK


@triton.jit
def norms(
    row, m, first, numel,
    BASED: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCKS] of |delta| and of the kept |delta| from block ``first`` on. A NaN counts as kept."""
    key = tl.load(row + KEY)
    model = tl.load(integers(row, PLACE) + m)
    threshold = tl.load(integers(row, CHOICE) + m).to(tl.int32)
    lane = tl.arange(0, BLOCKS * 16)
    call = tl.load(row + OFFSET) // 8 + (first + lane // 16) * 512 + lane % 16
    every = tl.zeros([BLOCKS, 16], tl.float64)
    kept = every
    for step in range(32):
        place = places(first, step, BLOCKS)
        size = tl.abs(deltas(row, m, place, place < numel, BASED, IN, ALIGN, WHOLE))
        keep = (draws(key, model, call + step * 16, BLOCKS * 128) < threshold) | (size != size)
        every = add_rows(every, size, BLOCKS)
        kept = add_rows(kept, tl.where(keep, size, 0.0), BLOCKS)
    return tree(every, BLOCKS), tree(kept, BLOCKS)


@triton.jit(do_not_specialize=["jobs", "stride", "models"])
def _l1_norms(
    rows, jobs, stride, models, sums,
    BASED: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of one model; the models of the same blocks stand side by side, for the cache."""
    m = tl.program_id(0) % models
    first = (tl.program_id(0) // models).to(tl.int64) * BLOCKS
    numel = tl.load(rows + NUMEL)
    block = first + tl.arange(0, BLOCKS)
    out = sums + (block * models + m) * 2
    if (first + BLOCKS) * 4096 <= numel:
        every, kept = norms(rows, m, first, numel, BASED, IN, ALIGN, True, BLOCKS)
        tl.store(out, every)
        tl.store(out + 1, kept)
    else:
        every, kept = norms(rows, m, first, numel, BASED, IN, ALIGN, False, BLOCKS)
        tl.store(out, every, mask=block * 4096 < numel)
        tl.store(out + 1, kept, mask=block * 4096 < numel)


def l1_norms(
    base: torch.Tensor | None,
    tuned: Tensors,
    threshold: list[int],
    model: list[int],
    key: int,
    offset: int = 0,
) -> torch.Tensor:
    """Sums [blocks, n, 2] in float64 of |delta| and the kept |delta| per block of 4096 elements."""
    n, blocks = len(tuned), -(-tuned[0].numel() // SUM_BLOCK)
    sums = torch.empty(blocks, n, 2, dtype=torch.float64, device=tuned[0].device)
    if blocks:
        job = Job(None, base, tuned, choice=threshold, place=model, offset=offset, key=key)
        Launch("l1_norms", [job]).run(
            _l1_norms, -(-blocks // BLOCKS) * n, sums,
            BASED=base is not None, IN=READS[tuned[0].dtype], ALIGN=alignment(job), BLOCKS=BLOCKS,
        )  # fmt: skip
    return sums
