"""Adapters merged into one layer on a device, and DoRA's norm of it.

The base of a merge is a copy of the weight: one read and one write. That of the norm is torch's norm of the
weight's rows: one read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

import pykernels
from pykernels import backends
from pykernels.bench import gpu_lora, lora_calls, lora_layers, lora_rivals
from pykernels.bench.gpu_clock import Call, Clock
from pykernels.bench.gpu_lora import BASE, Row, Samples
from pykernels.bench.lora_layers import SCALING, Layer

SHAPE = (4096, 4096)
_CHECKED = 64

Merge = Callable[[Layer, torch.Tensor], Any]
"""A call on a layer and a tensor for the result, which it returns."""


def ours(c: Layer, out: torch.Tensor) -> torch.Tensor:
    """The public op."""
    return pykernels.merge_lora(c.weight, c.adapters, out=out)


def addmm(c: Layer, out: torch.Tensor) -> torch.Tensor:
    """The best of torch: W read and written once per adapter."""
    source = c.weight
    for a in c.adapters:
        source = torch.addmm(source, a.B, a.A, alpha=a.scaling, out=out)
    return source


def copied(c: Layer, out: torch.Tensor) -> torch.Tensor:
    """The base of merges."""
    return out.copy_(c.weight)


def _norm(c: Layer, out: torch.Tensor) -> torch.Tensor:
    return pykernels.dora_norm(c.weight, *c.adapters[0][:2], SCALING)


def _peft_norm(c: Layer, out: torch.Tensor) -> torch.Tensor:
    """As PEFT's DoraLinearLayer.get_weight_norm has it: the adapted weight is made."""
    a = c.adapters[0]
    return torch.linalg.norm(c.weight + SCALING * (a.B @ a.A), dim=1)


def _frozen_norm(c: Layer, out: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(c.weight, dim=1)


ROWS: tuple[tuple[str, int, int], ...] = (
    ("merge_lora", 16, 1), ("merge_lora", 64, 1), ("merge_lora", 16, 8), ("dora_norm", 16, 1),
)  # fmt: skip
"""Op, rank and number of adapters."""


def measure(clock: Clock, *, left: Callable[[], float], shape: tuple[int, int] = SHAPE) -> Iterator[Row]:
    """Rows of one layer in bfloat16, while there is time."""
    for op, rank, count in ROWS:
        name = f"{op} {shape[0]}x{shape[1]} bf16 r={rank}" + (f" adapters={count}" if count > 1 else "")
        row: Row = {"name": name, "op": op, "kind": op, "rank": rank, "adapters": count}
        row |= {"backends": {}, "peers": []}
        if left() <= 0:
            yield row | {"left_out": "out of time"}
            continue
        options = {"rows": 1, "rank": rank, "adapters": count}
        layers = [
            lora_layers.make(shape, torch.bfloat16, options, device=clock.device, seed=seed)
            for seed in range(max(1, math.ceil(3 * clock.cache / (4 * math.prod(shape)))))
        ]
        measured = _norms if op == "dora_norm" else _merges
        yield row | measured(Samples(clock, len(layers)), layers, min(gpu_lora.LIMIT, left()))


def _merges(samples: Samples, layers: Sequence[Layer], limit: float) -> Row:
    _add_all(samples, layers, copied, ours, {"addmm_": addmm}, merged)
    if lora_rivals.able("peft"):
        samples.attempt("peft", lambda: samples.add("peft", _in_peft(layers), {}))
    return gpu_lora.figures(samples, ("peft", "addmm_"), limit=limit)


def _norms(samples: Samples, layers: Sequence[Layer], limit: float) -> Row:
    _add_all(samples, layers, _frozen_norm, _norm, {"peft": _peft_norm}, _off_norm)
    return gpu_lora.figures(samples, ("peft",), limit=limit)


def _add_all(
    samples: Samples,
    layers: Sequence[Layer],
    base: Merge,
    own: Merge,
    rivals: Mapping[str, Merge],
    check: Callable[[torch.Tensor, Layer], Row],
) -> None:
    outs = [torch.full_like(c.weight, float("nan")) for c in layers]

    def add(name: str, call: Merge, backend: str = "") -> None:
        calls = [partial(call, c, out) for c, out in zip(layers, outs, strict=True)]
        about = {} if name == BASE else check(calls[0](), layers[0])
        samples.add(name, calls, about, backend=backend)

    add(BASE, base)
    op = "dora_norm" if own is _norm and "dora_norm" in backends.TABLE else "merge_lora"
    for backend in gpu_lora.able(op):
        with pykernels.use_backend(backend):
            samples.attempt(backend, partial(add, backend, own, backend))
    for name, rival in rivals.items():
        samples.attempt(name, partial(add, name, rival))


def _in_peft(layers: Sequence[Layer]) -> list[Call]:
    """PEFT's merge of all adapters, each layer into a weight of its own, again and again in place."""
    calls = [lora_calls.in_peft("merge_lora", c.weight, c.adapters) for c in layers]
    for call, c in zip(calls, layers, strict=True):
        lora_layers.close(call()[:_CHECKED], _truth(c))
    return calls


def _truth(c: Layer) -> torch.Tensor:
    total = c.weight[:_CHECKED].double()
    for a in c.adapters:
        total = total + a.scaling * (a.B[:_CHECKED].double() @ a.A.double())
    return total


def merged(result: torch.Tensor, c: Layer) -> Row:
    """How far the first rows are from float64, and the share of their elements that is not nearest to it."""
    got, truth = result[:_CHECKED], _truth(c)
    wrong = float((got != truth.to(got.dtype)).double().mean())
    return {"difference": lora_layers.close(got, truth), "misrounded": wrong}


def _off_norm(result: torch.Tensor, c: Layer) -> Row:
    """PEFT's norm is of a weight that was rounded to its dtype."""
    room = 8 * torch.finfo(c.weight.dtype).eps
    return {"difference": lora_layers.close(result[:_CHECKED], _truth(c).norm(dim=1), room)}
