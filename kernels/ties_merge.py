"""TIES: trim by magnitude, elect a sign, average those who agree; with known cuts or with their search before
it.

Traffic: ties_merge reads base and n tuned tensors once and writes out once: (n + 2) * numel * sizeof(T), one
pass. ties_fused adds the selection of ``kth_magnitude``, (n + 1) * numel * sizeof(T) and a little, so two
passes; no value goes to the host between them. trim: 2 * numel * sizeof(T).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels import grouping
from pykernels.cut import Cut
from pykernels.kernels import selection
from pykernels.kernels.launch import Job, Launch, Numbers, Tensors, kind_of, merge
from pykernels.kernels.merge_loop import LARGE, PLAIN, SUM, WEIGHTED, merge_block

COMBINE = {None: SUM.value, "weighted": WEIGHTED.value, "plain": PLAIN.value}


@triton.jit(do_not_specialize=["jobs", "stride", "models"])
def _ties_merge(
    rows, jobs, stride, models,
    COMBINE: tl.constexpr, SHARED: tl.constexpr, SKIP: tl.constexpr, BASED: tl.constexpr,
    IN: tl.constexpr, TO: tl.constexpr, ALIGN: tl.constexpr, MODELS: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    merge_block(
        rows, jobs, stride, models, LARGE, COMBINE, SHARED, SKIP, BASED, IN, TO, ALIGN, MODELS, BLOCK, TILE
    )


def ties_merge(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Tensors,
    cut: Cut,
    weight: Numbers,
    vote: Numbers,
    share: Numbers,
    lambda_: float | torch.Tensor,
    elect: str | None,
    offset: int = 0,
) -> None:
    """Trim by known cuts, elect, average: one pass."""
    if out.numel():
        job = Job(out, base, tuned, weight, vote, share, lambda_, cut.key, cut.last, offset=offset)
        grouping.submit(_RUN[elect], job.kind(), job, out.numel(), out.device)


def _merge(elect: str | None) -> grouping.Run[Job]:
    def run(jobs: list[Job]) -> None:
        merge(Launch("ties_merge", jobs), _ties_merge, COMBINE=COMBINE[elect])

    return run


def ties_fused(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Tensors,
    k: list[int],
    tie: str,
    weight: Numbers,
    vote: Numbers,
    share: Numbers,
    lambda_: float | torch.Tensor,
    elect: str | None,
) -> None:
    """Selection and merge, wholly on the device; ``out`` may be one of the inputs."""
    if out.numel():
        job = Job(out, base, tuned, weight, vote, share, lambda_, ranks=selection.ranks(k, out.numel()))
        key = kind_of(job, selection.small(job))
        grouping.submit(_FUSED[elect, tie], key, job, out.numel(), out.device)


def _fuse(elect: str | None, tie: str) -> grouping.Run[Job]:
    def run(jobs: list[Job]) -> None:
        cuts = selection.room(jobs)
        for job, key, last in zip(jobs, *cuts, strict=True):
            job.choice, job.place = key, last
        launch = Launch("ties_fused", jobs, selection.unit(jobs))
        selection.select(launch, *cuts, keep=tie == "keep")
        merge(launch, _ties_merge, COMBINE=COMBINE[elect])

    return run


_RUN = {elect: _merge(elect) for elect in COMBINE}
_FUSED = {(elect, tie): _fuse(elect, tie) for elect in COMBINE for tie in ("index", "keep")}


def trim(out: torch.Tensor, delta: torch.Tensor, cut: Cut, offset: int = 0) -> None:
    """delta where kept, 0 elsewhere."""
    ties_merge(out, None, [delta], cut, [1.0], None, None, 1.0, None, offset)
