"""Adapters of a weight to layers of the CUDA module. Arguments were checked by the caller.

Kernels read A and B as they lie, in any dtype and of any strides; nothing is copied, joined or waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pykernels import _cuda, dora_norm_torch, grouping
from pykernels.cuda import place
from pykernels.rows import CODES, through_float32

Tensors = Sequence[torch.Tensor]
Rows = torch.Tensor | None
"""A float32 number per output, or None: 1."""

TILE_ROWS, STRIP = 64, 128
"""As ``kLoraRows`` and ``kLoraColumns`` in csrc/cuda/merge_lora.h."""


class Job(NamedTuple):
    """One weight on its way into a launch."""

    packed: _cuda.Layer
    like: torch.Tensor
    alive: tuple[object, ...]  # whatever memory the layer points to


def merge_lora(
    out: torch.Tensor,
    weight: torch.Tensor,
    A: Tensors,
    B: Tensors,
    scaling: Sequence[float],
    magnitude: Sequence[torch.Tensor | None],
    fan_in_fan_out: bool,
) -> None:
    """out = weight + sum(scaling * B @ A): one pass, and one more over the weight per magnitude.

    Inside ``grouped()`` all weights of a dtype share a launch, whatever their size.
    """
    if out.dtype not in CODES:
        return through_float32(merge_lora, out, weight, A, B, scaling, magnitude, fan_in_fan_out)
    if not out.numel():
        return
    scales, behind = _scales(weight, A, B, scaling, magnitude, fan_in_fan_out)
    job = _job(out, CODES[out.dtype], weight, A, B, scaling, scales, behind, fan_in_fan_out)
    # No scratch memory waits with it, so even a large weight may: a launch's last blocks are what costs.
    grouping.submit(_run_merge, (out.device, weight.dtype), job, 0, out.device)


def dora_norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """Norms [out], float32, of the rows of weight + scaling * B @ A: one read of the weight.

    The kernel takes rows or columns that lie one behind the other; other weights go through torch's products.
    """
    if weight.is_contiguous():
        return norms(weight, A, B, scaling).float()
    if weight.t().is_contiguous():
        return norms(weight.t(), A, B, scaling, True).float()
    return dora_norm_torch.dora_norm(weight, A, B, scaling)


def norms(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, by_column: bool = False
) -> torch.Tensor:
    """Norms [out] of the rows (``by_column``: of a weight [in, out]) of weight + scaling * B @ A, float64."""
    rows, cols = weight.shape
    shape = (-(-rows // TILE_ROWS), cols) if by_column else (-(-cols // STRIP), rows)
    sums = torch.empty(shape, dtype=torch.float64, device=weight.device)
    if sums.numel():
        job = _job(sums, 0, weight, [A], [B], [scaling], [None], None, by_column)
        _run(_cuda.lora_squares, "lora_squares", [job])
    return sums.sum(0).sqrt_()


def _scales(
    weight: torch.Tensor,
    A: Tensors,
    B: Tensors,
    scaling: Sequence[float],
    magnitude: Sequence[torch.Tensor | None],
    fan_in_fan_out: bool,
) -> tuple[list[Rows], Rows]:
    """What every adapter's rows are scaled by, its scaling included, and what the weight's are.

    A magnitude scales what stands before it, the weight too; rounded once from float64.
    """
    behind: torch.Tensor | None = None
    scales: list[Rows] = []
    for a, b, s, m in zip(reversed(A), reversed(B), reversed(scaling), reversed(magnitude), strict=True):
        if m is not None:
            factor = m.double() / norms(weight, a, b, s, fan_in_fan_out)
            behind = factor if behind is None else factor * behind
        scales.insert(0, None if behind is None else (behind * s).float())
    return scales, None if behind is None else behind.float()


def _job(
    out: torch.Tensor,
    out_code: int,
    weight: torch.Tensor,
    A: Tensors,
    B: Tensors,
    scaling: Sequence[float],
    scales: Sequence[Rows],
    behind: Rows,
    fan_in_fan_out: bool,
) -> Job:
    rows, cols = weight.shape
    packed = _cuda.Layer(
        CODES[weight.dtype],
        out.data_ptr(),
        out_code,
        weight.data_ptr(),
        rows,
        cols,
        0 if behind is None else behind.data_ptr(),
        fan_in_fan_out,
    )
    factors = [(a.resolve_neg(), b.resolve_neg()) for a, b in zip(A, B, strict=True)]
    for (a, b), s, scale in zip(factors, scaling, scales, strict=True):
        left, right = (a.t(), b.t()) if fan_in_fan_out else (b, a)
        (row, rank), (right_rank, column) = left.stride(), right.stride()
        packed.add(
            left.data_ptr(),
            CODES[left.dtype],
            (row, rank),
            right.data_ptr(),
            CODES[right.dtype],
            (column, right_rank),
            right.shape[0],
            s,
            0 if scale is None else scale.data_ptr(),
        )
    return Job(packed, weight, (out, weight, factors, scales, behind))


def _run_merge(jobs: list[Job]) -> None:
    _run(_cuda.merge_lora, "merge_lora", jobs)


def _run(launch: Callable[..., None], op: str, jobs: list[Job]) -> None:
    """One launch for all. Raises RuntimeError with op, shapes and CUDA's error."""
    like = jobs[0].like
    packed = [job.packed for job in jobs]
    nbytes = _cuda.lora_table_bytes(packed)
    table = torch.empty(nbytes, dtype=torch.uint8, device=like.device) if nbytes else None
    try:
        launch(packed, *place(like.device), 0 if table is None else table.data_ptr())
    except RuntimeError as error:
        shapes = ", ".join(str(list(job.like.shape)) for job in jobs[:5])
        more = f" and {len(jobs) - 5} more" if len(jobs) > 5 else ""
        raise RuntimeError(
            f"{op}: launch on {like.device} for {like.dtype} weights of shape {shapes}{more} failed: {error}"
        ) from None
