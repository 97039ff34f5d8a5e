"""The references of LoRA's linear layers as a backend: a block of rows at a time, rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pykernels.ref import lora_linear as truth
from pykernels.ref.philox import draws
from pykernels.ref.rounding import round_once

Adapter = tuple[torch.Tensor, torch.Tensor, float]
ALL = 65536
"""The threshold below which every draw lies: nothing is dropped."""
_LARGEST = 1 << 20


def dropout_mask(kept: torch.Tensor, threshold: int, key: int) -> None:
    """kept [*S], bool: where the 16-bit draw of an element (model 0) is below ``threshold``."""
    kept.view(-1).copy_(draws(key, 0, 0, kept.numel(), kept.device) < threshold)


def lora_linear(
    out: torch.Tensor,
    h: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Adapter],
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: int = ALL,
    key: int = 0,
) -> None:
    """out [M, N] = x [M, K] W^T + s h B^T + bias, and h [M, ranks] = (x without what is dropped) A^T."""
    factors = [truth.Factors(*a) for a in adapters]
    for rows, start in _blocks(x):
        mine, kept = None if index is None else index[rows], _kept(x[rows], start, threshold, key)
        out[rows] = round_once(truth.lora_linear(x[rows], weight, factors, mine, bias, kept), out.dtype)
        for i, (a, _, _) in enumerate(adapters):
            here = slice(None) if mine is None else mine == i
            dropped = x[rows].double() if kept is None else torch.where(kept, x[rows].double(), 0.0)
            part = h[rows]
            part[here, : a.shape[0]] = (dropped[here] @ a.double().T).to(h.dtype)


def lora_linear_backward(
    by_x: torch.Tensor | None,
    by_weight: torch.Tensor | None,
    by_a: Sequence[torch.Tensor | None],
    by_b: Sequence[torch.Tensor | None],
    grad: torch.Tensor,
    h: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Adapter],
    index: torch.Tensor | None,
    threshold: int = ALL,
    key: int = 0,
) -> None:
    """Fills the gradients that are asked for; ``h`` is the forward pass's, and found anew here."""
    factors = [truth.Factors(*a) for a in adapters]
    sums: list[torch.Tensor] | None = None
    for rows, start in _blocks(x):
        mine, kept = None if index is None else index[rows], _kept(x[rows], start, threshold, key)
        found = truth.lora_linear_backward(grad[rows], x[rows], weight, factors, mine, kept)
        if by_x is not None:
            by_x[rows] = round_once(found.x, by_x.dtype)
        parts = [found.weight, *found.A, *found.B]
        sums = parts if sums is None else [s + p for s, p in zip(sums, parts, strict=True)]
    for i, target in enumerate([by_weight, *by_a, *by_b]):
        if target is not None:
            target.copy_(round_once(sums[i], target.dtype) if sums else torch.zeros_like(target))


def _blocks(x: torch.Tensor) -> Iterator[tuple[slice, int]]:
    """Rows of at most 2**20 elements of x together, and the flat index of their first element."""
    step = max(1, _LARGEST // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step), start * x.shape[1]


def _kept(x: torch.Tensor, start: int, threshold: int, key: int) -> torch.Tensor | None:
    if threshold == ALL:
        return None
    return (draws(key, 0, start, x.numel(), x.device) < threshold).view(x.shape)
