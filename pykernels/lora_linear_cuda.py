"""LoRA's linear layers on CUDA: what the adapters add is written first, the frozen product on top of it.

So the large product is torch's (cuBLAS), which adds in float32 to what it finds and rounds once; beside it x
is read once more and the result written and read once more. A batch with an index is sorted on the device:
nothing here waits for it, all of it can be captured in a graph. Rows whose index names no adapter become NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pykernels import _cuda, lora_linear_torch
from pykernels.cuda import place
from pykernels.lora_linear_torch import ALL, Adapter
from pykernels.rows import CODES

RANKS = 512
"""The largest rank whose sums have room in a block's shared memory; torch's products serve beyond."""
_NOWHERE, _READ, _WRITTEN = 0, 1, 2  # as Side in csrc/cuda/lora.h
Matrix = tuple[int, int, int, int]


class _Places(NamedTuple):
    """Each row's adapter, and the table of rows sorted by it."""

    named: torch.Tensor | None
    table: torch.Tensor | None
    adapters: int

    def packed(self) -> tuple[int, int, int, int]:
        index = (0, 0) if self.named is None else (self.named.data_ptr(), self.named.stride(0))
        return *index, 0 if self.table is None else self.table.data_ptr(), self.adapters


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
    if _rank(adapters) > RANKS:
        return lora_linear_torch.lora_linear(out, h, x, weight, adapters, index, bias, threshold, key)
    adapters = _stored(adapters)
    if bias is not None:
        bias = bias.resolve_neg().contiguous()
    places = _sorted(index, adapters, x.shape[0], always=False)
    both = [(a.shape[0], _matrix(a), _matrix(b), s) for a, b, s in adapters]
    drop = (_READ if threshold < ALL else _NOWHERE, threshold, key, x.shape[1])
    _add("lora_linear", out, h, x, out.shape[1], bias, both, places, drop)
    out.addmm_(x, weight.t())


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
    """Fills the gradients that are asked for."""
    if _rank(adapters) > RANKS:
        return lora_linear_torch.lora_linear_backward(
            by_x, by_weight, by_a, by_b, grad, h, x, weight, adapters, index, threshold, key
        )
    adapters = _stored(adapters)
    op, drops = "lora_linear_backward", threshold < ALL
    wants_a = any(to is not None for to in by_a)
    places = _sorted(index, adapters, x.shape[0], always=True)
    if by_weight is not None:
        torch.mm(grad.t(), x, out=by_weight)
    if any(to is not None for to in by_b):
        turned = [None if to is None else to.t() for to in by_b]
        _reduce(op, turned, adapters, h, grad, places, (_NOWHERE, ALL, 0, 0))
    if by_x is None and not wants_a:
        return
    by_h = torch.empty_like(h)
    both = [(a.shape[0], _matrix(b.t()), _matrix(a.t()), s) for a, b, s in adapters]
    drop = (_WRITTEN if drops and by_x is not None else _NOWHERE, threshold, key, x.shape[1])
    _add(op, by_x, by_h, grad, x.shape[1], None, both, places, drop)
    if wants_a:
        drop = (_READ if drops else _NOWHERE, threshold, key, x.shape[1])
        _reduce(op, by_a, adapters, by_h, x, places, drop)
    if by_x is not None:
        by_x.addmm_(grad, weight)


def _add(
    op: str,
    out: torch.Tensor | None,
    low: torch.Tensor,
    x: torch.Tensor,
    n: int,
    bias: torch.Tensor | None,
    adapters: list[tuple[int, Matrix, Matrix, float]],
    places: _Places,
    drop: tuple[int, int, int, int],
) -> None:
    """out [m, n] = bias + scale low up^T with low = x down^T; ``out`` None: only ``low``."""
    result = (0, CODES[x.dtype]) if out is None else (out.data_ptr(), CODES[out.dtype])
    call = _cuda.LoraRows(
        *result,
        low.data_ptr(),
        low.stride(0),
        0 if bias is None else bias.data_ptr(),
        _matrix(x),
        x.shape[0],
        x.shape[1],
        n,
        adapters,
        places.packed(),
        drop,
    )
    _run(op, call, x)


def _reduce(
    op: str,
    to: Sequence[torch.Tensor | None],
    adapters: Sequence[Adapter],
    low: torch.Tensor,
    a: torch.Tensor,
    places: _Places,
    drop: tuple[int, int, int, int],
) -> None:
    """to [r, n] = s * the sum over an adapter's rows of low[row]^T a[row], for every adapter."""
    nothing = (0, 0, 0, 0)
    sinks = [
        (f.shape[0], nothing if t is None else _matrix(t), s)
        for (f, _, s), t in zip(adapters, to, strict=True)
    ]
    m, n = a.shape
    call = _cuda.LoraReduce(_matrix(a), low.data_ptr(), low.stride(0), m, n, sinks, places.packed(), drop)
    _run(op, call, a)


def _run(op: str, call: _cuda.LoraRows | _cuda.LoraReduce, like: torch.Tensor) -> None:
    """Raises RuntimeError with op, shape and CUDA's error."""
    device, stream = place(like.device)
    nbytes = call.scratch(device)
    scratch = torch.empty(nbytes, dtype=torch.uint8, device=like.device) if nbytes else None
    _launch(op, lambda: call.run(device, stream, 0 if scratch is None else scratch.data_ptr()), like)


def _launch(op: str, launch: Callable[[], None], like: torch.Tensor) -> None:
    try:
        launch()
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: launch on {like.device} for a {like.dtype} tensor of shape {list(like.shape)} failed: "
            f"{error}"
        ) from None


def _sorted(index: torch.Tensor | None, adapters: Sequence[Adapter], m: int, *, always: bool) -> _Places:
    """Few rows are sorted where they are read, unless ``always``."""
    count, rank = len(adapters), _rank(adapters)
    if index is None or (not always and _cuda.lora_by_warp(m, rank)):
        return _Places(index, None, count)
    table = torch.empty(_cuda.lora_table_words(m, count, rank), dtype=torch.int64, device=index.device)
    given = (table.data_ptr(), index.data_ptr(), index.stride(0), m, count, rank)
    _launch("lora_linear_grouped", lambda: _cuda.lora_deal(*given, *place(index.device)), index)
    return _Places(index, table, count)


def _rank(adapters: Sequence[Adapter]) -> int:
    return max((a.shape[0] for a, _, _ in adapters), default=0)


def _stored(adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    """Kernels read what is in memory, of any strides, and a negated view is not."""
    return [(a.resolve_neg(), b.resolve_neg(), s) for a, b, s in adapters]


def _matrix(tensor: torch.Tensor) -> Matrix:
    return tensor.data_ptr(), CODES[tensor.dtype], tensor.stride(0), tensor.stride(1)
