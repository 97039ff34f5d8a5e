"""Softmax on a device: every row against the copy, as in ``gpu_table``, and against competitors.

Those are torch, its compiler, Liger and QuACK, on the same inputs, all as replayed graphs in one run.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import pykernels
from pykernels.bench import gpu_table
from pykernels.bench.gpu_cases import Case
from pykernels.bench.gpu_clock import Call, Clock
from pykernels.bench.inputs import Inputs, Spec, make
from pykernels.bench.softmax_calls import in_torch, logits

ROUNDS = 7
_MOST_CALLS, _BYTES = 32, 1 << 28
LONG = 1 << 17
"""Row length from which on the compiler is a peer: it takes seconds for each."""

Row = dict[str, Any]
Made = Callable[[Case, Inputs], Call]


def measure(
    groups: Sequence[tuple[Spec, Sequence[Case]]], clock: Clock, *, left: Callable[[], float], **sizes: int
) -> Iterator[Row]:
    """One row per case, while ``left()`` seconds are positive. ``sizes``: as for ``gpu_table.measure``."""
    for group in groups:
        cases = {case.name: case for case in group[1]}
        for row in gpu_table.measure([group], clock, left=left, **sizes):
            case = cases[row["name"]]
            row |= {"length": case.spec.shape[1], "peers": []}
            if "fastest" in row:
                row["peers"] = list(_against(case, row["fastest"], clock, left))
            yield row


def _against(case: Case, backend: str, clock: Clock, left: Callable[[], float]) -> Iterator[Row]:
    """Our faster backend and each peer in turns."""
    x = make(case.spec, device=clock.device)
    with pykernels.use_backend(backend):
        result = case.call(x)().clone()
        ours = clock.capture(_often(case, case.call(x)))
    for name, peer in peers(case).items():
        if left() <= 0:
            yield {"name": name, "left_out": "out of time"}
        elif peer is None:
            yield {"name": name, "missing": "not installed"}
        else:
            try:
                theirs = peer(case, x)
                close(theirs(), result)
                yield {"name": name} | _turns(ours, clock.capture(_often(case, theirs)), clock)
            except (
                Exception
            ) as error:  # a competitor that cannot run here is a finding, not the end of the run
                yield {"name": name, "error": f"{type(error).__name__}: {error}"[:300]}


def _often(case: Case, call: Call) -> Call:
    """So many calls that their launch as a graph counts for little."""
    count = max(1, min(_MOST_CALLS, _BYTES // case.nbytes))

    def calls() -> None:
        for _ in range(count):
            call()

    return calls


def _turns(ours: Call, theirs: Call, clock: Clock) -> Row:
    """Milliseconds of either's calls, and how many times longer theirs take."""
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(ROUNDS):
        seconds["theirs"].append(clock.seconds(theirs))
        seconds["ours"].append(clock.seconds(ours))
    took, own = (statistics.median(seconds[side]) for side in ("theirs", "ours"))
    return {"ms": took * 1e3, "ours_ms": own * 1e3, "x": took / own}


def close(theirs: object, ours: torch.Tensor) -> None:
    """RuntimeError where a peer computes something else: floats may differ by what long float32 sums cost."""
    if not isinstance(theirs, torch.Tensor) or theirs.shape != ours.shape:
        raise RuntimeError("the peer's result has another shape")
    room = max(1e-3, 2 * torch.finfo(ours.dtype).eps)
    size = float(ours.double().abs().max())
    if not torch.allclose(theirs.double(), ours.double(), rtol=room, atol=1e-4 * size):
        raise RuntimeError("the peer and pykernels disagree")


def peers(case: Case) -> dict[str, Made | None]:
    """Competitors of a row by name, None where they are not installed."""
    if "temperature" in case.options:
        return {"copy, scale, torch": _steps}
    found: dict[str, Made | None] = {"torch": lambda case, x: in_torch(case.op, x, case.options)}
    if case.op == "softmax":
        found["liger"] = _installed("liger_kernel", "ops.softmax", "_softmax_forward", first=True)
        found["quack"] = _installed("quack", "softmax", "softmax")
        if case.spec.shape[1] >= LONG:
            found["torch.compile"] = _compiled
    return found


def _steps(case: Case, x: Inputs) -> Call:
    """What serving stacks do who must keep the logits: three kernels."""
    return lambda: torch.softmax(logits(x, case.options).clone().div_(case.options["temperature"]), -1)


def _compiled(case: Case, x: Inputs) -> Call:
    torch.compiler.reset()
    fused = torch.compile(lambda z: torch.softmax(z, -1), dynamic=False, mode="max-autotune-no-cudagraphs")
    return lambda: fused(logits(x, case.options))


def _installed(package: str, module: str, name: str, *, first: bool = False) -> Made | None:
    """A function of an optional package, of one tensor; ``first``: of several results."""
    if importlib.util.find_spec(package) is None:
        return None

    def made(case: Case, x: Inputs) -> Call:
        function = getattr(importlib.import_module(f"{package}.{module}"), name)
        z = logits(x, case.options)
        return lambda: function(z)[0] if first else function(z)

    return made
