"""Competitors on the same inputs: torch, mergekit 0.1.5 and PEFT, compared before they are timed.

naive: the arithmetic as it is usually written, float32 temporaries and a stacked task vector. tuned: the same
with buffers that are reused and updated in place, and kthvalue for the threshold. mergekit and PEFT run their
own functions where the `bench` extra installed them. DARE draws its own masks everywhere, so it is compared
without a drop, and by the share of untouched elements with one.
"""

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import pykernels
from pykernels.bench.cases import SEED, Case, weights
from pykernels.bench.inputs import LOGITS, LORA, Inputs, Spec, make
from pykernels.bench.lora_calls import adapters, in_peft, values
from pykernels.bench.softmax_calls import in_torch
from pykernels.bench.torch_peers import naive, tuned

CHECK = Spec(shape=(256, 1024), dtype=torch.float32)
ROUNDS = 2

Call = Callable[[], Any]


@dataclass(frozen=True)
class Peer:
    """A competitor: what it computes on some inputs, and our call that does the same."""

    name: str
    least: float
    theirs: Callable[[Case, Inputs], Call]
    ours: Callable[[Case, Inputs], Call]


def of(case: Case) -> list[Peer]:
    """The peers of a row that can run here."""
    return [
        Peer(name, least, *_PEERS[name])
        for name, least in case.peers.items()
        if name not in _NEEDS or _has(_NEEDS[name])
    ]


def missing() -> list[str]:
    """Which optional peers are not installed."""
    return [name for name, module in _NEEDS.items() if not _has(module)]


def measure(peer: Peer, case: Case, inputs: Inputs) -> dict[str, Any]:
    """Compare the results, then time both in turns: milliseconds and how many times longer the peer takes."""
    difference = compare(peer, case)
    theirs, ours = peer.theirs(case, inputs), peer.ours(case, inputs)
    ours()
    spent: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(ROUNDS):
        for name, call in (("theirs", theirs), ("ours", ours), ("ours", ours), ("ours", ours)):
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    took = statistics.median(spent["theirs"])
    ratio = took / statistics.median(spent["ours"])
    return {
        "name": peer.name, "ms": took * 1e3, "x": ratio, "least": peer.least, "met": ratio >= peer.least,
        "difference": difference,
    }  # fmt: skip


def compare(peer: Peer, case: Case, device: str | torch.device = "cpu") -> float:
    """Largest difference on small float32 inputs, in units of a delta's rms, or of the largest result of
    softmax; raises where results disagree.

    Where elements tie at the threshold, their choice is theirs: one in ten thousand elements may differ.
    """
    logits = case.spec.data == LOGITS
    spec = (
        CHECK if case.spec.data not in (LOGITS, LORA) else replace(CHECK, n=case.spec.n, data=case.spec.data)
    )
    x = make(spec, seed=1, device=device)
    random = case.op == "dare_merge"
    exact = _with(case, density=1.0) if random else case
    theirs = values(peer.theirs(exact, x)()).clone()  # some write into the buffer that ours writes into
    ours = values(peer.ours(exact, x)())
    delta = (theirs - ours).abs() / (float(ours[ours.isfinite()].abs().max()) if logits else 0.002)
    delta.masked_fill_(theirs == ours, 0)  # -inf among them
    worst = float(delta.flatten().sort().values[int(delta.numel() * (1 - 1e-4)) - 1])
    if worst > 1e-3:
        raise RuntimeError(f"{peer.name} and pykernels disagree on {case.name}: {worst:g} units")
    if random:
        untouched = [
            float((call(case, x)() == _base(peer, x)).float().mean()) for call in (peer.theirs, peer.ours)
        ]
        if abs(untouched[0] - untouched[1]) > 0.01:
            raise RuntimeError(
                f"{peer.name} drops {untouched[0]:.3f} of all elements and pykernels {untouched[1]:.3f}"
            )
    return worst


def _with(case: Case, **options: Any) -> Case:
    return Case(case.op, case.spec, {**case.options, **options})


def _base(peer: Peer, x: Inputs) -> torch.Tensor:
    return torch.zeros_like(x.base) if peer.name == "peft" else x.base


def _has(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _ours(case: Case, x: Inputs) -> Call:
    return case.call(x)


def _mergekit(case: Case, x: Inputs) -> Call:
    """mergekit 0.1.5, ``merge_tensors`` with its defaults; DARE rescales by the L1 norm there."""
    api = importlib.import_module("mergekit.merge_methods.api")
    o, w = case.options, weights(x)
    method = case.op.removesuffix("_merge")
    if method == "dare":
        method = "dare_ties" if o.get("consensus") else "dare_linear"
    parameters: dict[str, Any] = {"weight": [1.0, *w] if method == "linear" else w}
    if "density" in o:
        parameters["density"] = o["density"]
    base = None if method == "linear" else 0
    return lambda: api.merge_tensors(x.all, method, parameters=parameters, base_index=base)


def _deltas(x: Inputs) -> list[torch.Tensor]:
    return [t - x.base for t in x.tuned]


def _peft(case: Case, x: Inputs) -> Call:
    """PEFT's ``merge_utils`` on task vectors, which is what it takes; its layers for adapters."""
    if case.spec.data == LORA:
        return in_peft(case.op, x.base, adapters(x, case.options))
    utils = importlib.import_module("peft.utils.merge_utils")
    deltas, density = _deltas(x), case.options["density"]
    w = torch.tensor(weights(x), device=x.base.device)
    name = (
        "ties" if case.op == "ties_merge" else "dare_ties" if case.options.get("consensus") else "dare_linear"
    )

    def run() -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns at density 1
            merged: torch.Tensor = getattr(utils, name)(deltas, w, density)
            return merged

    return run


def _ours_as_peft(case: Case, x: Inputs) -> Call:
    if case.spec.data == LORA:
        return case.call(x)
    deltas, w, o = _deltas(x), weights(x), case.options
    if case.op == "ties_merge":
        return lambda: pykernels.ties_merge(
            None, deltas, density=o["density"], weight=w, elect="plain", normalize="count", out=x.out
        )
    extra = {"elect": "plain", "normalize": "count"} if o.get("consensus") else {}
    return lambda: pykernels.dare_merge(
        None,
        deltas,
        density=o["density"],
        seed=SEED,
        weight=w,
        consensus=o.get("consensus"),
        out=x.out,
        **extra,
    )


def _torch(case: Case, x: Inputs) -> Call:
    return in_torch(case.op, x, case.options)


_Pair = tuple[Callable[[Case, Inputs], Call], Callable[[Case, Inputs], Call]]
_PEERS: dict[str, _Pair] = {
    "naive torch": (naive, _ours),
    "tuned torch": (tuned, _ours),
    "mergekit": (_mergekit, _ours),
    "torch": (_torch, _ours),
    "peft": (_peft, _ours_as_peft),
}
_NEEDS = {"mergekit": "mergekit.merge_methods.api", "peft": "peft.utils.merge_utils"}


def installed(names: Sequence[str] = tuple(_NEEDS)) -> dict[str, str]:
    """Versions of the optional peers, for the record of a run."""
    from importlib.metadata import version

    return {name: version(name) for name in names if _has(_NEEDS[name])}
