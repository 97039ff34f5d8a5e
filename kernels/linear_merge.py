"""Weighted sums of models or of task vectors on a base.

Traffic: reads base and n tuned tensors once, writes out once: (n + 2) * numel * sizeof(T). One pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels import grouping
from pykernels.kernels.launch import Job, Launch, Numbers, Tensors, merge
from pykernels.kernels.merge_loop import ALL, SUM, merge_block


@triton.jit(do_not_specialize=["jobs", "stride", "models"])
def _linear_merge(
    rows, jobs, stride, models,
    SHARED: tl.constexpr, SKIP: tl.constexpr, BASED: tl.constexpr, IN: tl.constexpr, TO: tl.constexpr,
    ALIGN: tl.constexpr, MODELS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    merge_block(rows, jobs, stride, models, ALL, SUM, SHARED, SKIP, BASED, IN, TO, ALIGN, MODELS, BLOCK, TILE)


def linear_merge(out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors, weight: Numbers) -> None:
    """out = base + sum(weight * (tuned - base)), or sum(weight * tuned) without a base."""
    if out.numel():
        job = Job(out, base, tuned, weight)
        grouping.submit(_run, job.kind(), job, out.numel(), out.device)


task_arithmetic = linear_merge


def _run(jobs: list[Job]) -> None:
    merge(Launch("linear_merge", jobs), _linear_merge)
