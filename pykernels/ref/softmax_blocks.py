"""The softmax rows of the reference backend: whole rows in blocks of at most 2**20 elements, rounded once.

Signatures are those of the kernels, on contiguous views [outer, n, inner] with the reduction over the middle.
A row that is longer than a block is read block by block, twice. ``out`` may be an input.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch

from pykernels.ref import softmax as truth
from pykernels.ref.delta import in_order
from pykernels.ref.rounding import round_once

LARGEST = 2**20
Place = tuple[slice, slice, slice]


def softmax(
    out: torch.Tensor,
    x: torch.Tensor,
    temperature: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sink: torch.Tensor | None,
    safe: bool,
) -> None:
    """e**z over the row's sum and the sink's part; mask [outer, n, inner], sink [outer, inner]."""
    for places in _rows(x):
        row = truth.with_sink(_sum(x, places, temperature, softcap, mask), _part(sink, places))
        for at in places:
            z = _logits(x, at, temperature, softcap, mask)
            out[at] = round_once(truth.softmax(z, row, safe), out.dtype)


def log_softmax(
    out: torch.Tensor,
    x: torch.Tensor,
    temperature: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sink: torch.Tensor | None,
    safe: bool,
) -> None:
    """z - log of the row's sum."""
    for places in _rows(x):
        row = truth.with_sink(_sum(x, places, temperature, softcap, mask), _part(sink, places))
        for at in places:
            z = _logits(x, at, temperature, softcap, mask)
            out[at] = round_once(truth.log_softmax(z, row, safe), out.dtype)


def logsumexp(out: torch.Tensor, x: torch.Tensor, temperature: float) -> None:
    """log of the row's sum, out [outer, inner]."""
    for places in _rows(x):
        row = _sum(x, places, temperature, None, None)
        outer, _, inner = places[0]
        out[outer, inner] = round_once(truth.logsumexp(row), out.dtype).squeeze(1)


def softmax_backward(out: torch.Tensor, grad: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    """scale * y * (grad - sum(grad * y))."""
    for places in _rows(y):
        dot = in_order((grad[at].double() * y[at].double()).sum(1, keepdim=True) for at in places)
        for at in places:
            out[at] = round_once(truth.softmax_backward(grad[at], y[at], dot, scale), out.dtype)


def log_softmax_backward(out: torch.Tensor, grad: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    """scale * (grad - e**y * sum(grad))."""
    for places in _rows(y):
        total = in_order(grad[at].double().sum(1, keepdim=True) for at in places)
        for at in places:
            out[at] = round_once(truth.log_softmax_backward(grad[at], y[at], total, scale), out.dtype)


def _rows(x: torch.Tensor) -> Iterator[list[Place]]:
    """Groups of whole rows, each as the places of its blocks along the row."""
    outer, n, inner = x.shape
    span = min(n, LARGEST)
    wide = min(inner, max(1, LARGEST // max(span, 1)))
    deep = max(1, LARGEST // max(span * wide, 1))
    spans = [slice(s, min(n, s + span)) for s in range(0, n, max(span, 1))] or [slice(0, 0)]
    for o in range(0, outer, deep):
        for i in range(0, inner, max(wide, 1)):
            yield [(slice(o, o + deep), s, slice(i, i + wide)) for s in spans]


def _logits(
    x: torch.Tensor, at: Place, temperature: float, softcap: float | None, mask: torch.Tensor | None
) -> torch.Tensor:
    return truth.logits(x[at], temperature, softcap, None if mask is None else mask[at])


def _sum(
    x: torch.Tensor, places: list[Place], temperature: float, softcap: float | None, mask: torch.Tensor | None
) -> truth.RowSum:
    parts = (truth.row_sum(_logits(x, at, temperature, softcap, mask), 1) for at in places)
    return reduce(truth.joined, parts)


def _part(sink: torch.Tensor | None, places: list[Place]) -> torch.Tensor | None:
    """The sinks of these rows, [outer, 1, inner]."""
    outer, _, inner = places[0]
    return None if sink is None else sink[outer, inner].unsqueeze(1)
