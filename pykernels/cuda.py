"""Tensors to jobs of the CUDA module, one short function per op. Arguments were checked by the caller.

Kernels run on the caller's current stream and nothing here waits for them. Numbers (weight, vote, share,
lambda_) are lists and floats, or float32 tensors on the device, which the kernels read there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from pykernels import _cuda, grouping
from pykernels.cut import Cut
from pykernels.rows import CODES, COMBINE, MASKS, NONE_KEPT, SUM_BLOCK, through_float32

SOFTMAX_KINDS = {"softmax": 0, "log_softmax": 1, "logsumexp": 2}
"""As ``SoftmaxKind`` in csrc/cuda/softmax.h."""

Tensors = Sequence[torch.Tensor]
Numbers = list[float] | torch.Tensor | None
Number = float | torch.Tensor


class Job(NamedTuple):
    """One tensor on its way into a launch."""

    packed: _cuda.Job
    like: torch.Tensor
    models: int
    options: tuple[int, ...]  # what the launch takes besides its jobs
    alive: tuple[object, ...]  # whatever memory the job points to


def linear_merge(out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors, weight: Numbers) -> None:
    """out = base + sum(weight * (tuned - base)), or sum(weight * tuned) without a base."""
    if out.dtype not in CODES:
        return through_float32(linear_merge, out, base, tuned, weight)
    packed = _pack(out, base, tuned)
    packed.numbers(*_each(weight), *_each(None), *_each(None), *_one(1.0))
    _submit(_run_linear, out, Job(packed, tuned[0], len(tuned), (), (out, base, tuned, weight)))


task_arithmetic = linear_merge


def kth_magnitude(base: torch.Tensor | None, tuned: Tensors, k: list[int]) -> Cut:
    """The exact cut of every model, on the device: k kept, the lowest flat index first among equals."""
    cut = torch.empty(2, len(tuned), dtype=torch.int64, device=tuned[0].device)
    if tuned[0].numel() == 0:
        cut[0], cut[1] = NONE_KEPT, -1
    else:
        packed = _pack(cut, base, tuned, code=0)
        alive = _selection(packed, cut, tuned, k)
        _run(
            _cuda.kth_magnitude,
            "kth_magnitude",
            [Job(packed, tuned[0], len(tuned), (), (base, tuned, *alive))],
        )
    return Cut(cut[0], cut[1])


def magnitude_histogram(
    base: torch.Tensor | None, tuned: Tensors, shift: int, prefix: list[int] | None
) -> torch.Tensor:
    """Counts [n, 65536] of (key >> shift) & 0xFFFF over keys whose higher bits equal the prefix."""
    bins = torch.zeros(len(tuned), 65536, dtype=torch.int64, device=tuned[0].device)
    if tuned[0].numel():
        packed = _pack(bins, base, tuned, code=0)
        packed.cut(prefix or [], [])
        job = Job(packed, tuned[0], len(tuned), (shift, prefix is None), (base, tuned))
        _run(_cuda.magnitude_histogram, "magnitude_histogram", [job])
    return bins


def ties_merge(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Tensors,
    cut: Cut,
    weight: Numbers,
    vote: Numbers,
    share: Numbers,
    lambda_: Number,
    elect: str | None,
    offset: int = 0,
) -> None:
    """Trim by known cuts, elect, average: one pass."""
    if out.dtype not in CODES:
        return through_float32(ties_merge, out, base, tuned, cut, weight, vote, share, lambda_, elect, offset)
    packed = _pack(out, base, tuned, offset)
    packed.numbers(*_each(weight), *_each(vote), *_each(share), *_one(lambda_))
    if isinstance(cut.key, list) and isinstance(cut.last, list):
        packed.cut([min(key, NONE_KEPT) for key in cut.key], cut.last)
    else:
        cut = Cut(*(torch.as_tensor(part, device=out.device).contiguous() for part in cut))
        packed.cut_at(cut.key.data_ptr(), cut.last.data_ptr())  # type: ignore[union-attr]
    alive = (out, base, tuned, cut, weight, vote, share, lambda_)
    _submit(_run_ties, out, Job(packed, tuned[0], len(tuned), (COMBINE[elect],), alive))


def ties_fused(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Tensors,
    k: list[int],
    tie: str,
    weight: Numbers,
    vote: Numbers,
    share: Numbers,
    lambda_: Number,
    elect: str | None,
) -> None:
    """Selection, then merge, without the host; ``out`` may be one of the inputs."""
    if out.dtype not in CODES:
        return through_float32(ties_fused, out, base, tuned, k, tie, weight, vote, share, lambda_, elect)
    packed = _pack(out, base, tuned)
    packed.numbers(*_each(weight), *_each(vote), *_each(share), *_one(lambda_))
    cut = torch.empty(2, len(tuned), dtype=torch.int64, device=out.device)
    alive = (out, base, tuned, weight, vote, share, lambda_, *_selection(packed, cut, tuned, k))
    _submit(_run_fused, out, Job(packed, tuned[0], len(tuned), (COMBINE[elect], tie == "keep"), alive))


def dare_merge(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Tensors,
    threshold: list[int],
    model: list[int],
    key: int,
    weight: Numbers,
    vote: Numbers,
    share: Numbers,
    lambda_: Number,
    elect: str | None,
    offset: int = 0,
) -> None:
    """Drop by stateless draws, then add up or elect and average: one pass."""
    if out.dtype not in CODES:
        return through_float32(
            dare_merge, out, base, tuned, threshold, model, key, weight, vote, share, lambda_, elect, offset
        )
    packed = _pack(out, base, tuned, offset)
    packed.draws(threshold, model, key)
    packed.numbers(*_each(weight), *_each(vote), *_each(share), *_one(lambda_))
    alive = (out, base, tuned, weight, vote, share, lambda_)
    _submit(_run_dare, out, Job(packed, tuned[0], len(tuned), (COMBINE[elect],), alive))


def l1_norms(
    base: torch.Tensor | None,
    tuned: Tensors,
    threshold: list[int],
    model: list[int],
    key: int,
    offset: int = 0,
) -> torch.Tensor:
    """Sums [blocks, n, 2] in float64 of |delta| and the kept |delta| per block of 4096 elements."""
    sums = _block_sums(tuned, 2)
    if tuned[0].numel():
        packed = _pack(sums, base, tuned, offset, code=0)
        packed.draws(threshold, model, key)
        _run(_cuda.l1_norms, "l1_norms", [Job(packed, tuned[0], len(tuned), (), (base, tuned))])
    return sums


def dot_products(grad: torch.Tensor, base: torch.Tensor | None, tuned: Tensors) -> torch.Tensor:
    """Sums [blocks, n] in float64 of grad * delta per block of 4096 elements."""
    sums = _block_sums(tuned)
    if grad.numel():
        packed = _pack(sums, base, tuned, code=0)
        packed.grad(grad.data_ptr(), CODES[grad.dtype])
        _run(_cuda.dot_products, "dot_products", [Job(packed, tuned[0], len(tuned), (), (grad, base, tuned))])
    return sums


def elect_sign(out: torch.Tensor, deltas: Tensors, weight: Numbers, elect: str) -> None:
    """+1 or -1 per element, int8."""
    if out.numel():
        packed = _pack(out, None, deltas, code=0)
        packed.numbers(*_each(weight), *_each(None), *_each(None), *_one(1.0))
        _run(
            _cuda.elect_sign,
            "elect_sign",
            [Job(packed, deltas[0], len(deltas), (COMBINE[elect],), (deltas, weight))],
        )


def trim(out: torch.Tensor, delta: torch.Tensor, cut: Cut, offset: int = 0) -> None:
    """delta where kept, 0 elsewhere."""
    ties_merge(out, None, [delta], cut, [1.0], None, None, 1.0, None, offset)


def drop_rescale(
    out: torch.Tensor, delta: torch.Tensor, threshold: int, key: int, scale: float, offset: int = 0
) -> None:
    """scale * delta where kept, 0 elsewhere."""
    dare_merge(out, None, [delta], [threshold], [0], key, [scale], None, None, 1.0, None, offset)


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
    _softmax("softmax", out, x, temperature, softcap, mask, sink, safe)


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
    _softmax("log_softmax", out, x, temperature, softcap, mask, sink, safe)


def logsumexp(out: torch.Tensor, x: torch.Tensor, temperature: float) -> None:
    """out [outer, inner] = log(sum(exp(x / temperature))) over the middle of x [outer, n, inner]."""
    _softmax("logsumexp", out, x, temperature, None, None, None, False)


def _softmax(
    op: str,
    out: torch.Tensor,
    x: torch.Tensor,
    temperature: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sink: torch.Tensor | None,
    safe: bool,
) -> None:
    outer, n, inner = x.shape
    mask_stride = (0, 0, 0) if mask is None else mask.stride()
    job = _cuda.Softmax(
        out.data_ptr(),
        CODES[out.dtype],
        x.data_ptr(),
        CODES[x.dtype],
        outer,
        n,
        inner,
        SOFTMAX_KINDS[op],
        0 if mask is None else mask.data_ptr(),
        -1 if mask is None else MASKS[mask.dtype],
        (mask_stride[0], mask_stride[1], mask_stride[2]),
        0 if sink is None else sink.data_ptr(),
        (0, 0) if sink is None else (sink.stride(0), sink.stride(1)),
        temperature,
        softcap or 0.0,
        safe,
    )
    _run_rows(op, job, x)


def softmax_backward(out: torch.Tensor, grad: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    """out = scale * y * (grad - sum(grad * y)) over the middle of [outer, n, inner]."""
    _softmax_backward("softmax_backward", 0, out, grad, y, scale)


def log_softmax_backward(out: torch.Tensor, grad: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    """out = scale * (grad - exp(y) * sum(grad)) over the middle of [outer, n, inner]."""
    _softmax_backward("log_softmax_backward", 1, out, grad, y, scale)


def _softmax_backward(
    op: str, kind: int, out: torch.Tensor, grad: torch.Tensor, y: torch.Tensor, scale: float
) -> None:
    outer, n, inner = y.shape
    job = _cuda.SoftmaxBackward(
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
    )
    _run_rows(op, job, y)


def _run_rows(op: str, job: _cuda.Softmax | _cuda.SoftmaxBackward, like: torch.Tensor) -> None:
    """Raises RuntimeError with op, shape and CUDA's error. Memory for sums only where rows are split."""
    device, stream = place(like.device)
    nbytes = job.scratch(device)
    scratch = torch.empty(nbytes, dtype=torch.uint8, device=like.device) if nbytes else None
    try:
        job.run(device, stream, 0 if scratch is None else scratch.data_ptr())
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: launch on {like.device} for a {like.dtype} tensor of shape {list(like.shape)} failed: "
            f"{error}"
        ) from None


def _pack(
    out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors, offset: int = 0, code: int | None = None
) -> _cuda.Job:
    """``code``: of a float output's dtype; any where the output is no float that is rounded."""
    like = tuned[0]
    return _cuda.Job(
        CODES[like.dtype],
        out.data_ptr(),
        CODES[out.dtype] if code is None else code,
        0 if base is None else base.data_ptr(),
        [t.data_ptr() for t in tuned],
        like.numel(),
        offset,
    )


def _each(numbers: Numbers) -> tuple[list[float], int]:
    if isinstance(numbers, torch.Tensor):
        return [], numbers.data_ptr()
    return numbers or [], 0


def _one(number: Number) -> tuple[float, int]:
    return (1.0, number.data_ptr()) if isinstance(number, torch.Tensor) else (number, 0)


def _selection(
    packed: _cuda.Job, cut: torch.Tensor, tuned: Tensors, k: list[int]
) -> tuple[torch.Tensor, ...]:
    """Gives a job its ranks, its scratch memory and a place for the cuts [2, n]; returns what must live."""
    nbytes = _cuda.kth_scratch(tuned[0].numel(), len(tuned))
    scratch = torch.empty(nbytes, dtype=torch.uint8, device=cut.device)
    packed.select(k, scratch.data_ptr())
    packed.cut_at(cut[0].data_ptr(), cut[1].data_ptr())
    return cut, scratch


def _block_sums(tuned: Tensors, *each: int) -> torch.Tensor:
    blocks = -(-tuned[0].numel() // SUM_BLOCK)
    return torch.empty(blocks, len(tuned), *each, dtype=torch.float64, device=tuned[0].device)


def _submit(run: Callable[[list[Job]], None], out: torch.Tensor, job: Job) -> None:
    """Alone or in a group, on the stream that is current now; an empty tensor needs no kernel."""
    if out.numel():
        key = (out.device, job.like.dtype, job.models, *job.options)
        grouping.submit(run, key, job, out.numel(), out.device)


def _run_linear(jobs: list[Job]) -> None:
    _run(_cuda.linear_merge, "linear_merge", jobs)


def _run_ties(jobs: list[Job]) -> None:
    _run(_cuda.ties_merge, "ties_merge", jobs)


def _run_fused(jobs: list[Job]) -> None:
    _run(_cuda.ties_fused, "ties_merge", jobs)


def _run_dare(jobs: list[Job]) -> None:
    _run(_cuda.dare_merge, "dare_merge", jobs)


def _run(launch: Callable[..., None], op: str, jobs: list[Job]) -> None:
    """One launch (or one per stage) for all jobs. Raises RuntimeError with op, shapes and CUDA's error."""
    like, options = jobs[0].like, jobs[0].options
    packed = [job.packed for job in jobs]
    table = 0
    if len(jobs) > 1:
        room = torch.empty(_cuda.table_bytes(packed), dtype=torch.uint8, device=like.device)
        table = room.data_ptr()
    try:
        launch(packed, CODES[like.dtype], *place(like.device), table, *options)
    except RuntimeError as error:
        shapes = ", ".join(str(list(job.like.shape)) for job in jobs[:5])
        more = f" and {len(jobs) - 5} more" if len(jobs) > 5 else ""
        raise RuntimeError(
            f"{op}: launch on {like.device} for {like.dtype} tensors of shape {shapes}{more} failed: {error}"
        ) from None


def place(device: torch.device) -> tuple[int, int]:
    """(device index, address of its current stream); the emulated kernels have neither."""
    if device.type != "cuda":
        return 0, 0
    stream: Any = torch._C._cuda_getCurrentRawStream(device.index)
    return device.index, stream
