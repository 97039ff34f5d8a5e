"""PEFT's merge, one adapter after another: torch's same operations on the same dtypes, for the same bits.

What PEFT 0.21.2 does in ``tuners/lora/layer.py`` (``get_delta_weight``, ``merge``) and ``variants.py``: a
delta is multiplied in float32 where the factors are halves on a CPU and rounded to their dtype, and the
weight is rounded after every adapter. For a DoRA adapter it takes all adapters before out of the weight
again, rounding each time, to get at the weight that the norm is of, and puts them back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pykernels.uncast import uncast

HALVES = (torch.float16, torch.bfloat16)
_PIECE = 1 << 17
"""Elements that are scaled, rounded and added at a time."""


@uncast
def delta(
    A: torch.Tensor, B: torch.Tensor, scaling: float, fan_in_fan_out: bool, room: torch.Tensor | None = None
) -> torch.Tensor:
    """scaling * B @ A as PEFT computes and rounds it, [out, in] or transposed. ``room``: where the product
    may lie, [out, in] of its dtype.
    """
    return _scaled(_product(A, B, fan_in_fan_out, room), scaling, B)


def _product(
    A: torch.Tensor, B: torch.Tensor, fan_in_fan_out: bool, room: torch.Tensor | None = None
) -> torch.Tensor:
    if _widened(B):
        A, B = A.float(), B.float()
    product = torch.mm(B, A, out=room)
    return product.T if fan_in_fan_out else product


def _scaled(product: torch.Tensor, scaling: float, B: torch.Tensor) -> torch.Tensor:
    """In the product's own memory: blocks of a tensor's size that come and go leave gaps in the heap."""
    product *= scaling
    return product.to(B.dtype) if _widened(B) else product


def _widened(B: torch.Tensor) -> bool:
    return B.is_cpu and B.dtype in HALVES


def _add(out: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, fan_in_fan_out: bool) -> None:
    """out += delta: on a CPU some rows at a time, so that no copy of the product leaves the caches.

    The product is made whole, as its bits may depend on its shape; those of the other steps do not.
    """
    product = _product(A, B, fan_in_fan_out)
    for piece in _pieces(out):
        out[piece] += _scaled(product[piece], scaling, B)


def _pieces(matrix: torch.Tensor) -> Iterator[slice]:
    """Rows to take at a time: torch widens what a sum of two dtypes is made of, in memory of its own."""
    rows = max(1, _PIECE // max(1, matrix.shape[1])) if matrix.is_cpu else max(1, len(matrix))
    return (slice(first, first + rows) for first in range(0, len(matrix), rows))


class Layer:
    """A weight into which adapters are merged in turn."""

    def __init__(self, weight: torch.Tensor, fan_in_fan_out: bool) -> None:
        self.weight, self.fan_in_fan_out = weight.detach().clone(), fan_in_fan_out
        self.merged: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = []

    def merge(self, change: torch.Tensor, magnitude: torch.Tensor | None, *, kept: bool = False) -> None:
        """Adds one delta; with a magnitude, scales what is then there. ``kept``: another such follows."""
        base = None if magnitude is None else self._unmerged()
        factor = self._add(change, magnitude, base)
        if kept:
            self.merged.append((change, magnitude, factor))

    def _add(
        self, change: torch.Tensor, magnitude: torch.Tensor | None, base: torch.Tensor | None
    ) -> torch.Tensor | None:
        factor = None
        if magnitude is None or base is None:
            for piece in _pieces(self.weight):
                self.weight[piece] += change[piece]
        else:
            total = self._turned(base) + self._turned(change)
            norm = torch.linalg.norm(total, dim=1).to(total.dtype)
            factor = self._turned((magnitude / norm).view(-1, 1))
            self.weight = (factor * (self.weight + change)).to(self.weight.dtype)
        return factor

    def _unmerged(self) -> torch.Tensor:
        """The weight without what was merged, which is taken out, last first, and put back."""
        before, self.merged = self.merged, []
        for change, _, factor in reversed(before):
            if factor is None:
                self.weight -= change.to(self.weight.dtype)
            else:
                self.weight = (self.weight / factor - change).to(self.weight.dtype)
        base = self.weight.clone()
        for change, magnitude, _ in before:
            self.merged.append((change, magnitude, self._add(change, magnitude, base)))
        return base

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        return x.T if self.fan_in_fan_out else x


def last_dora(magnitudes: Sequence[object | None]) -> int:
    """The place of the last adapter with a magnitude, -1 without one: deltas before it are needed again."""
    return max((i for i, m in enumerate(magnitudes) if m is not None), default=-1)


@uncast
def merge_as_peft(
    out: torch.Tensor,
    weight: torch.Tensor,
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    magnitude: Sequence[torch.Tensor | None],
    fan_in_fan_out: bool,
) -> None:
    """Fills ``out`` with what ``merge`` of a PEFT layer leaves in the weight."""
    adapters = list(zip(A, B, scaling, magnitude, strict=True))
    with torch.no_grad():
        if last_dora(magnitude) < 0:
            out.copy_(weight)
            for a, b, s, _ in adapters:
                _add(out, a, b, s, fan_in_fan_out)
            return
        layer, last = Layer(weight, fan_in_fan_out), last_dora(magnitude)
        for i, (a, b, s, m) in enumerate(adapters):
            layer.merge(delta(a, b, s, fan_in_fan_out), m, kept=i < last)
        out.copy_(layer.weight)
