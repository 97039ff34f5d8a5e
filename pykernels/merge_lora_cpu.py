"""The compiled ops on low-rank adapters: tensors to pointers. Arguments were checked by the caller."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels import _C
from pykernels.low_rank import Product, Tensors, product
from pykernels.native import threads
from pykernels.rows import CODES, add_blocks, through_float32


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
    p = product(A, B, scaling, magnitude, fan_in_fan_out, lambda p: _norms(weight, p))
    _C.merge_lora(
        out.data_ptr(),
        CODES[out.dtype],
        weight.data_ptr(),
        CODES[weight.dtype],
        weight.shape[0],
        weight.shape[1],
        p.left.data_ptr(),
        p.right.data_ptr(),
        p.left.shape[1],
        0 if p.scale is None else p.scale.data_ptr(),
        p.by_column,
        threads(),
    )


SQUARE_ROWS = 48
"""As ``kSquareRows`` in csrc/cpu/lora_jobs.h."""
SQUARE_COLUMNS = 4096
"""As ``kBlock`` in csrc/cpu/jobs.h."""


def _norms(weight: torch.Tensor, p: Product) -> torch.Tensor:
    """Norms of the rows or columns of weight + left @ right, float64, from sums of squares in blocks."""
    rows, cols = weight.shape
    shape = (-(-rows // SQUARE_ROWS), cols) if p.by_column else (-(-cols // SQUARE_COLUMNS), rows)
    sums = torch.empty(shape, dtype=torch.float64)
    _C.lora_squares(
        sums.data_ptr(),
        weight.data_ptr(),
        CODES[weight.dtype],
        rows,
        cols,
        p.left.data_ptr(),
        p.right.data_ptr(),
        p.left.shape[1],
        p.by_column,
        threads(),
    )
    return add_blocks(sums).sqrt()
