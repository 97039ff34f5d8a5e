"""DARE: drop at random, then add up or elect and average.

Traffic: reads base and n tuned tensors once, writes out once: (n + 2) * numel * sizeof(T). One pass; masks
are drawn in registers. drop_rescale: 2 * numel * sizeof(T).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels import grouping
from pykernels.kernels.launch import Job, Launch, Numbers, Tensors, merge
from pykernels.kernels.merge_loop import RANDOM, merge_block
from pykernels.kernels.ties_merge import COMBINE


@triton.jit(do_not_specialize=["jobs", "stride", "models"])
def _dare_merge(
    rows, jobs, stride, models,
    COMBINE: tl.constexpr, SHARED: tl.constexpr, SKIP: tl.constexpr, BASED: tl.constexpr,
    IN: tl.constexpr, TO: tl.constexpr, ALIGN: tl.constexpr, MODELS: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    merge_block(
        rows, jobs, stride, models, RANDOM, COMBINE, SHARED, SKIP, BASED, IN, TO, ALIGN, MODELS, BLOCK, TILE
    )


def dare_merge(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Tensors,
    threshold: list[int],
    model: list[int],
    key: int,
    weight: Numbers,
    vote: Numbers,
    share: Numbers,
    lambda_: float | torch.Tensor,
    elect: str | None,
    offset: int = 0,
) -> None:
    """Drop by stateless draws, then add up or elect and average: one pass."""
    if out.numel():
        job = Job(out, base, tuned, weight, vote, share, lambda_, threshold, model, None, offset, key)
        grouping.submit(_RUN[elect], job.kind(), job, out.numel(), out.device)


def _merge(elect: str | None) -> grouping.Run[Job]:
    def run(jobs: list[Job]) -> None:
        merge(Launch("dare_merge", jobs), _dare_merge, COMBINE=COMBINE[elect])

    return run


_RUN = {elect: _merge(elect) for elect in COMBINE}


def drop_rescale(
    out: torch.Tensor, delta: torch.Tensor, threshold: int, key: int, scale: float, offset: int = 0
) -> None:
    """scale * delta where kept, 0 elsewhere."""
    dare_merge(out, None, [delta], [threshold], [0], key, [scale], None, None, 1.0, None, offset)
