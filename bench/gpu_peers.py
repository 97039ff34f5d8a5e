"""Competitors on the same device and inputs: eager torch, torch.compile, mergekit's functions and PEFT's.

They are called as their users call them, so the times of both sides include the host's work; ours is the
public op on the backend that it chooses. Results are compared before anything is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pykernels import backends
from pykernels.bench import peers
from pykernels.bench.cases import Case
from pykernels.bench.gpu_clock import Call, Clock
from pykernels.bench.inputs import Inputs, make
from pykernels.bench.torch_peers import naive

ROUNDS = 5
COMPILED = "torch.compile"

Row = dict[str, Any]


def measure(cases: Sequence[Case], clock: Clock, *, left: Callable[[], float]) -> Iterator[Row]:
    """One row per case: our time, and each peer's with its ratio, its absence or its failure."""
    for case in cases:
        row: Row = {"name": case.name, "op": case.op, "spec": case.spec.label, "peers": []}
        if left() <= 0:
            yield row | {"left_out": "out of time"}
            continue
        row["backend"] = backends.chosen(_main_row(case), torch.empty(0, device=clock.device))
        x = make(case.spec, device=clock.device)
        row["ms"] = statistics.median(_times(case.call(x), clock)) * 1e3
        for name in case.peers:
            row["peers"].append({"name": name} | (_against(name, case, x, clock) if left() > 0 else _LATE))
        yield row


_LATE = {"left_out": "out of time"}


def _main_row(case: Case) -> str:
    return "ties_fused" if case.op == "ties_merge" else case.op


def _against(name: str, case: Case, x: Inputs, clock: Clock) -> Row:
    peer = _peer(name, case)
    if peer is None:
        return {"missing": "not installed"}
    try:
        difference = peers.compare(peer, case, clock.device)
        theirs, ours = peer.theirs(case, x), peer.ours(case, x)
        theirs(), ours()
        seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
        for _ in range(ROUNDS):
            seconds["theirs"].append(clock.seconds(theirs))
            seconds["ours"].append(clock.seconds(ours))
    except Exception as error:  # a competitor that cannot run here is a finding, not the end of the run
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    took, own = (statistics.median(seconds[side]) for side in ("theirs", "ours"))
    return {"ms": took * 1e3, "ours_ms": own * 1e3, "x": took / own, "difference": difference}


def _peer(name: str, case: Case) -> peers.Peer | None:
    """The competitor of that name, or None where it is not installed."""
    if name == COMPILED:
        return peers.Peer(COMPILED, 1.0, _compiled, lambda case, x: case.call(x))
    return next(iter(peers.of(Case(case.op, case.spec, case.options, peers={name: 1.0}))), None)


def _compiled(case: Case, x: Inputs) -> Callable[[], torch.Tensor]:
    """The plain expressions, fused by the compiler; no graph may be kept from other shapes."""
    torch.compiler.reset()
    compiled: Callable[[], torch.Tensor] = torch.compile(naive(case, x), dynamic=False)
    return compiled


def _times(call: Call, clock: Clock) -> list[float]:
    call()
    return [clock.seconds(call) for _ in range(ROUNDS)]
