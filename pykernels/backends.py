"""The one table op x backend, and how a backend is chosen.

A row names functions as strings, so that looking at the table imports nothing. ``PYKERNELS_BACKEND`` or
``with use_backend("ref")`` forces a backend; a forced one that cannot run says why.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import Context, ContextVar, copy_context
from typing import Any, NamedTuple, TypeAlias

import torch

from pykernels import check

ROWS = (
    "linear_merge",
    "task_arithmetic",
    "kth_magnitude",
    "ties_merge",
    "ties_fused",
    "dare_merge",
    "l1_norms",
    "dot_products",
    "magnitude_histogram",
    "elect_sign",
    "trim",
    "drop_rescale",
)
_TRITON_FILES = {
    "task_arithmetic": "linear_merge",
    "ties_fused": "ties_merge",
    "trim": "ties_merge",
    "drop_rescale": "dare_merge",
    "magnitude_histogram": "kth_magnitude",
}
"""Rows that share a file of ``kernels/`` with the op that does their work."""
TABLE: dict[str, dict[str, str]] = {
    op: {
        "cpu": f"pykernels.native:{op}",
        "cuda": f"pykernels.cuda:{op}",
        "triton": f"pykernels.kernels.{_TRITON_FILES.get(op, op)}:{op}",
        "ref": f"pykernels.ref.blocks:{op}",
    }
    for op in ROWS
}
SOFTMAX_ROWS = ("softmax", "log_softmax", "logsumexp", "softmax_backward", "log_softmax_backward")
_SOFTMAX = {
    "cpu": "pykernels.native",
    "cuda": "pykernels.cuda",
    "triton": "pykernels.kernels.softmax",
    "ref": "pykernels.ref.blocks",
}
"""The module of a backend that holds all rows of softmax."""
TABLE |= {op: {backend: f"{module}:{op}" for backend, module in _SOFTMAX.items()} for op in SOFTMAX_ROWS}
TABLE["merge_lora"] = {
    "cpu": "pykernels.merge_lora_cpu:merge_lora",
    "cuda": "pykernels.merge_lora_cuda:merge_lora",
    "triton": "pykernels.kernels.merge_lora:merge_lora",
    "ref": "pykernels.ref.merge_lora:merge_lora",
}
TABLE["merge_in_order"] = {  # as the CPU's merge_lora, to the bit, for files that any device may write
    "cpu": "pykernels.merge_lora_cpu:merge_lora",
    "cuda": "pykernels.merge_in_order_cuda:merge_in_order",
}
TABLE |= {
    op: {
        "cpu": f"pykernels.lora_linear_cpu:{op}",
        "cuda": f"pykernels.lora_linear_cuda:{op}",
        "triton": f"pykernels.kernels.lora_linear:{op}",
        "torch": f"pykernels.lora_linear_torch:{op}",
        "ref": f"pykernels.ref.lora_blocks:{op}",
    }
    for op in ("lora_linear", "lora_linear_backward")
}
TABLE["dora_norm"] = dict.fromkeys(("cpu", "torch", "ref"), "pykernels.dora_norm_torch:dora_norm")
TABLE["dora_norm"] |= {
    "cuda": "pykernels.merge_lora_cuda:dora_norm",
    "triton": "pykernels.kernels.merge_lora:dora_norm",
}
TABLE["dropout_mask"] = dict.fromkeys(("torch", "ref"), "pykernels.ref.lora_blocks:dropout_mask")
del TABLE["ties_fused"]["ref"]  # a fused form is a kernel's matter: without one, select first and merge then

_HUGE = 1 << 20
"""Elements from which on a new output asks for huge pages."""

ORDER = {"cpu": ("cpu", "torch", "ref"), "cuda": ("cuda", "triton", "torch", "ref")}
"""What ``auto`` tries per device, for every op alike until a committed measurement says otherwise."""
BACKENDS = ("cpu", "cuda", "triton", "torch", "ref")
"""``torch``: an op composed of torch's own, where those are what there is to beat (matrix products)."""
COMPOSED = frozenset({"torch", "ref"})
DEVICE_SIDE = ("cuda", "triton")
OLDEST_TRITON = (3, 4)
NATIVE_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

Everyday: TypeAlias = Callable[..., torch.Tensor | None]
"""A compiled call that returns None, with nothing done, for what it does not take."""

_forced: ContextVar[str | None] = ContextVar(
    "pykernels_backend", default=os.environ.get("PYKERNELS_BACKEND") or None
)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force backend ``name`` ("cpu", "cuda", "triton", "torch" or "ref") inside the block.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that cannot run here.
    """
    _require(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def host_context() -> Context:
    """A copy of the context for work on host memory: without a forced backend that does not run there."""
    context = copy_context()
    forced = _forced.get()
    if forced is not None and missing(forced) is None and _runs_on(forced) not in (None, "cpu"):
        context.run(_forced.set, None)
    return context


def beside_files() -> AbstractContextManager[None]:
    """For work between threads that read and write: the CPU's kernels keep to threads of their own."""
    if missing("cpu") is not None:
        return nullcontext()
    own: AbstractContextManager[None] = importlib.import_module("pykernels.native").own_threads()
    return own


def _require(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"use_backend: known backends are {', '.join(BACKENDS)}, got {name!r}")
    if why := missing(name):
        raise RuntimeError(f"use_backend: {name} cannot run here: {why}")


@functools.cache
def missing(name: str) -> str | None:
    """Why backend ``name`` cannot run on this machine, or None when it can."""
    if name in COMPOSED:
        return None
    module = {"cpu": "pykernels._C", "cuda": "pykernels._cuda", "triton": "triton"}[name]
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return f"{module} is not {'installed' if name == 'triton' else 'built'} ({error})"
    if name == "cuda":
        why: str | None = found.unavailable()
        return why
    if name == "triton" and tuple(map(int, found.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"triton must be {'.'.join(map(str, OLDEST_TRITON))} or newer, is {found.__version__}"
    if name == "triton" and not _interpreted() and not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _runs_on(name: str) -> str | None:
    """The type of the device whose memory a compiled backend addresses; None: any."""
    if name == "cuda":
        memory: str = importlib.import_module("pykernels._cuda").memory()
        return memory
    return {"cpu": "cpu", "triton": "cpu" if _interpreted() else "cuda"}.get(name)


class Chosen(NamedTuple):
    """A backend and its function for an op; None where no backend has the op."""

    backend: str | None
    function: Callable[..., Any] | None


@functools.cache
def _function(op: str, backend: str) -> Callable[..., Any]:
    module, _, name = TABLE[op][backend].partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return torch.no_grad()(function) if backend in COMPOSED else function  # kernels record no graph either


@functools.cache
def _automatic(op: str, device: str, dtype: torch.dtype) -> Chosen:
    reasons = []
    for backend in ORDER.get(device, ("ref",)):
        if backend not in TABLE[op] or (backend != "ref" and dtype not in NATIVE_DTYPES):
            continue
        if why := missing(backend):
            reasons.append(why)
            continue
        if backend == "ref" and reasons:
            _warn_once(device, "; ".join(reasons))
        return Chosen(backend, _function(op, backend))
    return Chosen(None, None)


@functools.cache
def _warn_once(device: str, why: str) -> None:
    """One warning a process and device: it stands for every op, so it points at no line of the caller."""
    warnings.warn(
        f"pykernels: {why}; the PyTorch references serve on {device} tensors, which are far slower. "
        f"Install {'Triton, or nvcc' if device == 'cuda' else 'a C++17 compiler'} and reinstall pykernels.",
        RuntimeWarning,
        stacklevel=1,
    )


def _choose(op: str, like: torch.Tensor) -> Chosen:
    """The backend that runs ``op`` on tensors such as ``like``.

    float64 always goes to the reference: no kernel computes in it.
    """
    forced = _forced.get()
    if forced is None or like.dtype not in NATIVE_DTYPES:
        return _automatic(op, like.device.type, like.dtype)
    _require(forced)
    if _runs_on(forced) not in (None, like.device.type):
        raise RuntimeError(
            f"{op}: backend {forced} was forced and does not run on {like.device.type} tensors"
        )
    return Chosen(forced, _function(op, forced)) if forced in TABLE[op] else Chosen(None, None)


def find(op: str, like: torch.Tensor) -> Callable[..., Any] | None:
    """The function that runs ``op`` on tensors such as ``like``, or None where no backend has this op."""
    return _choose(op, like).function


def call(op: str, like: torch.Tensor) -> Callable[..., Any]:
    """As :func:`find`, for ops that every backend has."""
    function = find(op, like)
    if function is None:
        raise RuntimeError(f"{op}: no backend has it for {like.dtype} on {like.device.type}")
    return function


def everyday(op: str) -> Everyday:
    """The compiled call (x, dim, out) of softmax or log_softmax without options, or (x, dim, keepdim) of
    logsumexp.

    It asks the tensors what it must know by itself, and returns None, with nothing done, where a question is
    open or a backend forced: what checks everything takes longer than a small softmax.
    """
    if missing("cpu"):
        return lambda *_: None
    run: Everyday = importlib.import_module("pykernels.everyday").rows(op, _forced)
    return run


def everyday_layers(adapter: type) -> tuple[Everyday, Everyday, Everyday]:
    """As :func:`everyday`, for lora_linear (x, weight, A, B, scaling, bias, column_scale), its grouped form
    and merge_lora (weight, adapters, fan_in_fan_out, out, rounding).
    """
    if missing("cpu"):
        return (lambda *_: None), (lambda *_: None), (lambda *_: None)
    found: tuple[Everyday, Everyday, Everyday]
    found = importlib.import_module("pykernels.everyday").layers(_forced, adapter)
    return found


def chosen(op: str, like: torch.Tensor) -> str | None:
    """The name of the backend that runs ``op`` on tensors such as ``like``, None where no backend has it."""
    return _choose(op, like).backend


def device_side(op: str, like: torch.Tensor) -> bool:
    """Whether the kernels of ``op`` read weights, lambda and cuts from the device's memory.

    Such a backend takes tensors for them, which the host need not wait for, and its fused forms take an
    ``out`` that is an input.
    """
    return chosen(op, like) in DEVICE_SIDE


def output(
    op: str,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    like: torch.Tensor,
    inputs: Sequence[torch.Tensor],
) -> torch.Tensor:
    """``out``, checked; or a new tensor as :func:`fresh` makes it."""
    if out is not None:
        check.output(op, out, out_dtype, like, inputs)
        torch.autograd.graph.increment_version(out)  # a graph that has saved it must not use what comes
        return out
    return fresh(like.shape, check.result_dtype(op, out_dtype, like), like.device)


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A new contiguous tensor, on huge pages where large: a first touch costs more than a merge."""
    new = torch.empty(shape, dtype=dtype, device=device)
    if new.numel() >= _HUGE and device.type == "cpu" and missing("cpu") is None:
        importlib.import_module("pykernels.native").advise_huge(new)
    return new


def grid() -> list[tuple[str, dict[str, str]]]:
    """Rows (op, {backend: "yes", "no" or "-" for no such kernel}) for ``pykernels backends``."""
    able = {b: "no" if missing(b) else "yes" for b in BACKENDS}
    return [(op, {b: able[b] if b in row else "-" for b in BACKENDS}) for op, row in TABLE.items()]
