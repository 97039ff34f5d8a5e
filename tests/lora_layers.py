"""Layers and adapters to test LoRA's linear layers on, and the float64 truth with the sizes bounds need."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pykernels.ref import lora_linear as ref
from pykernels.ref.philox import draws
from tests.bounds import assert_within_sum, chain


class Layer(NamedTuple):
    """Inputs of one call: x [M, K], weight [N, K], adapters, each row's adapter, bias, result's gradient."""

    x: torch.Tensor
    weight: torch.Tensor
    adapters: list[ref.Factors]
    index: torch.Tensor | None
    bias: torch.Tensor | None
    grad: torch.Tensor


def layer(m, n, k, ranks, dtype, *, low=None, bias=True, grouped=False, seed=0) -> Layer:
    """Gaussian inputs of one seed; ``low`` is the adapters' dtype, and rows go round all of them and none."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, kind=dtype):
        return torch.randn(shape, generator=random).to(kind)

    adapters = [
        ref.Factors(normal(r, k, kind=low or dtype), normal(n, r, kind=low or dtype), 0.7 + i)
        for i, r in enumerate(ranks)
    ]
    index = torch.randint(-1, len(ranks), (m,), generator=random) if grouped else None
    return Layer(normal(m, k), normal(n, k), adapters, index, normal(n) if bias else None, normal(m, n))


def kept_of(x: torch.Tensor, threshold: int, key: int) -> torch.Tensor | None:
    """The mask of dropout, or None."""
    return None if threshold == 65536 else (draws(key, 0, 0, x.numel()) < threshold).view(x.shape)


def sizes(c: Layer, kept: torch.Tensor | None) -> Layer:
    """The same with every number's magnitude: sums of these bound the terms."""
    adapters = [ref.Factors(a.A.abs(), a.B.abs(), abs(a.scaling)) for a in c.adapters]
    bias = None if c.bias is None else c.bias.abs()
    return c._replace(x=c.x.abs(), weight=c.weight.abs(), adapters=adapters, bias=bias, grad=c.grad.abs())


def assert_forward(out: torch.Tensor, c: Layer, kept: torch.Tensor | None, *, ours: bool = True) -> None:
    """``out`` within the bound of float32 sums rounded once; ``ours``: in chains of 256."""
    truth = ref.lora_linear(*c[:5], kept)
    big, count = sizes(c, kept), chain if ours else int
    rank, k = max((a.A.shape[0] for a in c.adapters), default=0), c.x.shape[1]
    size = ref.lora_linear(*big[:5], kept)
    assert_within_sum(out, truth, size, count(k) + count(rank) + 5)


def assert_scaled(out: torch.Tensor, c: Layer, scale: torch.Tensor) -> None:
    """As :func:`assert_forward` where all but the bias is multiplied by ``scale``."""
    roundings = chain(c.x.shape[1]) + chain(c.adapters[0].A.shape[0]) + 6
    truth, size = scaled(c, scale), scaled(sizes(c, None), scale.abs())
    assert_within_sum(out, truth, size, roundings)


def scaled(c: Layer, scale: torch.Tensor) -> torch.Tensor:
    """The layer whose columns are scaled, float64."""
    y = scale.double() * ref.lora_linear(*c[:4], None, None)
    return y if c.bias is None else y + c.bias.double()


def assert_backward(found, c: Layer, kept: torch.Tensor | None, *, ours: bool = True) -> None:
    """Gradients (x, weight, A of each, B of each; None is not looked at) within their bounds."""
    truth = ref.lora_linear_backward(c.grad, *c[:4], kept)
    big, count = sizes(c, kept), chain if ours else int
    size = ref.lora_linear_backward(big.grad, *big[:4], kept)
    rank, (m, n), k = max((a.A.shape[0] for a in c.adapters), default=0), c.grad.shape, c.x.shape[1]
    terms = [count(n) + count(rank) + 5, count(m) + 1]
    terms += [count(m) + count(n) + 4] * len(c.adapters) + [count(m) + count(k) + 4] * len(c.adapters)
    flat = ([t.x, t.weight, *t.A, *t.B] for t in (truth, size))
    for got, wanted, room, roundings in zip(found, *flat, terms, strict=True):
        if got is not None:
            assert_within_sum(got, wanted, room, roundings)


def spiked(dtype: torch.dtype, low: torch.dtype, *, rows: int = 5) -> Layer:
    """Whole numbers, exact in every dtype, so that remainders are 0, and infinities in factors beside a 0."""
    c = layer(rows, 20, 40, [3], dtype, low=low)
    whole = {name: (getattr(c, name) * 4).round().clamp(-3, 3) for name in ("x", "weight", "grad", "bias")}
    [f] = c.adapters
    A, B = ((t * 4).round().clamp(-3, 3) for t in (f.A, f.B))
    A[A == 0] = B[B == 0] = 1
    A[0, 2], A[2, 9], B[3, 1], B[7, 0] = math.inf, -math.inf, -math.inf, math.nan
    x, grad = whole["x"], whole["grad"]
    x[:, 2], grad[:, 3] = 2, -1
    x[1, 2] = grad[2, 3] = 0
    return c._replace(**whole, adapters=[f._replace(A=A, B=B)])
