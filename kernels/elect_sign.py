"""The elected sign of every element.

Traffic: reads n deltas once, writes one byte an element: n * numel * sizeof(T) + numel. One pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.kernels.lanes import read, write
from pykernels.kernels.launch import BLOCK, READS, Job, Launch, Numbers, Tensors, alignment
from pykernels.kernels.table import NUMEL, OUT, TUNED, WEIGHT, floats


@triton.jit
def elect_lanes(
    row, start, limit, models,
    PLAIN: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Elements ``start`` to ``start + limit``. A NaN casts no vote: there is no value that could carry it."""
    lane = tl.arange(0, BLOCK)
    mask = lane < limit
    pos = tl.zeros([BLOCK], tl.float32)
    neg = pos
    m = 0
    while m < models:
        vote = read(tl.load(row + TUNED + m), start, lane, mask, IN, ALIGN, WHOLE)
        if not PLAIN:
            vote = vote * tl.load(floats(row, WEIGHT) + m)
        pos += tl.where(vote > 0, vote, 0.0)
        neg += tl.where(vote < 0, vote, 0.0)
        m += 1
    sign = tl.where(pos < -neg, 255, 1).to(tl.uint8)
    write(tl.load(row + OUT), start, lane, mask, sign, ALIGN, WHOLE)


@triton.jit(do_not_specialize=["jobs", "stride", "models"])
def _elect_sign(
    rows, jobs, stride, models,
    PLAIN: tl.constexpr, IN: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One BLOCK of the one job."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    limit = tl.minimum(tl.load(rows + NUMEL) - start, BLOCK).to(tl.int32)
    if ALIGN == 16 and limit == BLOCK:
        elect_lanes(rows, start, limit, models, PLAIN, IN, ALIGN, BLOCK, True)
    else:
        elect_lanes(rows, start, limit, models, PLAIN, IN, ALIGN, BLOCK, False)


def elect_sign(out: torch.Tensor, deltas: Tensors, weight: Numbers, elect: str) -> None:
    """+1 or -1 per element [*S], int8."""
    if not out.numel():
        return
    job = Job(out, None, deltas, weight)
    Launch("elect_sign", [job]).run(
        _elect_sign,
        -(-job.numel // BLOCK),
        PLAIN=elect == "plain",
        IN=READS[deltas[0].dtype],
        ALIGN=alignment(job),
        BLOCK=BLOCK,
    )
