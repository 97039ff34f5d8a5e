"""Adapters as one product left @ right in float32: what the kernels of compiled backends take.

Every element of the scaled factor is rounded once, from the exact product of B, scaling and, behind a
magnitude, the float64 factors of the rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pykernels.rows import SUM_BLOCK, add_blocks

Tensors = Sequence[torch.Tensor]

SQUARE_ROWS = 48
"""Rows whose squares a kernel adds up for a column: as ``kSquareRows`` in csrc/cpu/lora_jobs.h."""


class Product(NamedTuple):
    """weight * scale + left [rows, R] @ right [R, cols]; scale [rows] or, ``by_column``, [cols], or None."""

    left: torch.Tensor
    right: torch.Tensor
    scale: torch.Tensor | None
    by_column: bool


Norms = Callable[[Product], torch.Tensor]
"""The norms of the rows (``by_column``: columns) of weight + left @ right, float64."""


def product(
    A: Tensors,
    B: Tensors,
    scaling: Sequence[float],
    magnitude: Sequence[torch.Tensor | None],
    fan_in_fan_out: bool,
    norms: Norms,
) -> Product:
    """All adapters in one; those with a magnitude scale what stands before them, the weight too."""
    factors = [
        None if m is None else m.double() / norms(_joined([a], [_scaled(b, s, None)], None, fan_in_fan_out))
        for a, b, s, m in zip(A, B, scaling, magnitude, strict=True)
    ]
    behind: torch.Tensor | None = None
    scaled: list[torch.Tensor] = []
    for b, s, factor in zip(reversed(B), reversed(scaling), reversed(factors), strict=True):
        if factor is not None:
            behind = factor if behind is None else factor * behind
        scaled.insert(0, _scaled(b, s, behind))
    return _joined(A, scaled, None if behind is None else behind.float(), fan_in_fan_out)


def norms(
    weight: torch.Tensor, p: Product, squares: Callable[[torch.Tensor, torch.Tensor, Product], None]
) -> torch.Tensor:
    """Norms of the rows or columns of weight + left @ right, float64, from sums of squares in blocks.

    ``squares(sums, weight, p)`` fills sums, float64 [blocks of 4096 columns, rows] or, by column, [parts of
    48 rows, cols]; everything behind it is the same on every device.
    """
    rows, cols = weight.shape
    shape = (-(-rows // SQUARE_ROWS), cols) if p.by_column else (-(-cols // SUM_BLOCK), rows)
    sums = torch.empty(shape, dtype=torch.float64, device=weight.device)
    squares(sums, weight, p)
    return add_blocks(sums).sqrt()


def _scaled(B: torch.Tensor, scaling: float, rows: torch.Tensor | None) -> torch.Tensor:
    """scaling * rows * B [out, r], float32."""
    if rows is not None:
        return (B.double() * (rows * scaling)[:, None]).float()
    if ctypes.c_float(scaling).value == scaling:
        return B.float() * scaling  # no other bits: the product in float64 would be exact
    return (B.double() * scaling).float()


def _joined(A: Tensors, scaled: Tensors, scale: torch.Tensor | None, fan_in_fan_out: bool) -> Product:
    wide = [a.float() for a in A]
    if fan_in_fan_out:
        return Product(torch.cat([a.t() for a in wide], 1), torch.cat([b.t() for b in scaled]), scale, True)
    return Product(torch.cat(list(scaled), 1), torch.cat(wide), scale, False)
