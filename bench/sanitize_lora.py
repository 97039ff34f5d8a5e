"""LoRA among what compute-sanitizer watches: odd sizes and addresses, several ranks, rows without adapter.

The tensors of a row of ``sanitize_cases`` serve as weight, x, gradient and factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pykernels import backends
from pykernels.bench.inputs import Inputs

RANKS = (1, 17, 3)
DROP = (58_982, 11)
"""Threshold and key: a tenth is dropped."""
_ROWS = 70

Results = list[torch.Tensor]
Function = Callable[..., Any]


def odd(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that ends where its memory ends and does not begin where it begins."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)


def _part(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    return odd(tensor.view(-1)[: math.prod(shape)].view(shape))


def _poisoned(like: torch.Tensor) -> torch.Tensor:
    return odd(torch.full_like(like, float("nan")))


class _Layer:
    """weight [n, k], x [m, k], gradient [m, n] and an adapter per rank, from four tensors of a row."""

    def __init__(self, x: Inputs) -> None:
        side = math.isqrt(x.base.numel())
        self.n, self.k = side - 1, side - 3
        m = min(_ROWS, side - 2)
        self.weight = _part(x.base, self.n, self.k)
        self.x, self.grad = _part(x.tuned[0], m, self.k), _part(x.tuned[1], m, self.n)
        self.adapters = [(_part(x.tuned[2], r, self.k), _part(x.tuned[1], self.n, r), 0.5 + r) for r in RANKS]
        self.bias = _part(x.base, self.n)
        self.index = torch.arange(m, device=self.x.device) * 7 % (len(RANKS) + 1) - 1

    def cases(self) -> list[tuple[Any, ...]]:
        """Adapters, index, bias, threshold and key: one adapter, one with dropout, and all by index."""
        one = self.adapters[1:2]
        return [
            (one, None, self.bias, 65_536, 0),
            (one, None, None, *DROP),
            (self.adapters, self.index, self.bias, 65_536, 0),
        ]

    def low(self, adapters: list[Any]) -> torch.Tensor:
        """Where h goes."""
        rank = max(a.shape[0] for a, _, _ in adapters)
        return torch.zeros((self.x.shape[0], rank), dtype=torch.float32, device=self.x.device)


def _merge_lora(function: Function, x: Inputs) -> Results:
    """All adapters, with DoRA's magnitudes and without, and a weight that is stored transposed."""
    c = _Layer(x)
    square = c.k  # both ways round
    weight, results = _part(x.base, square, square), []
    a = [_part(x.tuned[2], r, square) for r in RANKS]
    b = [_part(x.tuned[1], square, r) for r in RANKS]
    magnitude = torch.linspace(0.5, 1.5, square, device=weight.device).to(weight.dtype)
    for transposed in (False, True):
        for given in ([None] * len(RANKS), [None, magnitude, None]):
            for like in (weight, weight.float()):  # rounded to the weight's dtype, and not at all
                out = _poisoned(like)
                function(out, weight, a, b, [0.5, -1.0, 2.0], given, transposed)
                results.append(out)
    return results


def _dora_norm(function: Function, x: Inputs) -> Results:
    c = _Layer(x)
    return [function(c.weight, a, b, s) for a, b, s in c.adapters]


def _forward(function: Function, x: Inputs) -> Results:
    c, results = _Layer(x), []
    for adapters, index, bias, *drop in c.cases():
        out = _poisoned(c.grad)
        function(out, c.low(adapters), c.x, c.weight, adapters, index, bias, *drop)
        results.append(out)
    return results


def _backward(function: Function, x: Inputs) -> Results:
    c, results = _Layer(x), []
    for adapters, index, bias, *drop in c.cases():
        h = c.low(adapters)
        forward = backends.call("lora_linear", c.x)
        forward(torch.empty_like(c.grad), h, c.x, c.weight, adapters, index, bias, *drop)
        by_x, by_weight = _poisoned(c.x), _poisoned(c.weight)
        by_a, by_b = ([_poisoned(each[i]) for each in adapters] for i in (0, 1))
        function(by_x, by_weight, by_a, by_b, c.grad, h, c.x, c.weight, adapters, index, *drop)
        results += [by_x, by_weight, *by_a, *by_b]
    return results


ROWS: dict[str, Callable[[Function, Inputs], Results]] = {
    "merge_lora": _merge_lora,
    "merge_in_order": _merge_lora,
    "dora_norm": _dora_norm,
    "lora_linear": _forward,
    "lora_linear_backward": _backward,
}
"""As ``sanitize_cases.ROWS``; a row counts once CUDA has the op."""


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Sums of products have the order of the unit that makes them: within units of the largest element."""
    if got.dtype != wanted.dtype:
        return False
    room = (64 if got.dtype == torch.float32 else 2) * torch.finfo(got.dtype).eps
    size = float(wanted.double().abs().max()) if wanted.numel() else 0.0
    return torch.allclose(got.double(), wanted.double(), rtol=0, atol=room * size, equal_nan=True)
