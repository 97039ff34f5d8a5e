"""One and eight adapters merged into every linear layer of a model that lies in a device's memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

import pykernels
from pykernels.bench import gpu_lora, lora_layers, turns
from pykernels.bench.gpu_clock import Clock
from pykernels.bench.gpu_lora import BASE, Row, Samples
from pykernels.bench.gpu_lora_merge import Merge, addmm, copied, merged, ours
from pykernels.bench.llama import LLAMA_8B, Layout
from pykernels.bench.lora_layers import Layer
from pykernels.grouping import grouped

LIMIT = 8.0
"""Seconds of all rounds."""
COUNTS = (1, 8)
_RANK = 16
_TORCH = "addmm_"


def measure(
    clock: Clock, *, left: Callable[[], float], layout: Layout = LLAMA_8B, reserve: int = 4 << 30
) -> Iterator[Row]:
    """A row per number of adapters, from the same rounds; a whole merge is one graph."""
    shapes = [shape for name, shape in layout.shapes() if "_proj" in name]
    numel = sum(map(math.prod, shapes))
    name = f"merge_lora {len(shapes)} layers of {layout.hidden} hidden bf16 r={_RANK}"
    rows: list[Row] = [
        {"name": f"{name} adapters={count}", "op": "merge_lora", "kind": "whole", "rank": _RANK,
         "adapters": count, "parameters": numel, "backends": {}, "peers": []}
        for count in COUNTS
    ]  # fmt: skip
    need, free = 4 * numel + reserve, clock.free()
    why = f"needs {need / 1e9:.0f} GB, the device has {free / 1e9:.0f} GB free" if need > free else ""
    why = why or ("out of time" if left() <= 0 else "")
    if why:
        yield from (row | {"left_out": why} for row in rows)
        return
    samples = _samples(shapes, clock)
    found = turns.by_turns(samples.calls, clock.seconds, limit=min(LIMIT, max(1.0, left())))
    yield from (row | _columns(samples, found, row["adapters"]) for row in rows)


def _samples(shapes: Sequence[tuple[int, ...]], clock: Clock) -> Samples:
    """All calls by who makes them and how many adapters there are."""
    options = {"rows": 1, "rank": _RANK, "adapters": max(COUNTS)}
    layers = [
        lora_layers.make((n, k), torch.bfloat16, options, device=clock.device, seed=i)
        for i, (n, k) in enumerate(shapes)
    ]
    outs = [torch.empty_like(c.weight) for c in layers]
    samples = Samples(clock)

    def add(name: str, call: Merge, model: Sequence[Layer], backend: str = "") -> None:
        """In a group, which nothing but our backends knows of; some layers are held against float64."""

        def run() -> None:
            with grouped():
                for c, out in zip(model, outs, strict=True):
                    call(c, out)

        for out in outs:
            out.fill_(float("nan"))
        run()
        looked = list(zip(outs, model, strict=True))[:: max(1, len(outs) // 4)]
        about = {} if name == BASE else {"difference": max(merged(*pair)["difference"] for pair in looked)}
        samples.add(name, [run], about, backend=backend)

    add(BASE, copied, layers)
    for count in COUNTS:
        model = [c._replace(adapters=c.adapters[:count]) for c in layers]
        for backend in gpu_lora.able("merge_lora"):
            with pykernels.use_backend(backend):
                name = f"{backend} {count}"
                samples.attempt(name, partial(add, name, ours, model, backend))
        samples.attempt(f"{_TORCH} {count}", partial(add, f"{_TORCH} {count}", addmm, model))
    return samples


def _columns(samples: Samples, found: turns.Rounds, count: int) -> Row:
    """ "over": times of a copy of all weights; "over_one": times of the same backend with one adapter."""
    row: Row = {"base_ms": turns.median(found, BASE) * 1e3, "backends": {}, "peers": []}
    for name in samples.about:
        who, _, of = name.rpartition(" ")
        if of != str(count):
            continue
        column = dict(samples.about[name])
        if name in samples.calls:
            column |= {"ms": turns.median(found, name) * 1e3} | turns.ratio(found, name, BASE).record("over")
            if count > 1 and f"{who} 1" in samples.calls:
                one = turns.ratio(found, name, f"{who} 1")
                column |= {"over_one": one.value, "one_low": one.low, "one_high": one.high}
        row["backends"][who] = column
    peer = {"name": _TORCH} | row["backends"].pop(_TORCH)
    ms = {who: c["ms"] for who, c in row["backends"].items() if "ms" in c}
    if ms:
        row["fastest"] = fastest = min(ms, key=ms.__getitem__)
        if "ms" in peer:
            peer |= turns.ratio(found, f"{_TORCH} {count}", f"{fastest} {count}").record()
    return row | {"peers": [peer]}
