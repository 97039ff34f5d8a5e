"""LoRA's linear layers composed of torch's own products: what serves where no kernel of ours does.

Everything is computed in the dtypes that come in, by products that sum in float32; the adapter is added to
the frozen product in place (``addmm_``), so the traffic beyond it is one read of x and one read and write of
the result. Deterministic wherever torch's products are. Only where something is dropped a copy of x without
it is made, and freed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import linear

from pykernels import backends
from pykernels.uncast import uncast

Adapter = tuple[torch.Tensor, torch.Tensor, float]
ALL = 65536
"""The threshold below which every draw lies: nothing is dropped."""


@uncast
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
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
    if index is None and threshold == ALL and h.dtype == x.dtype == adapters[0][0].dtype:
        a, b, scaling = adapters[0]
        out.addmm_(torch.mm(x, a.t(), out=h), b.t(), alpha=scaling)
        return
    dropped = _dropped(x, threshold, key)
    for (a, b, scaling), rows in zip(adapters, rows_of(index, len(adapters)), strict=True):
        low = linear(_of(dropped, rows).to(a.dtype), a)
        _put(h[:, : a.shape[0]], rows, low.to(h.dtype))
        _add(out, rows, low, b.t(), scaling)


@uncast
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
    if by_x is not None:
        torch.mm(grad, weight, out=by_x)
    if by_weight is not None:
        torch.mm(grad.t(), x, out=by_weight)
    kept = None if threshold == ALL else _mask(x, threshold, key)
    each = zip(adapters, rows_of(index, len(adapters)), by_a, by_b, strict=True)
    for (a, b, scaling), rows, to_a, to_b in each:
        g = _of(grad, rows).to(a.dtype)
        low = g @ b if by_x is not None or to_a is not None else None
        if to_a is not None and low is not None:
            mine = _of(x if kept is None else torch.where(kept, x, 0), rows)
            to_a.copy_(torch.mm(low.t(), mine.to(a.dtype)).mul_(scaling))
        if to_b is not None:
            to_b.copy_(torch.mm(g.t(), _of(h, rows)[:, : a.shape[0]].to(a.dtype)).mul_(scaling))
        if by_x is None or low is None:
            continue
        if kept is None:
            _add(by_x, rows, low, a, scaling)
        else:
            back = torch.mm(low, a).mul_(scaling).masked_fill_(_of(kept, rows).logical_not(), 0)
            _put(by_x, rows, _of(by_x, rows) + back.to(by_x.dtype))


def rows_of(index: torch.Tensor | None, adapters: int) -> Iterator[torch.Tensor | None]:
    """The rows that take each adapter, in ascending order; None: all."""
    if index is None:
        yield None
        return
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index + 1, minlength=adapters + 1).tolist()
    yield from torch.split(order, counts)[1:]


def _of(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows is None else tensor[rows]


def _put(target: torch.Tensor, rows: torch.Tensor | None, values: torch.Tensor) -> None:
    if rows is None:
        target.copy_(values)
    else:
        target[rows] = values


def _add(
    out: torch.Tensor, rows: torch.Tensor | None, low: torch.Tensor, high: torch.Tensor, scaling: float
) -> None:
    """out += scaling * low @ high in its rows; in place where these are all."""
    if rows is None and low.dtype == out.dtype:
        out.addmm_(low, high, alpha=scaling)
    elif low.dtype == out.dtype:
        _put(out, rows, torch.addmm(out[rows], low, high, alpha=scaling))
    else:
        _put(out, rows, (_of(out, rows) + torch.mm(low, high).mul_(scaling)).to(out.dtype))


def _mask(x: torch.Tensor, threshold: int, key: int) -> torch.Tensor:
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    backends.call("dropout_mask", x)(kept, threshold, key)
    return kept


def _dropped(x: torch.Tensor, threshold: int, key: int) -> torch.Tensor:
    return x if threshold == ALL else torch.where(_mask(x, threshold, key), x, 0)
