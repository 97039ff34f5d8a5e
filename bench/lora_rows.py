"""LoRA's linear layers in the table of cases: layers to measure on, our calls, and those of torch and PEFT.

Every row is timed by turns with the frozen product alone, torch's and ours, and with PEFT's layer; each
result is held against float64 before. In bfloat16 torch's product is the one to beat, adapter or not.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

import pykernels
from pykernels import products
from pykernels.bench.inputs import Inputs, Spec

Options = Mapping[str, Any]
Calls = dict[str, Callable[[], torch.Tensor]]
SCALING = 2.0


class Layer(NamedTuple):
    """x [rows, K], the frozen weight [N, K], adapters of one rank, the adapter of every row, a gradient."""

    x: torch.Tensor
    weight: torch.Tensor
    adapters: list[pykernels.LoRA]
    index: torch.Tensor
    grad: torch.Tensor


@lru_cache(maxsize=1)
def layer(shape: tuple[int, int], dtype: torch.dtype, rows: int, rank: int, count: int) -> Layer:
    """Gaussian tensors of one seed, weights of about the size that layers have."""
    random = torch.Generator().manual_seed(0)
    n, k = shape

    def normal(*size: int, scale: float) -> torch.Tensor:
        return torch.randn(size, generator=random).mul_(scale).to(dtype)

    adapters = [
        pykernels.LoRA(normal(rank, k, scale=0.02), normal(n, rank, scale=0.02), SCALING)
        for _ in range(count)
    ]
    x, weight, grad = normal(rows, k, scale=1), normal(n, k, scale=0.02), normal(rows, n, scale=1)
    return Layer(x, weight, adapters, torch.arange(rows) % count, grad)


def layer_of(x: Inputs, options: Options) -> Layer:
    """The layer of a row, as large as the row's inputs."""
    n, k = x.base.shape
    return layer((n, k), x.base.dtype, options["rows"], options["rank"], options.get("adapters", 1))


def _ours(x: Inputs, out: torch.Tensor | None, options: Options) -> Any:
    c = layer_of(x, options)
    if "adapters" in options:
        return pykernels.lora_linear_grouped(c.x, c.weight, c.adapters, c.index)
    return _stepped(c, lambda x, a, b: pykernels.lora_linear(x, c.weight, a, b, scaling=SCALING), options)


def _stepped(c: Layer, call: Callable[..., torch.Tensor], options: Options) -> torch.Tensor:
    """The result; or, for a row "step", the gradient of x after gradients of x, A and B were made."""
    leaves = (c.x, *c.adapters[0][:2])
    if not options.get("step"):
        return call(*leaves)
    wanting = [t.detach().requires_grad_() for t in leaves]
    return torch.autograd.grad(call(*wanting), wanting, c.grad)[0]


def _frozen(c: Layer, options: Options) -> torch.Tensor:
    y = torch.empty(c.x.shape[0], c.weight.shape[0], dtype=c.x.dtype)
    products.product(y, c.x, c.weight.t(), None, [], [], None)
    if not options.get("step"):
        return y
    by_x = torch.empty_like(c.x)
    products.product(by_x, c.grad, c.weight, None, [], [], None)
    return by_x


def _torch(c: Layer, options: Options) -> torch.Tensor:
    y = linear(c.x, c.weight)
    return c.grad @ c.weight if options.get("step") else y


def _peft(c: Layer, options: Options) -> Callable[[], torch.Tensor]:
    peft = importlib.import_module("peft")
    rank = c.adapters[0].A.shape[0]
    n, k = c.weight.shape
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"layer": torch.nn.Linear(k, n, bias=False)})
    module["layer"].weight = torch.nn.Parameter(c.weight, requires_grad=False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank * SCALING, target_modules=["layer"])
    adapted = peft.inject_adapter_in_model(config, module).to(c.x.dtype)["layer"]
    low = [adapted.lora_A["default"].weight, adapted.lora_B["default"].weight]
    for parameter, value in zip(low, c.adapters[0][:2], strict=True):
        parameter.data.copy_(value)
    if not options.get("step"):
        return torch.no_grad()(lambda: adapted(c.x))

    def step() -> torch.Tensor:
        x = c.x.detach().requires_grad_()
        return torch.autograd.grad(adapted(x), [x, *low], c.grad)[0]

    return step


def rivals(c: Layer, options: Options, wanted: Mapping[str, float]) -> Calls:
    """The calls that a row is timed against; PEFT's where it is installed."""
    calls: Calls = {"own frozen": lambda: _frozen(c, options), "frozen F.linear": lambda: _torch(c, options)}
    if "peft" in wanted and importlib.util.find_spec("peft"):
        calls["peft"] = _peft(c, options)
    return {name: call for name, call in calls.items() if name in wanted}


def check(c: Layer, options: Options, name: str, result: torch.Tensor) -> float:
    """Largest difference of the first four rows from float64, in units of their largest element."""
    x, weight, grad = c.x[:4].double(), c.weight.double(), c.grad[:4].double()
    truth = grad @ weight if options.get("step") else x @ weight.T
    for i in range(min(4, x.shape[0]) * ("frozen" not in name)):
        a, b = (t.double() for t in c.adapters[int(c.index[i])][:2])
        truth[i] += SCALING * (grad[i] @ b @ a if options.get("step") else x[i] @ a.T @ b.T)
    worst = float((result[:4].double() - truth).abs().max() / truth.abs().max())
    if worst > 8 * torch.finfo(c.x.dtype).eps:
        raise RuntimeError(f"{name} is {worst:g} units from float64 on {options}")
    return worst


def times(calls: Calls, least: float = 1.0) -> dict[str, float]:
    """Median milliseconds of every call, by turns, until they took ``least`` seconds together."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    while sum(map(sum, spent.values())) < least or len(next(iter(spent.values()))) < 3:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) * 1e3 for name, s in spent.items()}


def _bytes(spec: Spec) -> int:
    return spec.tensor_bytes


CALLS: dict[str, Callable[[Inputs, torch.Tensor | None, Options], Any]] = {"lora_linear": _ours}
TRAFFIC: dict[str, Callable[[Spec], int]] = {"lora_linear": _bytes}
