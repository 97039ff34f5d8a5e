"""The compiled ops on low-rank adapters: tensors to pointers. Arguments were checked by the caller."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels import _C
from pykernels.low_rank import LowRank, Tensors, folded
from pykernels.native import threads
from pykernels.rows import CODES, add_blocks, through_float32

Matrix = tuple[int, int, int, int]
"""Address, dtype, and elements from one row, and one column, to the next."""


def merge_lora(
    out: torch.Tensor,
    weight: torch.Tensor,
    A: Tensors,
    B: Tensors,
    scaling: Sequence[float],
    magnitude: Sequence[torch.Tensor | None],
    fan_in_fan_out: bool,
) -> None:
    """out = weight + sum(scaling * B @ A): one pass, and one more over the weight per magnitude."""
    if out.dtype not in CODES:
        return through_float32(merge_lora, out, weight, A, B, scaling, magnitude, fan_in_fan_out)
    adapters, scale = folded(A, B, scaling, magnitude, lambda a: _norms(weight, a, fan_in_fan_out))
    stored = [_stored(adapter) for adapter in adapters]
    _C.merge_lora(
        out.data_ptr(),
        CODES[out.dtype],
        weight.data_ptr(),
        CODES[weight.dtype],
        weight.shape[0],
        weight.shape[1],
        [_factors(adapter, fan_in_fan_out) for adapter in stored],
        0 if scale is None else scale.data_ptr(),
        fan_in_fan_out,
        threads(),
    )


SQUARE_ROWS = 48
"""As ``kSquareRows`` in csrc/cpu/lora_jobs.h."""
SQUARE_COLUMNS = 4096
"""As ``kBlock`` in csrc/cpu/jobs.h."""


def _norms(weight: torch.Tensor, adapter: LowRank, fan_in_fan_out: bool) -> torch.Tensor:
    """Norms of the rows or columns of weight + the delta, float64, from sums of squares in blocks."""
    rows, cols = weight.shape
    shape = (-(-rows // SQUARE_ROWS), cols) if fan_in_fan_out else (-(-cols // SQUARE_COLUMNS), rows)
    sums = torch.empty(shape, dtype=torch.float64, device=weight.device)
    stored = _stored(adapter)
    _C.lora_squares(
        sums.data_ptr(),
        weight.data_ptr(),
        CODES[weight.dtype],
        rows,
        cols,
        [_factors(stored, fan_in_fan_out)],
        fan_in_fan_out,
        threads(),
    )
    return add_blocks(sums).sqrt()


def _stored(adapter: LowRank) -> LowRank:
    """Kernels read what is in memory, of any strides, and a negated view is not."""
    return adapter._replace(A=adapter.A.resolve_neg(), B=adapter.B.resolve_neg())


def _factors(adapter: LowRank, fan_in_fan_out: bool) -> tuple[Matrix, Matrix, int, float, float]:
    """Left, right, rank, and what each side is scaled by: B is."""
    a, b, s = adapter
    rank = a.shape[0]
    if fan_in_fan_out:
        return _matrix(a.t()), _matrix(b.t()), rank, 1.0, s
    return _matrix(b), _matrix(a), rank, s, 1.0


def _matrix(tensor: torch.Tensor) -> Matrix:
    return tensor.data_ptr(), CODES[tensor.dtype], tensor.stride(0), tensor.stride(1)
