"""Adapters merged on a CUDA device with the CPU's bits. Arguments were checked by the caller.

The factors are joined by the same operations as for the CPU's kernel, each of which rounds once on any
device, and the kernel takes its sums in the same order. Beside the weight that takes 4 * rank * (rows + cols)
bytes of the device's memory, and while B is scaled in float64 16 * rank * rows more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pykernels import _cuda
from pykernels.cuda import place
from pykernels.low_rank import Product, Tensors, norms, product
from pykernels.rows import CODES, through_float32


def merge_in_order(
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
        return through_float32(merge_in_order, out, weight, A, B, scaling, magnitude, fan_in_fan_out)
    p = product(A, B, scaling, magnitude, fan_in_fan_out, lambda p: norms(weight, p, _squares))
    _run(_cuda.merge_in_order, out, CODES[out.dtype], weight, p)


def _squares(sums: torch.Tensor, weight: torch.Tensor, p: Product) -> None:
    _run(_cuda.squares_in_order, sums, 0, weight, p)


def _run(
    launch: Callable[..., None], out: torch.Tensor, out_code: int, weight: torch.Tensor, p: Product
) -> None:
    """Raises RuntimeError with the op, the shape and CUDA's error."""
    try:
        launch(
            out.data_ptr(),
            out_code,
            weight.data_ptr(),
            CODES[weight.dtype],
            *weight.shape,
            p.left.data_ptr(),
            p.right.data_ptr(),
            p.left.shape[1],
            0 if p.scale is None else p.scale.data_ptr(),
            p.by_column,
            *place(weight.device),
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"merge_in_order: launch on {weight.device} for a {weight.dtype} weight of shape "
            f"{list(weight.shape)} failed: {error}"
        ) from None
