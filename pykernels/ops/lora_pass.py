"""What LoRA's linear layers share: their operators, and the way from tensors of any shape to rows.

Kernels take x as rows [M, K] and a list of adapters; one layer with one adapter is the case without an index.
The numbers that change from call to call (scaling, the seed) go through the operator as tensors of the host,
so that a compiled graph holds none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pykernels import backends, check, library
from pykernels.ops.draws import STEPS
from pykernels.ops.lora import LoRA

ALL = STEPS
"""The threshold of 16-bit draws at which dropout drops nothing."""
OPERATOR = "lora_linear"
GROUPED = "lora_linear_grouped"
everyday, everyday_grouped, everyday_merge = backends.everyday_layers(LoRA)
"""Compiled calls that check plain CPU tensors by themselves: None, with nothing done, for anything else."""

Adapters = Sequence[tuple[torch.Tensor, torch.Tensor, float]]


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Adapters,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: int = ALL,
    key: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [*, N] of x's dtype, h [M, largest rank] that the gradient wants); arguments were checked."""
    rows = x if x.dim() == 2 and not x.is_neg() else _rows(x)
    y = backends.fresh((rows.shape[0], weight.shape[0]), x.dtype, x.device)
    low = _low if index is None else _no_low
    h = low(rows, [a for a, _, _ in adapters])
    if y.numel():
        backends.call(OPERATOR, x)(y, h, rows, weight, adapters, index, bias, threshold, key)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0]), h


def operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    scaling: torch.Tensor,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: int = ALL,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """y through the dispatcher: compiled, or with its gradient recorded."""
    call = getattr(torch.ops.pykernels, OPERATOR)
    result: torch.Tensor = call(x, weight, lora_a, lora_b, scaling, index, bias, threshold, seed)[0]
    return result


def keeping(op: str, dropout: float) -> int:
    """How many of the 65536 values of a draw keep an element."""
    if dropout == 0.0 and type(dropout) is float:
        return ALL
    p = check.number(op, "dropout", dropout)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: dropout must lie in [0, 1], got {p}")
    return round((1.0 - p) * ALL)


def examined(op: str, index: torch.Tensor, count: int) -> torch.Tensor:
    """``index`` [M], of which every value must name an adapter, or be -1; on a GPU nobody waits to see.

    On a CPU a copy, as other threads may write to the tensor between the look at it and its use.
    """
    if not index.is_cpu or not index.numel():
        return index.reshape(-1).resolve_neg()
    index = index.reshape(-1).clone()
    for value in torch.stack(index.aminmax()).tolist():
        if not -1 <= value < count:
            raise ValueError(f"{op}: index must lie in [-1, {count}), got {value}")
    return index


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [*, K] as [M, K]: a view, unless its leading dimensions do not lie one behind the other."""
    count = 1
    for n in x.shape[:-1]:
        count *= n
    return x.reshape(count, x.shape[-1]).resolve_neg()


def _low(rows: torch.Tensor, lora_a: Sequence[torch.Tensor]) -> torch.Tensor:
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    rank = max((a.shape[0] for a in lora_a), default=0)
    return torch.empty((rows.shape[0], rank), dtype=wide, device=rows.device)


def _no_low(rows: torch.Tensor, lora_a: Sequence[torch.Tensor]) -> torch.Tensor:
    """Zeros: a row fills as much as its adapter's rank."""
    return _low(rows, lora_a).zero_()


def _zip(lora_a: Any, lora_b: Any, scaling: torch.Tensor) -> Adapters:
    return list(zip(lora_a, lora_b, scaling.tolist(), strict=True))


def _key(seed: torch.Tensor | None) -> int:
    return 0 if seed is None else library.unsigned(int(seed))


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    scaling: torch.Tensor,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: int,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if index is not None:
        index = examined(GROUPED, index, len(lora_a))
    return forward(x, weight, _zip(lora_a, lora_b, scaling), index, bias, threshold, _key(seed))


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    scaling: torch.Tensor,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: int,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), _low(_rows(x), lora_a)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, lora_a, lora_b, scaling, index, _, ctx.threshold, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.count = len(lora_a)
    ctx.save_for_backward(x, weight, *lora_a, *lora_b, scaling, index, seed, output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
    x, weight, *low, scaling, index, seed, h = ctx.saved_tensors
    a, b = low[: ctx.count], low[ctx.count :]
    needs = ctx.needs_input_grad
    wants = [needs[0], needs[1], *needs[2], *needs[3]]
    found = torch.ops.pykernels.lora_linear_backward(
        grad, h, x, weight, a, b, scaling, index, ctx.threshold, seed, wants
    )
    picked = [f if want else None for f, want in zip(found, wants, strict=True)]
    by_bias = _rows(grad).sum(0) if needs[6] else None
    by_a, by_b = picked[2 : 2 + ctx.count], picked[2 + ctx.count :]
    return picked[0], picked[1], by_a, by_b, None, None, by_bias, None, None


def _tangent(y: torch.Tensor, primals: Any, tangents: Any) -> torch.Tensor:
    """Layers of tangents: linear in x, in (weight, A, bias) together, and in B. Dropout keeps its mask."""
    x, weight, lora_a, lora_b, scaling, index, _, threshold, seed = primals
    by_x, by_weight, by_a, by_b, _, _, by_bias, *_ = tangents
    rest = (threshold, seed)
    found = torch.zeros_like(y)
    if by_x is not None:
        found = found + operator(by_x, weight, lora_a, lora_b, scaling, index, None, *rest)
    if any(t is not None for t in (by_weight, by_bias, *by_a)):
        by_weight, *by_a = _filled([by_weight, *by_a], [weight, *lora_a])
        found = found + operator(x, by_weight, by_a, lora_b, scaling, index, by_bias, *rest)
    if any(t is not None for t in by_b):
        by_b = _filled(by_b, lora_b)
        found = found + operator(x, torch.zeros_like(weight), lora_a, by_b, scaling, index, None, *rest)
    return found


def _filled(given: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Zeros where there is no tangent."""
    return [torch.zeros_like(t) if g is None else g for g, t in zip(given, like, strict=True)]


def _run_backward(
    grad: torch.Tensor,
    h: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    scaling: torch.Tensor,
    index: torch.Tensor | None,
    threshold: int,
    seed: torch.Tensor | None,
    wants: list[bool],
) -> list[torch.Tensor]:
    found = _fake_backward(grad, h, x, weight, lora_a, lora_b, scaling, index, threshold, seed, wants)
    by_x, by_weight, *low = [f if want else None for f, want in zip(found, wants, strict=True)]
    by_a, by_b = low[: len(lora_a)], low[len(lora_a) :]
    if index is not None:
        index = examined(GROUPED, index, len(lora_a))
    rows = None if by_x is None else by_x.view(-1, x.shape[-1]) if by_x.numel() else None
    g, back = _rows(grad), backends.call("lora_linear_backward", x)
    adapters = _zip(lora_a, lora_b, scaling)
    if g.numel() and x.numel():
        back(rows, by_weight, by_a, by_b, g, h, _rows(x), weight, adapters, index, threshold, _key(seed))
    else:
        for empty in found:
            empty.zero_()
    return found


def _fake_backward(
    grad: torch.Tensor,
    h: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    scaling: torch.Tensor,
    index: torch.Tensor | None,
    threshold: int,
    seed: torch.Tensor | None,
    wants: list[bool],
) -> list[torch.Tensor]:
    inputs = [x, weight, *lora_a, *lora_b]
    return [t.new_empty(t.shape if want else (0,)) for t, want in zip(inputs, wants, strict=True)]


_SCHEMA = (
    "Tensor x, Tensor weight, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, Tensor? index, "
    "{}int threshold, Tensor? seed"
)
library.define(OPERATOR, _SCHEMA.format("Tensor? bias, "), _run, _fake, out=False, returns="(Tensor, Tensor)")
library.differentiate(OPERATOR, _setup_context, _backward, _tangent)
library.define(
    "lora_linear_backward",
    f"Tensor grad, Tensor h, {_SCHEMA.format('')}, bool[] wants",
    _run_backward,
    _fake_backward,
    out=False,
    returns="Tensor[]",
)
