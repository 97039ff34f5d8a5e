"""Adapters merged on a CUDA device with the CPU's bits. Arguments were checked by the caller.

The factors are joined by the same operations as for the CPU's kernel, each of which rounds once on any
device, and the kernel takes its sums in the same order. Beside the weight that takes 4 * rank * (rows + cols)
bytes of the device's memory, and while B is scaled in float64 16 * rank * rows more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pykernels import _cuda
from pykernels.cuda import place
from pykernels.low_rank import LowRank, Tensors, folded
from pykernels.rows import CODES, SUM_BLOCK, add_blocks, through_float32

SQUARE_ROWS = 48
"""As ``kColumnRows`` in csrc/cuda/merge_in_order.cu."""


class Product(NamedTuple):
    """weight * scale + left [rows, R] @ right [R, cols]; scale [rows] or, ``by_column``, [cols], or None."""

    left: torch.Tensor
    right: torch.Tensor
    scale: torch.Tensor | None
    by_column: bool


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
    adapters, scale = folded(A, B, scaling, magnitude, lambda a: _norms(weight, a, fan_in_fan_out))
    _run(_cuda.merge_in_order, out, CODES[out.dtype], weight, _joined(adapters, scale, fan_in_fan_out))


def _norms(weight: torch.Tensor, adapter: LowRank, by_column: bool) -> torch.Tensor:
    """Norms of the rows or columns of weight + the delta, float64, from sums of squares in blocks."""
    rows, cols = weight.shape
    shape = (-(-rows // SQUARE_ROWS), cols) if by_column else (-(-cols // SUM_BLOCK), rows)
    sums = torch.empty(shape, dtype=torch.float64, device=weight.device)
    _run(_cuda.squares_in_order, sums, 0, weight, _joined([adapter], None, by_column))
    return add_blocks(sums).sqrt()


def _joined(adapters: Sequence[LowRank], scale: torch.Tensor | None, by_column: bool) -> Product:
    """All adapters as one product in float32: elements of B times scaling are rounded once."""
    wide = [a.A.float() for a in adapters]
    scaled = [(a.B.double() * a.scaling).float() for a in adapters]
    if by_column:
        return Product(torch.cat([a.t() for a in wide], 1), torch.cat([b.t() for b in scaled]), scale, True)
    return Product(torch.cat(scaled, 1), torch.cat(wide), scale, False)


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
