"""Tensors to pointers, one short function per compiled op. Arguments were checked by the caller."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.autograd import forward_ad

from pykernels import _C
from pykernels.cut import Cut
from pykernels.rows import CODES, COMBINE, MASKS, NONE_KEPT, SUM_BLOCK, through_float32

FLOAT_ROWS = 1024 if _C.isas()[0] == "avx2" else 64
"""Rows up to which a float32 layer is a product of ours; with AVX-512 the products of torch's library are the
faster ones from about there on."""

if multiprocessing.parent_process() is not None and multiprocessing.get_start_method(True) in (None, "fork"):
    _C.forget_team()  # the parent may have used torch's threads, and they did not come along

_threads: ContextVar[int | None] = ContextVar("pykernels_threads", default=None)
_WATCHES = (torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state, forward_ad)
"""What everyday calls ask in place of ``memory.watched``: a transform's tensors have no memory to lend."""

Tensors = Sequence[torch.Tensor]


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Run kernels with ``count`` threads inside the block; None follows ``torch.get_num_threads()``."""
    if count is not None and count < 1:
        raise ValueError(f"use_threads: the number of threads must be at least 1, got {count}")
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)


def threads() -> int:
    """How many threads a kernel takes now."""
    return _threads.get() or torch.get_num_threads()


@contextmanager
def own_threads() -> Iterator[None]:
    """Kernels that this thread calls inside the block run on threads of ours, not on torch's.

    Torch's start sooner and do not share the cores with themselves, but all of them have to come: beside
    threads that read and write files ours lose less.
    """
    before = _C.own_threads(True)
    try:
        yield
    finally:
        _C.own_threads(before)


def isas() -> list[str]:
    """Instruction sets that were compiled in and that this machine runs, best first."""
    return _C.isas()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the kernels of instruction set ``name`` inside the block (all threads of the process)."""
    before = _C.isa()
    _C.use_isa(name)
    try:
        yield
    finally:
        _C.use_isa(before)


def _inputs(base: torch.Tensor | None, tuned: Tensors) -> tuple[int, int, list[int], int]:
    first = tuned[0]
    return (
        CODES[first.dtype],
        0 if base is None else base.data_ptr(),
        [t.data_ptr() for t in tuned],
        first.numel(),
    )


def linear_merge(out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors, weight: list[float]) -> None:
    """out = base + sum(weight * (tuned - base)), or sum(weight * tuned) without a base."""
    if out.dtype not in CODES:
        return through_float32(linear_merge, out, base, tuned, weight)
    _C.linear_merge(out.data_ptr(), CODES[out.dtype], *_inputs(base, tuned), weight, threads())


task_arithmetic = linear_merge


def kth_magnitude(base: torch.Tensor | None, tuned: Tensors, k: list[int]) -> Cut:
    """The exact cut of every model: k kept, the lowest flat index first among equals."""
    return Cut(*_C.kth_magnitude(*_inputs(base, tuned), k, threads()))


def magnitude_histogram(
    base: torch.Tensor | None, tuned: Tensors, shift: int, prefix: list[int] | None
) -> torch.Tensor:
    """Counts [n, 65536] of (key >> shift) & 0xFFFF over keys whose higher bits equal the prefix."""
    bins = torch.empty(len(tuned), 65536, dtype=torch.int64, device="cpu")
    _C.magnitude_histogram(bins.data_ptr(), *_inputs(base, tuned), shift, prefix, threads())
    return bins


def ties_merge(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Tensors,
    cut: Cut,
    weight: list[float],
    vote: list[float] | None,
    share: list[float] | None,
    lambda_: float,
    elect: str | None,
    offset: int = 0,
) -> None:
    """Trim by known cuts, elect, average: one pass."""
    if out.dtype not in CODES:
        return through_float32(ties_merge, out, base, tuned, cut, weight, vote, share, lambda_, elect, offset)
    key = [min(k, NONE_KEPT) for k in cut.key]
    _C.ties_merge(
        out.data_ptr(),
        CODES[out.dtype],
        *_inputs(base, tuned),
        key,
        list(cut.last),
        weight,
        vote or [],
        share or [],
        lambda_,
        COMBINE[elect],
        offset,
        threads(),
    )


def ties_fused(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Tensors,
    k: list[int],
    tie: str,
    weight: list[float],
    vote: list[float] | None,
    share: list[float] | None,
    lambda_: float,
    elect: str | None,
) -> None:
    """Selection and merge in one pass over memory; ``out`` must share no memory with the inputs."""
    if out.dtype not in CODES:
        return through_float32(ties_fused, out, base, tuned, k, tie, weight, vote, share, lambda_, elect)
    _C.ties_fused(
        out.data_ptr(),
        CODES[out.dtype],
        *_inputs(base, tuned),
        k,
        tie == "keep",
        weight,
        vote or [],
        share or [],
        lambda_,
        COMBINE[elect],
        threads(),
    )


def dare_merge(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Tensors,
    threshold: list[int],
    model: list[int],
    key: int,
    weight: list[float],
    vote: list[float] | None,
    share: list[float] | None,
    lambda_: float,
    elect: str | None,
    offset: int = 0,
) -> None:
    """Drop by stateless draws, then add up or elect and average: one pass."""
    if out.dtype not in CODES:
        return through_float32(
            dare_merge, out, base, tuned, threshold, model, key, weight, vote, share, lambda_, elect, offset
        )
    _C.dare_merge(
        out.data_ptr(),
        CODES[out.dtype],
        *_inputs(base, tuned),
        threshold,
        model,
        key,
        weight,
        vote or [],
        share or [],
        lambda_,
        COMBINE[elect],
        offset,
        threads(),
    )


def l1_norms(
    base: torch.Tensor | None,
    tuned: Tensors,
    threshold: list[int],
    model: list[int],
    key: int,
    offset: int = 0,
) -> torch.Tensor:
    """Sums [blocks, n, 2] in float64 of |delta| and the kept |delta| per block of 4096 elements."""
    sums = torch.empty(-(-tuned[0].numel() // SUM_BLOCK), len(tuned), 2, dtype=torch.float64, device="cpu")
    _C.l1_norms(sums.data_ptr(), *_inputs(base, tuned), threshold, model, key, offset, threads())
    return sums


def dot_products(grad: torch.Tensor, base: torch.Tensor | None, tuned: Tensors) -> torch.Tensor:
    """Sums [blocks, n] in float64 of grad * delta per block of 4096 elements."""
    sums = torch.empty(-(-tuned[0].numel() // SUM_BLOCK), len(tuned), dtype=torch.float64, device="cpu")
    _C.dot_products(sums.data_ptr(), CODES[grad.dtype], grad.data_ptr(), *_inputs(base, tuned), threads())
    return sums


def elect_sign(out: torch.Tensor, deltas: Tensors, weight: list[float], elect: str) -> None:
    """+1 or -1 per element."""
    code, _, addresses, numel = _inputs(None, deltas)
    _C.elect_sign(out.data_ptr(), code, addresses, numel, weight, COMBINE[elect], threads())


def trim(out: torch.Tensor, delta: torch.Tensor, cut: Cut, offset: int = 0) -> None:
    """delta where kept, 0 elsewhere."""
    ties_merge(out, None, [delta], cut, [1.0], None, None, 1.0, None, offset)


def drop_rescale(
    out: torch.Tensor, delta: torch.Tensor, threshold: int, key: int, scale: float, offset: int = 0
) -> None:
    """scale * delta where kept, 0 elsewhere."""
    dare_merge(out, None, [delta], [threshold], [0], key, [scale], None, None, 1.0, None, offset)


def _softmax(
    kind: int,
    out: torch.Tensor,
    x: torch.Tensor,
    temperature: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sink: torch.Tensor | None,
    safe: bool,
) -> None:
    outer, n, inner = x.shape
    strides = [0, 0, 0] if mask is None else mask.stride()
    _C.softmax(
        out.data_ptr(),
        CODES[out.dtype],
        x.data_ptr(),
        CODES[x.dtype],
        outer,
        n,
        inner,
        kind,
        0 if mask is None else mask.data_ptr(),
        -1 if mask is None else MASKS[mask.dtype],
        (strides[0], strides[1], strides[2]),
        0 if sink is None else sink.data_ptr(),
        (0, 0) if sink is None else (sink.stride(0), sink.stride(1)),
        temperature,
        softcap or 0.0,
        safe,
        threads(),
    )


def everyday(op: str, forced: ContextVar[str | None]) -> Callable[..., torch.Tensor | None]:
    """The call (x, dim, out) of softmax or log_softmax that leaves what it does not take, returning None.

    It reads tensors by DLPack's exchange protocol, which answers in nanoseconds what attributes answer in a
    microsecond. A torch that does not speak it (older than 2.10) has all its calls left.
    """
    # What the public function calls; the way through Python takes as long as all other questions together.
    written = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)
    _C.lend_tensors(torch.Tensor, forced, torch.empty_like, written, threads, _WATCHES)
    return {"softmax": _C.softmax_rows, "log_softmax": _C.log_softmax_rows}[op]


def everyday_layers(
    forced: ContextVar[str | None], adapter: type
) -> tuple[Callable[..., torch.Tensor | None], Callable[..., torch.Tensor | None]]:
    """The calls (x, weight, A, B, scaling, bias, column_scale) and (x, weight, adapters, index, bias) of that
    kind.
    """
    types, asked = (torch.Tensor, torch.nn.Parameter, adapter), (forced, torch.is_grad_enabled, threads)
    _C.lend_layers(*types, *asked, FLOAT_ROWS, _WATCHES)
    return _C.lora_layer, _C.lora_layers


def softmax(
    out: torch.Tensor,
    x: torch.Tensor,
    temperature: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sink: torch.Tensor | None,
    safe: bool,
) -> None:
    """out = softmax over the middle of x [outer, n, inner]; mask as x, sink [outer, inner]."""
    _softmax(0, out, x, temperature, softcap, mask, sink, safe)


def log_softmax(
    out: torch.Tensor,
    x: torch.Tensor,
    temperature: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sink: None,
    safe: bool,
) -> None:
    """The logarithm of :func:`softmax`."""
    _softmax(1, out, x, temperature, softcap, mask, sink, safe)


def logsumexp(out: torch.Tensor, x: torch.Tensor, temperature: float) -> None:
    """out [outer, inner] = log(sum(exp(x / temperature))) over the middle of x [outer, n, inner]."""
    _softmax(2, out, x, temperature, None, None, None, False)


def _softmax_backward(
    kind: int, out: torch.Tensor, grad: torch.Tensor, y: torch.Tensor, scale: float
) -> None:
    outer, n, inner = y.shape
    _C.softmax_backward(
        out.data_ptr(),
        CODES[out.dtype],
        grad.data_ptr(),
        CODES[grad.dtype],
        y.data_ptr(),
        CODES[y.dtype],
        outer,
        n,
        inner,
        kind,
        scale,
        threads(),
    )


def softmax_backward(out: torch.Tensor, grad: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    """out = scale * y * (grad - sum(grad * y)) over the middle of [outer, n, inner]."""
    _softmax_backward(0, out, grad, y, scale)


def log_softmax_backward(out: torch.Tensor, grad: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    """out = scale * (grad - exp(y) * sum(grad)) over the middle of [outer, n, inner]."""
    _softmax_backward(1, out, grad, y, scale)


def count_nonfinite(tensor: torch.Tensor) -> int:
    """How many elements of a contiguous tensor are NaN or infinite."""
    if tensor.dtype not in CODES:
        return int((~torch.isfinite(tensor)).sum())
    return _C.count_nonfinite(CODES[tensor.dtype], tensor.data_ptr(), tensor.numel())


def ideal(out: torch.Tensor, inputs: Tensors, count: int | None = None) -> None:
    """XOR of all inputs written past the cache: the benchmarks' control, the least that a merge must move."""
    _C.ideal(
        out.data_ptr(), [t.data_ptr() for t in inputs], out.numel() * out.element_size(), count or threads()
    )


def advise_huge(tensor: torch.Tensor) -> None:
    """Ask for huge pages behind a fresh tensor."""
    _C.advise_huge(tensor.data_ptr(), tensor.numel() * tensor.element_size())
