"""A whole model merged inside a device's memory: base, three tuned models and the result, in one graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

import pykernels
from pykernels.bench.gpu_clock import Clock
from pykernels.bench.gpu_table import Copy, able
from pykernels.bench.llama import LLAMA_8B, Layout
from pykernels.grouping import grouped

ROUNDS = 7
TUNED = 3
RESERVE = 6 << 30
"""Bytes beside the models: temporaries while they are made, scratch of the selections, copy, flush."""

_CHECKED = 1 << 23  # elements up to which a tensor is compared with the CPU's result

Model = dict[str, torch.Tensor]
Merge = Callable[..., torch.Tensor]

METHODS: Mapping[str, tuple[Merge, dict[str, Any]]] = {
    "ties d=0.2": (pykernels.ties_merge, {"density": 0.2}),
    "ties d=0.5": (pykernels.ties_merge, {"density": 0.5}),
    "task_arithmetic": (pykernels.task_arithmetic, {}),
    "dare_linear d=0.5": (pykernels.dare_merge, {"density": 0.5, "seed": 7}),
    "dare_ties d=0.5": (pykernels.dare_merge, {"density": 0.5, "seed": 7, "consensus": "ties"}),
}
"""By the name in the table: the op on every tensor and its options, but for the weights."""

WEIGHT = [0.5, 0.35, 0.25]


def measure(
    clock: Clock,
    *,
    layout: Layout = LLAMA_8B,
    left: Callable[[], float],
    copy_bytes: int = 1 << 30,
    reserve: int = RESERVE,
) -> dict[str, Any]:
    """Milliseconds per method and backend, or under "left_out" why there are none."""
    sizes = sum(2 * _numel(shape) for _, shape in layout.shapes())
    found: dict[str, Any] = {
        "about": f"{layout.layers} layers, hidden {layout.hidden}, base + {TUNED} tuned, bfloat16",
        "parameters": sizes // 2,
        "nbytes": (TUNED + 2) * sizes,
    }
    need, free = (TUNED + 2) * sizes + reserve, clock.free()
    if need > free:
        return found | {"left_out": f"needs {need / 1e9:.0f} GB, the device has {free / 1e9:.0f} GB free"}
    base, tuned = _models(layout, clock.device)
    out = {name: torch.full_like(tensor, 1.0) for name, tensor in base.items()}
    copy = Copy(clock, copy_bytes)
    rate = 2 * copy.nbytes / statistics.median(clock.seconds(copy.call) for _ in range(ROUNDS))
    found |= {"copy_gbs": rate / 1e9, "one_pass_ms": found["nbytes"] / rate * 1e3, "methods": {}}
    for title, (merge, options) in METHODS.items():
        columns = found["methods"][title] = {}
        for backend in able():
            if left() <= 0:
                columns[backend] = {"left_out": "out of time"}
                continue
            try:
                columns[backend] = _timed(merge, options, backend, (base, tuned, out), clock, rate)
            except Exception as error:  # the other backend's figures are worth having
                columns[backend] = {"error": f"{type(error).__name__}: {error}"}
    return found


def _timed(
    merge: Merge,
    options: Mapping[str, Any],
    backend: str,
    models: tuple[Model, list[Model], Model],
    clock: Clock,
    rate: float,
) -> dict[str, Any]:
    """One graph with every tensor's merge; the small tensors' results are compared with the CPU's."""
    base, tuned, out = models

    def whole() -> None:
        with pykernels.use_backend(backend), grouped():
            for name, tensor in base.items():
                named = {"name": name} if "seed" in options else {}
                merge(tensor, [t[name] for t in tuned], weight=WEIGHT, out=out[name], **options, **named)

    for tensor in out.values():
        tensor.fill_(float("nan"))
    replay = clock.capture(whole)
    took = statistics.median(clock.seconds(replay) for _ in range(ROUNDS))
    nbytes = sum((TUNED + 2) * t.numel() * t.element_size() for t in base.values())
    return {"ms": took * 1e3, "of_copy": nbytes / took / rate, "checked": _check(merge, options, models)}


def _check(merge: Merge, options: Mapping[str, Any], models: tuple[Model, list[Model], Model]) -> int:
    """How many small tensors were compared with the CPU's results; RuntimeError where one differs."""
    base, tuned, out = models
    names = [n for n, t in base.items() if t.numel() <= _CHECKED and (t.dim() == 1 or "k_proj" in n)]
    names = [*names[:2], *names[-3:]]
    for name in names:
        named = {"name": name} if "seed" in options else {}
        with pykernels.use_backend("cpu"):
            wanted = merge(
                base[name].cpu(), [t[name].cpu() for t in tuned], weight=WEIGHT, **options, **named
            )
        if not torch.equal(wanted, out[name].cpu()):
            raise RuntimeError(f"{name} differs from the CPU's result")
    return len(names)


def _models(layout: Layout, device: torch.device) -> tuple[Model, list[Model]]:
    """Weights of a real model's size, never zeros: base ~ N(0, 0.02^2), deltas ~ N(0, 0.001^2)."""
    base: Model = {}
    tuned: list[Model] = [{} for _ in range(TUNED)]
    random = torch.Generator(device).manual_seed(3)
    for name, shape in layout.shapes():
        wide = torch.randn(shape, generator=random, device=device).mul_(0.02)
        base[name] = wide.bfloat16()
        wide.copy_(base[name])  # a fine-tune starts from the stored weights
        for model in tuned:
            delta = torch.randn(shape, generator=random, device=device).mul_(1e-3)
            model[name] = delta.add_(wide).bfloat16()
    return base, tuned


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
