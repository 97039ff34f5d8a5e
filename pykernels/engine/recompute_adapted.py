"""How far a tensor that adapters change may be from the reference: what roundings of its sums explain."""

from __future__ import annotations

import torch

from pykernels.adapters.change import ADD, REPLACE, ROWS, VECTOR, Change
from pykernels.engine.adapted import AdaptedTensors
from pykernels.engine.files import TORCH_DTYPE
from pykernels.engine.units import Adapted

UNIT = 2.0**-24
NORMS = 64
"""Units that a norm of a row in float32 may be off, whatever its length: its sum is taken in lanes."""


def slack(tensors: AdaptedTensors, source: Adapted, first: int, count: int) -> torch.Tensor:
    """Per element, float64: units of the sum of magnitudes, one per product and sum, 64 more for norms.

    With "peft" every step also rounds to the tensor's dtype: half a unit of it per step, of what is summed.
    """
    total, magnitudes, steps = _summed(tensors, source, first, count)
    wide = steps + 4 + (NORMS if magnitudes else 0)
    room = wide * UNIT * total
    if source.rounding == "peft":
        room += 2 * len(source.changes) * torch.finfo(TORCH_DTYPE[source.dtype]).eps * total
    return room


def _summed(
    tensors: AdaptedTensors, source: Adapted, first: int, count: int
) -> tuple[torch.Tensor, bool, int]:
    """|W| + sum |s| |B| |A| times the factors of magnitudes; whether there are any; the number of terms."""
    columns = source.columns
    begin, end = first // columns, -(-(first + count) // columns)
    rows = slice(0, source.rows) if source.whole else slice(begin, end)
    weight = tensors.stored(source, rows.start, rows.stop).double()
    total, steps, magnitudes = weight.abs(), 1, False
    for change in source.changes:
        if change.kind == REPLACE:
            weight = tensors.stored(change.tensors[0], rows.start, rows.stop, columns).double()
            total = weight.abs()
        elif change.kind == VECTOR:
            total = (
                total + abs(change.scaling) * tensors.stored(change.tensors[0], rows.start, rows.stop).abs()
            )
            steps += 1
        elif change.kind == ADD:
            moved, bound = tensors.product(change, source, rows.start, rows.stop)
            factor = _factor(tensors, change, weight + moved, rows)
            total = (total + bound) * factor
            magnitudes |= len(change.tensors) > 2
            steps += change.rank + 2
        elif change.kind == ROWS:
            total = torch.maximum(total, tensors.overwritten([change], weight, rows.start).abs())
    skipped = (begin - rows.start) * columns + first - begin * columns
    return total.reshape(-1)[skipped:][:count], magnitudes, steps


def _factor(
    tensors: AdaptedTensors, change: Change, changed: torch.Tensor, rows: slice
) -> torch.Tensor | float:
    """|m| / norm, per row or per column."""
    if len(change.tensors) < 3:
        return 1.0
    if change.transposed:
        magnitude = tensors.stored(change.tensors[2], 0, changed.shape[1]).double().view(1, -1)
        norm: torch.Tensor = torch.linalg.vector_norm(changed, dim=0, keepdim=True)
        return magnitude.abs() / norm
    magnitude = tensors.stored(change.tensors[2], rows.start, rows.stop).double().view(-1, 1)
    norm = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
    return magnitude.abs() / norm
