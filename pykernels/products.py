"""Matrix products of ours on the CPU, tensors to pointers. Arguments were checked by the caller."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels import _C
from pykernels.native import threads
from pykernels.rows import CODES

Drop = tuple[int, int, int]
"""Threshold of the draws, key, and columns of the matrix that is dropped from."""
_NO_DROP = (65536, 0, 0)


def _matrix(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    return tensor.data_ptr(), CODES[tensor.dtype], tensor.stride(0), tensor.stride(1)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _parts(
    segments: Sequence[tuple[int, int]], factors: Sequence[torch.Tensor]
) -> list[tuple[int, int, int, tuple[int, int, int, int]]]:
    return [(*s, f.shape[1], _matrix(f)) for s, f in zip(segments, factors, strict=True)]


def product(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor | None,
    segments: Sequence[tuple[int, int]],
    low_rank: Sequence[tuple[torch.Tensor, torch.Tensor, float]],
    bias: torch.Tensor | None,
    drop: Drop = _NO_DROP,
    factors: Sequence[torch.Tensor] = (),
) -> None:
    """out [m, n] = a [m, k] b [k, n] + bias, and per (low [m, r], high [r, n], s): s low high in its rows.

    A segment is a stretch of ``rows``; ``drop`` takes out of what is added there. With ``factors`` [k, r]
    and nothing dropped, ``low`` (one for all segments) is made by the way, as by :func:`shrink`.
    """
    extra = [
        (*segment, high.shape[0], _matrix(low), _matrix(high), s)
        for segment, (low, high, s) in zip(segments, low_rank, strict=True)
    ]
    sizes = (a.shape[0], b.shape[1], a.shape[1])
    parts = _parts(segments, factors) if factors else []
    where = _address(rows)
    _C.product(
        _matrix(out), _address(bias), _matrix(a), _matrix(b), *sizes, where, extra, parts, drop, threads()
    )


def shrink(
    low: torch.Tensor,
    a: torch.Tensor,
    rows: torch.Tensor | None,
    segments: Sequence[tuple[int, int]],
    factors: Sequence[torch.Tensor],
    drop: Drop = _NO_DROP,
) -> None:
    """low [m, ranks] = a [m, k] factor [k, r], float32, for the rows of every segment."""
    parts = _parts(segments, factors)
    _C.shrink(low.data_ptr(), low.stride(0), _matrix(a), a.shape[1], _address(rows), parts, drop, threads())


def reduce(
    out: torch.Tensor,
    low: torch.Tensor,
    a: torch.Tensor,
    rows: torch.Tensor | None,
    segment: tuple[int, int],
    scale: float,
    drop: Drop = _NO_DROP,
) -> None:
    """out [r, n] = scale * low[:, :r]^T a [m, n], summed over the rows of a segment."""
    rank, n = out.shape
    part = (*segment, rank, scale, low.data_ptr(), low.stride(0))
    _C.reduce(_matrix(out), *part, _matrix(a), n, _address(rows), drop, threads())
