"""LoRA's linear layers on a device: ours by every backend, the frozen cuBLAS product and rivals, by turns.

A sample is a graph of one call on each of several layers, so that weights come from memory and launches cost
what they cost inside a program; the second-level cache is emptied before. Ratios are medians over pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import pykernels
from pykernels import backends
from pykernels.bench import lora_layers, lora_rivals, turns
from pykernels.bench.cases import Case
from pykernels.bench.gpu_clock import Call, Clock
from pykernels.bench.inputs import Spec
from pykernels.bench.lora_layers import Layer, Options

ROUNDS = 101
LIMIT = 4.0
"""Seconds of a row's rounds."""
BASE = "frozen"
_KINDS = ("step", "adapters", "dora")

Row = dict[str, Any]


def _case(peers: Sequence[str], rows: int, rank: int = 16, **options: Any) -> Case:
    given = {"rank": rank, "rows": rows, **options}
    return Case("lora_linear", Spec(n=1), given, peers=dict.fromkeys(peers, 1.0))


_SERVING = ("peft", "addmm_", "unsloth", "lorafusion", "vllm")
_TRAINING = ("peft", "addmm_", "unsloth", "lorafusion")
CASES = (
    *(_case(_SERVING, rows, rank) for rows in (2048, 8192) for rank in (16, 64)),
    *(_case(_SERVING, rows) for rows in (1, 8, 32)),
    _case(("peft", "vllm"), 32, adapters=32),
    _case(_TRAINING, 8192, step=True),
    _case(("peft", "addmm_", "lorafusion"), 8192, step=True, dropout=0.1),
    _case(("peft", "vllm"), 32, adapters=32, mixed=True),
    *(_case(_SERVING, 512, rank) for rank in (16, 64)),
    _case(("without magnitude", "peft"), 2048, dora=True),
)
"""First what the targets are set for."""
FIRST = 8
"""Those of inference, before merges are measured: kernels of the others take the compiler long."""
_COMPILED = (lora_rivals.COMPILED,)
COMPILED = (
    _case(_COMPILED, 8192, step=True),
    _case(_COMPILED, 8192, step=True, dropout=0.1),
    _case(_COMPILED, 2048),
    _case(_COMPILED, 1),
)
"""Rows once more, against PEFT's layer compiled: last, as the compiler takes its time."""


@dataclass
class Samples:
    """What is timed by turns, and what is known of it before: graph or not, difference from float64."""

    clock: Clock
    sets: int = 1
    calls: dict[str, Call] = field(default_factory=dict)
    about: dict[str, Row] = field(default_factory=dict)

    def add(
        self, name: str, calls: Sequence[Call], about: Row, *, backend: str = "", graph: bool = True
    ) -> None:
        """One more call, on every set. What a graph cannot hold is called as it is, and the row says so."""

        def sample() -> None:
            with pykernels.use_backend(backend) if backend else nullcontext():
                for call in calls:
                    call()

        sample()
        try:
            self.calls[name] = self.clock.capture(sample) if graph else sample
        except RuntimeError:
            graph, self.calls[name] = False, sample
            sample()
        self.about[name] = about | ({} if graph else {"graph": False})

    def attempt(self, name: str, add: Callable[[], None]) -> None:
        """A call that fails must not cost the others' figures."""
        try:
            add()
        except Exception as error:
            self.calls.pop(name, None)
            self.about[name] = {"error": f"{type(error).__name__}: {error}"[:300]}


def able(op: str = "lora_linear") -> list[str]:
    """The backends that have the op on a device, torch's composition among them."""
    return [
        b
        for b in backends.ORDER["cuda"]
        if b != "ref" and b in backends.TABLE[op] and not backends.missing(b)
    ]


def measure(cases: Sequence[Case], clock: Clock, *, left: Callable[[], float]) -> Iterator[Row]:
    """One row per case, while ``left()`` seconds are positive; then rows that say that time ran out."""
    for case in cases:
        row = {"name": case.name, "op": case.op, "kind": _kind(case), "backends": {}, "peers": []}
        row |= {key: case.options[key] for key in ("rows", "rank")}
        yield row | ({"left_out": "out of time"} if left() <= 0 else _measured(case, clock, left))


def _kind(case: Case) -> str:
    special = [kind for kind in _KINDS if kind in case.options]
    words = [*special, *(["dropout"] if "dropout" in case.options else [])]
    return " ".join(words) or ("decode" if case.options["rows"] <= 32 else "forward")


def _measured(case: Case, clock: Clock, left: Callable[[], float]) -> Row:
    torch.compiler.reset()
    options = case.options
    make = partial(lora_layers.make, case.spec.shape, case.spec.dtype, options, device=clock.device)
    layers = [make(seed=0)]
    layers += [make(seed=seed) for seed in range(1, math.ceil(3 * clock.cache / layers[0].nbytes))]
    samples = Samples(clock, len(layers))
    samples.add(BASE, [lora_rivals.rival(lora_rivals.FROZEN, c, options) for c in layers], {})

    def ours(c: Layer) -> Call:
        return partial(lora_layers.ours, c, options)

    for backend in able():
        with pykernels.use_backend(backend):
            samples.attempt(backend, partial(_add, samples, backend, layers, options, ours, backend))
    peers = [lora_rivals.stand_in(name, options) for name in case.peers]
    for name in peers:
        if lora_rivals.able(name) and left() > 0:
            made = partial(lora_rivals.rival, name, options=options)
            samples.attempt(name, partial(_add, samples, name, layers, options, made))
    return figures(samples, peers, limit=min(LIMIT, left()))


def _add(
    samples: Samples,
    name: str,
    layers: Sequence[Layer],
    options: Options,
    made: Callable[[Layer], Call],
    backend: str = "",
) -> None:
    """A call on every layer, its result held against float64 where that can be known."""
    calls = [made(c) for c in layers]
    result, about = calls[0](), Row()
    if backend or lora_rivals.checked(name, options):
        plain = {**options, "dora": False} if name == lora_rivals.WITHOUT else options
        about["difference"] = lora_layers.difference(layers[0], plain, result)
    if options.get("step"):
        about["kept"] = kept(calls[0], layers[0])
    samples.add(name, calls, about, backend=backend, graph=lora_rivals.capturable(name, options))


def kept(call: Call, c: Layer) -> float:
    """Bytes per element of x that wait for the backward pass, beyond the inputs."""
    waiting: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        waiting[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    for tensor in (c.x, c.weight, c.grad, *c.adapters[0][:2]):
        waiting.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(waiting.values()) / c.x.numel()


def figures(samples: Samples, peers: Sequence[str], *, limit: float) -> Row:
    """Everything timed by turns: our backends against the base, and each peer against our fastest backend.

    "over" and its interval: times of the base; "more_us": microseconds beyond it.
    """
    found = turns.by_turns(samples.calls, samples.clock.seconds, limit=limit, rounds=ROUNDS)
    sets = samples.sets
    row: Row = {"base_ms": turns.median(found, BASE) / sets * 1e3, "backends": {}, "peers": []}
    for name, about in samples.about.items():
        if name in peers or name == BASE:
            continue
        row["backends"][name] = column = dict(about)
        if name in samples.calls:
            more = turns.more(found, name, BASE)
            column |= {"ms": turns.median(found, name) / sets * 1e3}
            column |= turns.ratio(found, name, BASE).record("over")
            column["more_us"], column["more_low"], column["more_high"] = (v / sets for v in more[:3])
    ms = {name: c["ms"] for name, c in row["backends"].items() if "ms" in c}
    if ms:
        row["fastest"] = min(ms, key=ms.__getitem__)
    for name in peers:
        peer: Row = {"name": name} | samples.about.get(name, {"missing": "not installed"})
        if name in samples.calls and ms:
            peer |= {"ms": turns.median(found, name) / sets * 1e3}
            peer |= turns.ratio(found, name, row["fastest"]).record()
        row["peers"].append(peer)
    return row
