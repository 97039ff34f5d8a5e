"""The compiled ops on low-rank adapters: tensors to pointers. Arguments were checked by the caller."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels import _C
from pykernels.low_rank import Product, Tensors, norms, product
from pykernels.native import threads
from pykernels.rows import CODES, through_float32


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
    p = product(A, B, scaling, magnitude, fan_in_fan_out, lambda p: norms(weight, p, _squares))
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


def _squares(sums: torch.Tensor, weight: torch.Tensor, p: Product) -> None:
    """Of weight + left @ right, as ``low_rank.norms`` wants them."""
    _C.lora_squares(
        sums.data_ptr(),
        weight.data_ptr(),
        CODES[weight.dtype],
        weight.shape[0],
        weight.shape[1],
        p.left.data_ptr(),
        p.right.data_ptr(),
        p.left.shape[1],
        p.by_column,
        threads(),
    )
