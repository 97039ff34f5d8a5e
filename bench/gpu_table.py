"""The roofline table of a device: every row on every backend, against the copy bandwidth of the same run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import pykernels
from pykernels import backends
from pykernels.bench.gpu_cases import Case
from pykernels.bench.gpu_clock import Call, Clock
from pykernels.bench.inputs import Inputs, Spec, make
from pykernels.bench.softmax_calls import agrees

ROUNDS = 11
CHECKED = (61, 1031)
"""Shape on which every row is compared with the CPU kernels: odd, past one tile and one block."""

_COPY_BYTES = 1 << 30
_SAMPLE_BYTES = 1 << 30  # least bytes that one sample moves

Row = dict[str, Any]


def able() -> list[str]:
    """The backends that run kernels here."""
    return [b for b in backends.DEVICE_SIDE if backends.missing(b) is None]


def measure(
    groups: Sequence[tuple[Spec, Sequence[Case]]],
    clock: Clock,
    *,
    left: Callable[[], float],
    sample_bytes: int = _SAMPLE_BYTES,
    copy_bytes: int = _COPY_BYTES,
) -> Iterator[Row]:
    """One row per case, while ``left()`` seconds are positive; then rows that say that time ran out."""
    copy: Copy | None = None
    for spec, cases in groups:
        if left() > 0:
            copy = copy or Copy(clock, copy_bytes)
            yield from _group(spec, cases, clock, copy, sample_bytes)
        else:
            yield from (_row(case) | {"left_out": "out of time"} for case in cases)


class Copy:
    """Device-to-device copies, whose bandwidth counts the bytes read and those written."""

    def __init__(self, clock: Clock, nbytes: int) -> None:
        self.nbytes = nbytes
        random = torch.Generator(clock.device).manual_seed(1)
        source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=clock.device, generator=random)
        target = torch.ones_like(source)
        self.call = clock.capture(lambda: target.copy_(source))


def _group(spec: Spec, cases: Sequence[Case], clock: Clock, copy: Copy, sample_bytes: int) -> Iterator[Row]:
    """Rows that share inputs, all their calls and the copy in turns."""
    inputs = [make(spec, seed, clock.device) for seed in range(_sets(spec, clock.cache))]
    calls: dict[tuple[str, str], tuple[Call, int]] = {}
    rows = {case.name: _row(case) for case in cases}
    for case in cases:
        whole: dict[str, torch.Tensor] = {}
        for backend in able():
            columns = rows[case.name]["backends"]
            try:
                calls[case.name, backend] = _prepare(case, backend, inputs, clock, sample_bytes, whole)
                columns[backend] = {}
            except Exception as error:  # one kernel that fails must not cost the others' figures
                columns[backend] = {"error": f"{type(error).__name__}: {error}"}
    timed = {"copy": copy.call, **{key: call for key, (call, _) in calls.items()}}
    seconds: dict[Any, list[float]] = {key: [] for key in timed}
    for _ in range(ROUNDS):
        for key, call in timed.items():
            seconds[key].append(clock.seconds(call))
    rate = 2 * copy.nbytes / statistics.median(seconds["copy"])
    for case in cases:
        row = rows[case.name] | {"copy_gbs": rate / 1e9}
        for backend, column in row["backends"].items():
            if (case.name, backend) in calls:
                count = calls[case.name, backend][1]
                column |= _figures(case, [s / count for s in seconds[case.name, backend]], rate)
        yield row | _fastest(row)


def _prepare(
    case: Case,
    backend: str,
    inputs: Sequence[Inputs],
    clock: Clock,
    sample_bytes: int,
    whole: dict[str, torch.Tensor],
) -> tuple[Call, int]:
    """The captured work of one sample and how many calls it holds, results compared before.

    ``whole``: what another backend made of the first inputs, by row.
    """
    with pykernels.use_backend(backend):
        compare(case, backend, clock.device)
        calls = [case.call(x) for x in inputs]
        result = calls[0]()
    if not agrees(case.op, result, whole.setdefault(case.name, result.clone())):
        raise RuntimeError(f"{backend} and {able()[0]} disagree on whole inputs")
    count = max(1, math.ceil(sample_bytes / (case.nbytes * len(calls))))

    def sample() -> None:
        with pykernels.use_backend(backend):
            for call in calls * count:
                call()

    return clock.capture(sample), count * len(calls)


def compare(case: Case, backend: str, device: torch.device) -> None:
    """Small results on the device are those of the CPU kernels, as ``agrees`` has it; RuntimeError if not."""
    small = case.on(Spec(CHECKED, case.spec.dtype, case.spec.n, case.spec.data))
    on_cpu = make(small.spec, seed=1)
    poisoned = torch.full_like(on_cpu.out, math.nan, device=device)
    there = Inputs(on_cpu.base.to(device), [t.to(device) for t in on_cpu.tuned], poisoned)
    with pykernels.use_backend(backend):
        got = small.call(there)().cpu()
    with pykernels.use_backend("cpu"):
        wanted = small.call(on_cpu)()
    if got.dtype != wanted.dtype or not agrees(case.op, got, wanted):
        differ = int((got != wanted).sum())
        raise RuntimeError(f"{backend} and the CPU kernels disagree in {differ} of {wanted.numel()} elements")


def _sets(spec: Spec, cache: int) -> int:
    """As many sets as push the first out of the second-level cache before it comes again; at least two."""
    return max(2, math.ceil(3 * cache / (spec.tensor_bytes * (spec.n + 1))))


def _row(case: Case) -> Row:
    return {
        "name": case.name, "op": case.op, "spec": case.spec.label, "n": case.spec.n,
        "dtype": str(case.spec.dtype).removeprefix("torch."), "nbytes": case.nbytes, "backends": {},
    }  # fmt: skip


def _figures(case: Case, seconds: Sequence[float], rate: float) -> Row:
    """Milliseconds of a call, 10^9 bytes a second by what it must move, and the share of the copy's."""
    took = statistics.median(seconds)
    return {
        "ms": took * 1e3, "best": min(seconds) * 1e3, "gbs": case.nbytes / took / 1e9,
        "of_copy": case.nbytes / took / rate,
    }  # fmt: skip


def _fastest(row: Row) -> Row:
    """Which backend should be taken, by this row."""
    ms = {backend: c["ms"] for backend, c in row["backends"].items() if "ms" in c}
    return {"fastest": min(ms, key=ms.__getitem__)} if ms else {}
