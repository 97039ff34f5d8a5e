"""Every row of the table of backends once, small, odd-sized and misaligned: what compute-sanitizer watches.

``compute-sanitizer --tool memcheck python -m pykernels.bench.sanitize_cases``. Results are compared with the
CPU kernels' too. With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

import pykernels
from pykernels import backends
from pykernels.bench import sanitize_lora
from pykernels.bench.gpu_table import able
from pykernels.bench.inputs import Inputs, Spec, make
from pykernels.bench.sanitize_lora import odd
from pykernels.bench.softmax_calls import agrees
from pykernels.cut import Cut
from pykernels.grouping import grouped

SHAPES = ((1, 1031), (1, 20_483))
"""Past one block; past the sample of the selection."""

MASKS: tuple[list[int], list[int], int] = ([30_000, 65_536, 9], [0, 3, 7], 99)
WEIGHT = [0.5, -0.25, 0.3]
RULES: tuple[tuple[list[float] | None, list[float] | None, str | None], ...] = (
    (None, WEIGHT, "weighted"), ([1.0, 1.5, 1.0], None, "plain"), (None, None, None),
)  # fmt: skip
"""vote, share and elect."""

Results = list[torch.Tensor]
Row = Callable[[Callable[..., Any], Inputs], Results]


def _merge(function: Callable[..., Any], x: Inputs, *arguments: Any) -> torch.Tensor:
    out = odd(torch.full_like(x.out, float("nan")))
    function(out, *arguments)
    return out


def _ranks(x: Inputs) -> list[int]:
    return [x.base.numel() // 3, x.base.numel(), 1]


def _linear(function: Callable[..., Any], x: Inputs) -> Results:
    on_device = torch.tensor(WEIGHT, device=x.base.device) if x.base.is_cuda else WEIGHT
    return [_merge(function, x, x.base, x.tuned, WEIGHT), _merge(function, x, None, x.tuned, on_device)]


def _ties(function: Callable[..., Any], x: Inputs) -> Results:
    cut = Cut([0x3A83126F, 0, 0xFFFFFFFF], [500, 2**62, -1])
    return [_merge(function, x, x.base, x.tuned, cut, WEIGHT, v, s, 0.7, e, 4096) for v, s, e in RULES]


def _fused(function: Callable[..., Any], x: Inputs) -> Results:
    k = _ranks(x)
    return [
        _merge(function, x, x.base, x.tuned, k, tie, WEIGHT, v, s, 0.7, e)
        for tie in ("index", "keep")
        for v, s, e in RULES
    ]


def _dare(function: Callable[..., Any], x: Inputs) -> Results:
    return [_merge(function, x, x.base, x.tuned, *MASKS, WEIGHT, v, s, 0.7, e, 4096) for v, s, e in RULES]


def _kth(function: Callable[..., Any], x: Inputs) -> Results:
    """The cut as a selection: the two numbers have several right forms where all are kept."""
    cut = function(x.base, x.tuned, _ranks(x))
    key, last = (torch.as_tensor(part, dtype=torch.int64).cpu() for part in cut)
    return [key[[0, 2]], last[[0, 2]]]


def _signs(function: Callable[..., Any], x: Inputs) -> Results:
    outs = [odd(torch.zeros(x.base.shape, dtype=torch.int8, device=x.base.device)) for _ in range(2)]
    for out, elect in zip(outs, ("weighted", "plain"), strict=True):
        function(out, x.tuned, WEIGHT, elect)
    return outs


def _softmax(function: Callable[..., Any], x: Inputs) -> Results:
    """Plain, and with every option; rows, columns, rows on a cluster of blocks and rows in chunks."""
    results = []
    for z in _shapes(x.base):
        keep, sink = z.abs() < 0.04, z[:, 0].float().contiguous()
        for options in ((1.0, None, None, None, False), (0.5, 0.05, keep, sink, True)):
            out = odd(torch.full_like(z, float("nan")))
            function(out, z, *options)
            results.append(out)
    return results


def _log_softmax(function: Callable[..., Any], x: Inputs) -> Results:
    return _softmax(lambda out, z, t, cap, keep, sink, safe: function(out, z, t, cap, keep, None, safe), x)


def _logsumexp(function: Callable[..., Any], x: Inputs) -> Results:
    outs = [odd(torch.full_like(z[:, 0], float("nan"))) for z in _shapes(x.base)]
    for out, z in zip(outs, _shapes(x.base), strict=True):
        function(out, z, 0.5)
    return outs


def _row_gradient(function: Callable[..., Any], x: Inputs) -> Results:
    outs = [odd(torch.full_like(z, float("nan"))) for z in _shapes(x.base)]
    for out, grad, y in zip(outs, _shapes(x.tuned[0]), _shapes(x.base), strict=True):
        function(out, grad, y, 0.5)
    return outs


_LONG = 500_009
"""Elements of a row that one block cannot hold: a cluster can in 16 bits, in float32 it goes in chunks."""


def _shapes(values: torch.Tensor) -> list[torch.Tensor]:
    """[outer, n, inner] at odd addresses; the long row where there is a device to run it."""
    flat = values.view(-1)
    shapes = [(1, flat.numel(), 1), (3, flat.numel() // 15, 5), (flat.numel() // 67, 67, 1)]
    parts = [flat[: math.prod(shape)].view(shape) for shape in shapes]
    if values.is_cuda and flat.numel() > 10_000:
        parts.append(flat.repeat(_LONG // flat.numel() + 1)[:_LONG].view(1, -1, 1))
    return [odd(part) for part in parts]


ROWS: dict[str, Row] = {
    "linear_merge": _linear,
    "task_arithmetic": _linear,
    "kth_magnitude": _kth,
    "ties_merge": _ties,
    "ties_fused": _fused,
    "dare_merge": _dare,
    "l1_norms": lambda f, x: [f(x.base, x.tuned, *MASKS, 4096)],
    "dot_products": lambda f, x: [f(x.tuned[0], x.base, x.tuned)],
    "magnitude_histogram": lambda f, x: [f(x.base, x.tuned, 16, None), f(x.base, x.tuned, 0, [0x3A80] * 3)],
    "elect_sign": _signs,
    "trim": lambda f, x: [_merge(f, x, x.tuned[0], Cut([0x3C000000], [77]))],
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "softmax_backward": _row_gradient,
    "log_softmax_backward": _row_gradient,
    "drop_rescale": lambda f, x: [_merge(f, x, x.tuned[0], 30_000, 99, 2.0, 8192)],
    **{op: row for op, row in sanitize_lora.ROWS.items() if "cuda" in backends.TABLE.get(op, ())},
}
"""What each row of ``backends.TABLE`` is called with; a list of results to compare."""


def run(device: torch.device, say: Callable[[str], None] = print, only: str | None = None) -> int:
    """Every row on every backend, or ``only`` one, and dtype; returns how many gave other bits than the CPU.

    What fails is named; it ends the run where the device cannot be used any more.
    """
    wrong = 0
    for backend in [only] if only else able():
        for dtype in (torch.bfloat16, torch.float32):
            for shape in SHAPES:
                on_cpu = make(Spec(shape, dtype, 3), seed=5)
                x = Inputs(*_placed(on_cpu, device))
                for op in ROWS:
                    if backend not in backends.TABLE[op]:
                        continue
                    if why := _differs(op, backend, x, on_cpu):
                        wrong += 1
                        say(f"{op} on {backend}, {dtype}, {shape[1]} elements: {why}")
                        if device.type == "cuda":
                            torch.cuda.synchronize(device)
            wrong += _groups(backend, dtype, device, say)
        say(f"{backend}: every row ran")
    return wrong


def _differs(op: str, backend: str, x: Inputs, on_cpu: Inputs) -> str:
    """What is wrong with a row's results, or nothing."""
    with pykernels.use_backend("cpu"):
        wanted = ROWS[op](backends.call(op, on_cpu.base), on_cpu)
    try:
        with pykernels.use_backend(backend):
            got = [g.cpu() for g in ROWS[op](backends.call(op, x.base), x)]
    except RuntimeError as error:
        return str(error)
    same = all(_same(op, g, w) for g, w in zip(got, wanted, strict=True))
    return "" if same else "not what the CPU's kernels give"


def _same(op: str, got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return sanitize_lora.close(got, wanted) if op in sanitize_lora.ROWS else agrees(op, got, wanted)


def _placed(x: Inputs, device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    return odd(x.base.to(device)), [odd(t.to(device)) for t in x.tuned], odd(x.out.to(device))


def _groups(backend: str, dtype: torch.dtype, device: torch.device, say: Callable[[str], None]) -> int:
    """Three tensors in one launch."""
    models = [make(Spec((1, numel), dtype, 3), seed=numel) for numel in (1, 63, 4099)]
    for merge, options in (
        (pykernels.ties_merge, {"density": 0.4}),
        (pykernels.dare_merge, {"density": 0.4, "seed": 3}),
        (pykernels.task_arithmetic, {}),
    ):
        placed = [Inputs(*_placed(x, device)) for x in models]
        with pykernels.use_backend(backend), grouped():
            for x in placed:
                merge(x.base, x.tuned, weight=WEIGHT, out=x.out, **options)
        with pykernels.use_backend("cpu"):
            wanted = [merge(x.base, x.tuned, weight=WEIGHT, **options) for x in models]
        if not all(torch.equal(x.out.cpu(), w) for x, w in zip(placed, wanted, strict=True)):
            say(f"{merge.__name__} in a group on {backend}, {dtype}: other bits than the CPU's")
            return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where any result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m pykernels.bench.sanitize_cases")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", help="one instead of all")
    given = parser.parse_args(arguments)
    return int(run(torch.device(given.device), only=given.backend) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
