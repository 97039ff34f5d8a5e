"""LoRA's linear layers to measure on, on the CPU or a device, and what their results must be.

A row's options: ``rows`` and ``rank``; ``adapters`` (row i takes adapter i modulo their number; ``mixed``:
of ranks from half to double ``rank``); ``step`` (forward and the gradients of x, A and B); ``dropout``;
``dora`` (an inference with the norm at hand).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

import pykernels
from pykernels.ref.lora_blocks import dropout_mask

Options = Mapping[str, Any]
Result = torch.Tensor | tuple[torch.Tensor, ...]
SCALING = 2.0
SEED = 7
_ROWS = 4
_UNITS = 8


class Layer(NamedTuple):
    """x [rows, K], the frozen weight [N, K], adapters, the adapter of every row, a gradient [rows, N].

    ``factor`` [N], float32: what DoRA multiplies the rows of the adapted weight by.
    """

    x: torch.Tensor
    weight: torch.Tensor
    adapters: list[pykernels.LoRA]
    index: torch.Tensor
    grad: torch.Tensor
    factor: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Least traffic of the frozen product: x, weight and the result once."""
        return sum(t.numel() * t.element_size() for t in (self.x, self.weight, self.grad))


def make(
    shape: tuple[int, int],
    dtype: torch.dtype,
    options: Options,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Layer:
    """Gaussian tensors of one seed, weights of about the size that layers have."""
    random = torch.Generator(device).manual_seed(seed)
    (n, k), rows, count = shape, options["rows"], options.get("adapters", 1)

    def normal(*size: int, scale: float) -> torch.Tensor:
        return torch.randn(size, generator=random, device=device).mul_(scale).to(dtype)

    adapters = []
    for i in range(count):
        rank = options["rank"] * 2 ** (i % 3) // 2 if options.get("mixed") else options["rank"]
        low, high = normal(rank, k, scale=0.02), normal(n, rank, scale=0.02)
        adapters.append(pykernels.LoRA(low, high, SCALING))
    x, weight, grad = normal(rows, k, scale=1), normal(n, k, scale=0.02), normal(rows, n, scale=1)
    index = torch.arange(rows, device=device) % count
    factor = torch.rand(n, generator=random, device=device).add_(0.5)
    return Layer(x, weight, adapters, index, grad, factor)


def ours(c: Layer, options: Options) -> Result:
    """The public op: the result, or in a row "step" the gradients of x, A and B."""
    if "adapters" in options:
        return pykernels.lora_linear_grouped(c.x, c.weight, c.adapters, c.index)
    given: dict[str, Any] = {"dropout": options["dropout"], "seed": SEED} if "dropout" in options else {}
    if options.get("dora"):
        given["column_scale"] = c.factor
    return stepped(
        c, options, lambda x, a, b: pykernels.lora_linear(x, c.weight, a, b, scaling=SCALING, **given)
    )


def stepped(c: Layer, options: Options, call: Any) -> Result:
    """``call(x, A, B)``; or, in a row "step", the gradients of all three."""
    leaves = (c.x, *c.adapters[0][:2])
    if not options.get("step"):
        result: torch.Tensor = call(*leaves)
        return result
    wanting = [t.detach().requires_grad_() for t in leaves]
    return torch.autograd.grad(call(*wanting), wanting, c.grad)


def difference(c: Layer, options: Options, result: Result, *, adapted: bool = True) -> float:
    """Largest difference of a result from float64, in units of its largest element.

    Of the result, or of the gradient of x, four rows are looked at. ``adapted``: with the adapter, or the
    frozen product. RuntimeError beyond :func:`close`'s room.
    """
    wanted = _gradients(c, options, adapted) if options.get("step") else [_rows(c, options, adapted)]
    first, *low = [result] if isinstance(result, torch.Tensor) else result
    return max(close(got, truth) for got, truth in zip([first[:_ROWS], *low], wanted, strict=True))


def close(got: torch.Tensor, truth: torch.Tensor, room: float | None = None) -> float:
    """Largest difference in units of the largest element; RuntimeError where it is above ``room``.

    That is eight units in the last place of the dtype, unless given: kernels round once, rivals often.
    """
    worst = float((got.double() - truth).abs().max() / truth.abs().max())
    if not worst <= (_UNITS * torch.finfo(got.dtype).eps if room is None else room):
        raise RuntimeError(f"{worst:g} units from float64")
    return worst


def _rows(c: Layer, options: Options, adapted: bool) -> torch.Tensor:
    """The first rows of the result."""
    truth = c.x[:_ROWS].double() @ c.weight.double().T
    if not adapted:
        return truth
    low = _dropped(c, options)[:_ROWS]
    for i in range(truth.shape[0]):
        a, b = (t.double() for t in c.adapters[int(c.index[i])][:2])
        truth[i] += SCALING * (low[i] @ a.T @ b.T)
    return truth * c.factor.double() if options.get("dora") else truth


def _gradients(c: Layer, options: Options, adapted: bool) -> list[torch.Tensor]:
    """The first rows of x's gradient, and those of A and B."""
    grad = c.grad.double()
    by_x = grad[:_ROWS] @ c.weight.double()
    if not adapted:
        return [by_x]
    x, (a, b) = _dropped(c, options), (t.double() for t in c.adapters[0][:2])
    by_low = SCALING * grad @ b
    by_x += by_low[:_ROWS] @ a * _kept(c, options)[:_ROWS]
    return [by_x, by_low.T @ x, SCALING * grad.T @ (x @ a.T)]


def _dropped(c: Layer, options: Options) -> torch.Tensor:
    return c.x.double() * _kept(c, options)


def _kept(c: Layer, options: Options) -> torch.Tensor:
    """What our dropout multiplies x by, [rows, K]; [rows, 1] of ones without it."""
    if "dropout" not in options:
        return torch.ones((c.x.shape[0], 1), dtype=torch.float64, device=c.x.device)
    threshold = round((1 - options["dropout"]) * 65536)
    kept = torch.empty(c.x.shape, dtype=torch.bool, device=c.x.device)
    dropout_mask(kept, threshold, SEED)
    return kept * (65536 / threshold)
