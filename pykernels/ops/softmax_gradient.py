"""Gradients of softmax and log_softmax: one row op, then what the options ask for.

With y = softmax(z) and g the result's gradient, dz = y (g - sum(g y)); with y = log_softmax(z),
dz = g - e**y sum(g). A sink b has the gradient -p_b sum(g y), p_b being its own probability. Second
derivatives and tangents are plain torch expressions of the same formulas, so derivatives of any order exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pykernels import backends, library
from pykernels.ops.logsumexp import OP as LOGSUMEXP
from pykernels.ops.softmax_pass import Options, rows_of, working

Grads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def save(ctx: Any, x: torch.Tensor, y: torch.Tensor, dim: int, options: Options) -> None:
    """Keep for :func:`gradients` what a forward pass got; x itself only where an option asks for it."""
    asks = options.softcap is not None or options.sink is not None
    ctx.save_for_backward(y, x if asks else None, options.mask, options.sink)
    ctx.kind = x.dtype
    ctx.dim = dim % max(x.dim(), 1)
    ctx.options = options._replace(mask=None, sink=None)


def gradients(ctx: Any, grad: torch.Tensor, op: str) -> Grads:
    """Gradients of x, of a float mask and of a sink, None where none is asked for."""
    y, x, mask, sink = ctx.saved_tensors
    options: Options = ctx.options
    by_mask = by_sink = None
    wants_mask = mask is not None and ctx.needs_input_grad[4]
    plain = options.softcap is None and not wants_mask
    wide = working(y.dtype)
    narrow = ctx.kind if ctx.kind in backends.NATIVE_DTYPES else y.dtype
    scale, kind = (1 / options.temperature, narrow) if plain else (1.0, wide)
    dz = getattr(torch.ops.pykernels, op)(grad, y, ctx.dim, scale, kind)
    if mask is not None and mask.dtype == torch.bool:
        dz = dz.masked_fill(mask.logical_not(), 0)
    if options.safe and op == "log_softmax_backward":
        dz = dz.masked_fill((y == -math.inf).all(ctx.dim, keepdim=True), 0)
    if wants_mask:
        by_mask = dz.sum_to_size(mask.shape).to(mask.dtype)
    if not plain:
        dz = dz / options.temperature
    if options.softcap is not None:
        dz = dz * (1 - (x.to(y.dtype).to(wide) / options.softcap).tanh().square())
    if sink is not None and ctx.needs_input_grad[6]:
        by_sink = _by_sink(grad, y, _logits(x.to(y.dtype).to(wide), mask, options), sink, ctx.dim)
    return dz.to(ctx.kind), by_mask, by_sink


def _logits(x: torch.Tensor, mask: torch.Tensor | None, options: Options) -> torch.Tensor:
    if options.softcap is not None:
        x = options.softcap * (x / options.softcap).tanh()
    x = x / options.temperature
    if mask is None:
        return x
    return x.masked_fill(mask.logical_not(), -math.inf) if mask.dtype == torch.bool else x + mask.to(x.dtype)


def _by_sink(
    grad: torch.Tensor, y: torch.Tensor, z: torch.Tensor, sink: torch.Tensor, dim: int
) -> torch.Tensor:
    """-p_b * sum(grad * y) over the rows that share b; p_b = 1 / (1 + sum(e**z) / e**b)."""
    dot = (grad.to(z.dtype) * y.to(z.dtype)).sum(dim, keepdim=True)
    by_sink: torch.Tensor = (-_chance(z, sink, dim) * dot).sum_to_size(sink.shape).to(sink.dtype)
    return by_sink


def _chance(z: torch.Tensor, sink: torch.Tensor, dim: int) -> torch.Tensor:
    """The sink's own probability."""
    b = sink.to(z.dtype)
    chance = (b - library.call(LOGSUMEXP, None, z, [dim], True, 1.0)).sigmoid()
    return chance.masked_fill(b == -math.inf, 0)


def tangent(
    op: str,
    y: torch.Tensor,
    x: torch.Tensor,
    dim: int,
    options: Options,
    by: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
) -> torch.Tensor:
    """The tangent of the result ``y``, ``by`` being those of x, of the mask and of the sink.

    dy = y (dz - sum(y dz) - p_b db), of log_softmax dz - sum(e**y dz).
    """
    by_x, by_mask, by_sink = by
    wide = working(y.dtype)
    dz = torch.zeros_like(y, dtype=wide) if by_x is None else by_x.to(wide)
    if options.softcap is not None:
        dz = dz * (1 - (x.to(y.dtype).to(wide) / options.softcap).tanh().square())
    dz = dz / options.temperature
    if options.mask is not None and options.mask.dtype == torch.bool:
        dz = dz.masked_fill(options.mask.logical_not(), 0)
    if by_mask is not None:
        dz = dz + by_mask.to(wide)
    p = y.to(wide)
    if op == "log_softmax":
        dy = dz - (p.exp() * dz).sum(dim, keepdim=True)
        if options.safe:
            dy = dy.masked_fill((y == -math.inf).all(dim, keepdim=True), 0)
        return dy.to(y.dtype)
    total = (p * dz).sum(dim, keepdim=True)
    if options.sink is not None and by_sink is not None:
        z = _logits(x.to(y.dtype).to(wide), options.mask, options)
        total = total + _chance(z, options.sink, dim) * by_sink.to(wide)
    return (p * (dz - total)).to(y.dtype)


def _row_op(op: str) -> Callable[..., torch.Tensor]:
    def run(grad: torch.Tensor, y: torch.Tensor, dim: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
        out = backends.fresh(y.shape, dtype, y.device)
        if y.numel():
            given = (rows_of(t.contiguous().resolve_neg(), dim) for t in (grad, y))
            backends.call(op, out if dtype == torch.float64 else y)(rows_of(out, dim), *given, scale)
        return out

    return run


def _fake(grad: torch.Tensor, y: torch.Tensor, dim: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(y.shape, dtype=dtype, device=y.device)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    grad, y, ctx.dim, ctx.scale, _ = inputs
    ctx.save_for_backward(grad, y)


def _softmax_twice(ctx: Any, v: torch.Tensor) -> Any:
    """Gradients of scale * y * (g - sum(g y)) in g and y."""
    grad, y = ctx.saved_tensors
    g, p, v = (t.to(working(y.dtype)) for t in (grad, y, v))
    dot, pull = ((t * p).sum(ctx.dim, keepdim=True) for t in (g, v))
    by_grad = ctx.scale * p * (v - pull)
    by_y = ctx.scale * (v * (g - dot) - g * pull)
    return by_grad.to(grad.dtype), by_y.to(y.dtype), None, None, None


def _log_softmax_twice(ctx: Any, v: torch.Tensor) -> Any:
    """Gradients of scale * (g - e**y * sum(g)) in g and y."""
    grad, y = ctx.saved_tensors
    g, p, v = (t.to(working(y.dtype)) for t in (grad, y, v))
    p = p.exp()
    pull = v * p
    by_grad = ctx.scale * (v - pull.sum(ctx.dim, keepdim=True))
    by_y = -ctx.scale * pull * g.sum(ctx.dim, keepdim=True)
    return by_grad.to(grad.dtype), by_y.to(y.dtype), None, None, None


for _op, _twice in (("softmax_backward", _softmax_twice), ("log_softmax_backward", _log_softmax_twice)):
    _schema = "Tensor grad, Tensor y, int dim, float scale, ScalarType dtype"
    library.define(_op, _schema, _row_op(_op), _fake, out=False)
    library.differentiate(_op, _setup_context, _twice)
