"""log(sum(e**z)) over one or more dimensions: the first of softmax's two passes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from pykernels import backends, check, library
from pykernels.ops.softmax_pass import working

OP = "logsumexp"
_everyday = backends.everyday(OP)


def logsumexp(
    x: torch.Tensor,
    dim: int | Sequence[int] = -1,
    *,
    keepdim: bool = False,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log(sum(e**(x / temperature))) over ``dim``, in one pass over memory.

    A drop-in for ``torch.logsumexp``, special values included: -inf for a row that is empty or all -inf, +inf
    where an element is. Computed in float32 (float64 for float64), rounded once.

    Args:
        x: tensor [*S] of any strides: float32, bfloat16, float16 or float64; integers and bool count as
            float32.
        dim: the dimension or dimensions to reduce.
        keepdim: keep each of them with size 1.
        temperature: positive.

    Returns:
        Tensor of x's dtype (float32 for integers), differentiable in ``x``, twice too.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError (sparse x): an argument breaks a rule above;
        the text names it and its value.
    """
    if type(temperature) is float and temperature == 1.0 and not is_dynamo_compiling():
        done = _everyday(x, dim, keepdim)
        if done is not None:
            return done
    dims = [dim] if isinstance(dim, int) else dim
    if library.needed(x):
        _examine(x, dims, keepdim, temperature)
        return library.call(OP, None, x, dims, keepdim, temperature)
    return _run(x, dims, keepdim, temperature)


def _examine(x: torch.Tensor, dims: Sequence[int], keepdim: bool, temperature: float) -> list[int]:
    check.row_input(OP, x, None, integers=True)
    check.choice(OP, "keepdim", keepdim, (True, False))
    check.positive(OP, "temperature", temperature)
    return check.dimensions(OP, dims, x.dim())


class Rows(NamedTuple):
    """A tensor arranged for a reduction: [outer, n, inner], and the order its dimensions are in."""

    values: torch.Tensor
    order: list[int]


def _arranged(x: torch.Tensor, dims: list[int]) -> Rows:
    """Contiguous; dimensions that are no neighbours are moved behind the others."""
    order = list(range(x.dim()))
    start = dims[0]
    if dims != list(range(start, start + len(dims))):
        order = [d for d in order if d not in dims] + dims
        start = x.dim() - len(dims)
    moved = (x.permute(order) if x.dim() else x).contiguous().resolve_neg()
    shape, stop = moved.shape, start + len(dims)
    sizes = (shape[:start], shape[start:stop], shape[stop:])
    return Rows(moved.view(*map(math.prod, sizes)), order)


def _result_shape(x: torch.Tensor, dims: list[int], keepdim: bool) -> list[int]:
    kept = ((n, d in dims) for d, n in enumerate(x.shape))
    return [1 if gone else n for n, gone in kept if keepdim or not gone]


def _run(x: torch.Tensor, dim: Sequence[int], keepdim: bool, temperature: float) -> torch.Tensor:
    dims = _examine(x, dim, keepdim, temperature)
    values = _arranged(x if x.dtype in check.FLOAT_DTYPES else x.to(torch.float32), dims).values
    outer, n, inner = values.shape
    out = torch.empty(outer, inner, dtype=values.dtype, device=x.device)
    if n == 0:
        out.fill_(-math.inf)
    elif out.numel():
        backends.call(OP, values)(out, values, float(temperature))
    return out.view(_result_shape(x, dims, keepdim))


def _fake(x: torch.Tensor, dim: Sequence[int], keepdim: bool, temperature: float) -> torch.Tensor:
    dims = _examine(x, dim, keepdim, temperature)
    kind = check.row_input(OP, x, None, integers=True)
    return torch.empty(_result_shape(x, dims, keepdim), dtype=kind, device=x.device)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, dim, ctx.keepdim, ctx.temperature = inputs
    ctx.dims = check.dimensions(OP, dim, x.dim())
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    [x] = ctx.saved_tensors
    if not ctx.keepdim:
        grad = grad.reshape(_result_shape(x, ctx.dims, True))
    by_x = torch.ops.pykernels.logsumexp_backward(grad, x, ctx.dims, ctx.temperature)
    return by_x, None, None, None


def _tangent(y: torch.Tensor, primals: Any, tangents: Any) -> torch.Tensor:
    x, dim, keepdim, temperature = primals
    dims = check.dimensions(OP, dim, x.dim())
    one = torch.ones(_result_shape(x, dims, True), dtype=working(x.dtype), device=x.device)
    p = torch.ops.pykernels.logsumexp_backward(one, x.to(one.dtype), dims, temperature)
    found: torch.Tensor = (p * tangents[0].to(one.dtype)).sum(dims, keepdim=keepdim).to(y.dtype)
    return found


def _run_backward(grad: torch.Tensor, x: torch.Tensor, dims: list[int], temperature: float) -> torch.Tensor:
    """grad * softmax(x / temperature) / temperature; ``grad`` has x's dimensions."""
    if x.numel() == 0:
        return torch.empty_like(x)
    rows, order = _arranged(x, dims)
    by_rows = _arranged(grad, dims).values.to(working(x.dtype)) / temperature
    p = backends.fresh(rows.shape, working(x.dtype), x.device)
    backends.call("softmax", rows)(p, rows, float(temperature), None, None, None, False)
    _mend(p, rows, temperature)
    shape = [x.shape[d] for d in order]
    moved = p.mul_(by_rows).to(x.dtype).view(shape)
    inverse = [order.index(d) for d in range(x.dim())]
    return (moved.permute(inverse) if x.dim() else moved).contiguous()


def _mend(p: torch.Tensor, rows: torch.Tensor, temperature: float) -> None:
    """Rows with +inf: softmax has NaN everywhere, the derivative of their sum only where the +inf are."""
    if p.is_cpu and not bool(p[:, 0].isnan().any()):  # elsewhere the question would have the host wait
        return
    z = rows if temperature >= 1 else rows.to(p.dtype) / temperature  # may be infinite where x is not
    infinite = z.amax(1, keepdim=True) == math.inf  # not beside a NaN
    p.masked_fill_(infinite & (z != math.inf), 0.0)


def _fake_backward(grad: torch.Tensor, x: torch.Tensor, dims: list[int], temperature: float) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_twice(ctx: Any, inputs: Any, output: Any) -> None:
    grad, x, ctx.dims, ctx.temperature = inputs
    ctx.save_for_backward(grad, x)


def _twice(ctx: Any, v: torch.Tensor) -> Any:
    """Gradients of g * p / T, p = softmax(x / T), in g and x, by expressions that have gradients again."""
    grad, x = ctx.saved_tensors
    g, z, v = (t.to(working(x.dtype)) for t in (grad, x, v))
    z = z / ctx.temperature
    p = (z - torch.ops.pykernels.logsumexp(z, ctx.dims, True, 1.0)).exp()
    pull = (v * p).sum(ctx.dims, keepdim=True)
    by_x = g * p * (v - pull) / ctx.temperature**2
    return (pull / ctx.temperature).to(grad.dtype), by_x.to(x.dtype), None, None


library.define(OP, "Tensor x, int[] dim, bool keepdim, float temperature", _run, _fake, out=False)
library.differentiate(OP, _setup_context, _backward, _tangent)
library.define(
    "logsumexp_backward",
    "Tensor grad, Tensor x, int[] dims, float temperature",
    _run_backward,
    _fake_backward,
    out=False,
)
library.differentiate("logsumexp_backward", _setup_twice, _twice)
