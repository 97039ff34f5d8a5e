"""Dot products of a gradient with every task vector, per block of 4096 elements: what AdaMerging
differentiates.

Traffic: reads 3 * n * numel elements, of which gradient and base n times from the cache, and writes 8 * n
bytes a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.kernels.block_sums import BLOCKS, add_rows, deltas, places, tree
from pykernels.kernels.lanes import read
from pykernels.kernels.launch import READS, Job, Launch, Tensors, alignment
from pykernels.kernels.table import GRAD, NUMEL
from pykernels.rows import SUM_BLOCK


@triton.jit
def dots(
    row, m, first, numel,
    BASED: tl.constexpr, IN: tl.constexpr, BY: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCKS] of grad * delta from block ``first`` on; a product of two float32 is exact in float64."""
    total = tl.zeros([BLOCKS, 16], tl.float64)
    for step in range(32):
        place = places(first, step, BLOCKS)
        mask = place < numel
        delta = deltas(row, m, place, mask, BASED, IN, ALIGN, WHOLE)
        grad = read(tl.load(row + GRAD), place * 0, place, mask, BY, ALIGN, WHOLE)
        total = add_rows(total, grad.to(tl.float64) * delta.to(tl.float64), BLOCKS)
    return tree(total, BLOCKS)


@triton.jit(do_not_specialize=["jobs", "stride", "models"])
def _dot_products(
    rows, jobs, stride, models, sums,
    BASED: tl.constexpr, IN: tl.constexpr, BY: tl.constexpr, ALIGN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of one model; the models of the same blocks stand side by side, for the cache."""
    m = tl.program_id(0) % models
    first = (tl.program_id(0) // models).to(tl.int64) * BLOCKS
    numel = tl.load(rows + NUMEL)
    block = first + tl.arange(0, BLOCKS)
    out = sums + block * models + m
    if (first + BLOCKS) * 4096 <= numel:
        tl.store(out, dots(rows, m, first, numel, BASED, IN, BY, ALIGN, True, BLOCKS))
    else:
        total = dots(rows, m, first, numel, BASED, IN, BY, ALIGN, False, BLOCKS)
        tl.store(out, total, mask=block * 4096 < numel)


def dot_products(grad: torch.Tensor, base: torch.Tensor | None, tuned: Tensors) -> torch.Tensor:
    """Sums [blocks, n] in float64 of grad * delta per block of 4096 elements; ``grad`` has its own dtype."""
    n, blocks = len(tuned), -(-tuned[0].numel() // SUM_BLOCK)
    sums = torch.empty(blocks, n, dtype=torch.float64, device=tuned[0].device)
    if blocks:
        job = Job(None, base, tuned, grad=grad)
        Launch("dot_products", [job]).run(
            _dot_products, -(-blocks // BLOCKS) * n, sums,
            BASED=base is not None, IN=READS[tuned[0].dtype], BY=READS[grad.dtype],
            ALIGN=alignment(job), BLOCKS=BLOCKS,
        )  # fmt: skip
    return sums
