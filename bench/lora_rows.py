"""LoRA's linear layers in the table of cases: our call and its rivals by turns, on the CPU.

Every result is held against float64 before it is timed. In bfloat16 torch's product is the one to beat,
adapter or not; where a difference of a few percent is the matter, 50 pairs decide (``turns``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch.nn.functional import linear

from pykernels.bench import lora_layers, lora_rivals, turns
from pykernels.bench.inputs import Inputs, Spec
from pykernels.bench.lora_layers import Layer, Options, Result
from pykernels.bench.lora_rivals import Call

LIMIT = 20.0
"""Seconds of a row's rounds; no round begins later."""
_PROBES, _LONGEST = (2, 4), 25.0  # rows that tell how long a rival takes; seconds beyond which it is left out
_ALONE = 5  # rounds where no rival runs
_SPENT = 1.5  # seconds after which a call whose ratio is clear has run often enough

Row = dict[str, Any]


@lru_cache(maxsize=1)
def _layer(shape: tuple[int, int], dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> Layer:
    return lora_layers.make(shape, dtype, dict(options))


def layer_of(x: Inputs, options: Options) -> Layer:
    """The layer of a row, as large as the row's inputs."""
    n, k = x.base.shape
    return _layer((n, k), x.base.dtype, tuple(sorted(options.items())))


def _ours(x: Inputs, out: torch.Tensor | None, options: Options) -> Any:
    """The result; of a row "step" the gradient of x."""
    found = lora_layers.ours(layer_of(x, options), options)
    return found if isinstance(found, torch.Tensor) else found[0]


def measure(c: Layer, options: Options, wanted: Mapping[str, float], limit: float = LIMIT) -> Row:
    """ "value" in milliseconds and "peers", each with the median of its ratios and their interval."""
    torch.compiler.reset()
    calls: dict[str, Call] = {"": partial(lora_layers.ours, c, options)}
    late = {name: left_out(name, c, options) for name in wanted if lora_rivals.able(name)}
    calls |= {name: lora_rivals.rival(name, c, options) for name, why in late.items() if not why}
    off = {name: _checked(name, c, options, call()) for name, call in calls.items()}
    rounds = turns.ROUNDS if len(calls) > 1 else _ALONE
    found = turns.by_turns(
        calls,
        turns.wall,
        limit=limit,
        rounds=rounds,
        enough=lambda name, so_far: _enough(name, so_far, wanted),
    )
    row: Row = {"value": turns.median(found, "") * 1e3, "difference": off[""], "peers": []}
    for name in late:
        least = wanted[name]
        peer: Row = {"name": name, "least": least}
        if late[name]:
            row["peers"].append(peer | {"left_out": late[name]})
            continue
        x = turns.ratio(found, name, "")
        peer |= {"ms": turns.median(found, name) * 1e3, **x.record(), "met": x.within(least, least=True)}
        row["peers"].append(peer | {"difference": off[name]})
    return row


def left_out(name: str, c: Layer, options: Options) -> str:
    """Why a rival is not timed, or nothing: a few rows of x tell what a call on all of them would take.

    torch's bfloat16 product with an untransposed weight, which gradients need, takes a minute for 128 rows on
    a machine with AVX2.
    """
    rows, (few, more) = options["rows"], _PROBES
    if rows <= more or "adapters" in options:
        return ""
    seconds = []
    for count in (few, few, more):  # the first one makes what torch keeps for the next
        part = c._replace(x=c.x[:count], grad=c.grad[:count], index=c.index[:count])
        seconds.append(turns.wall(lora_rivals.rival(lora_rivals.uncompiled(name), part, options)))
    expected = seconds[1] + (rows - few) * max(0.0, seconds[2] - seconds[1]) / (more - few)
    return f"about {expected:.0f} s a call" if expected > _LONGEST else ""


def _checked(name: str, c: Layer, options: Options, result: Result) -> float | None:
    """The result's difference from float64, where it can be known."""
    if not lora_rivals.checked(name, options) and name:
        return None
    plain = {**options, "dora": False} if name == lora_rivals.WITHOUT else options
    try:
        return lora_layers.difference(c, plain, result, adapted=lora_rivals.adapted(name))
    except RuntimeError as error:
        raise RuntimeError(f"{name or 'pykernels'} on {dict(options)}: {error}") from error


def _enough(name: str, rounds: turns.Rounds, wanted: Mapping[str, float]) -> bool:
    """A rival whose ratio is far from its bound needs no 50 rounds where they take long."""
    if not name:
        return False
    x = turns.ratio(rounds, name, "")
    clear = abs(x.value / wanted[name] - 1) > turns.CLEAR and x.within(wanted[name], least=True) is not None
    return clear and x.pairs * turns.median(rounds, name) > _SPENT


def measure_over(c: Layer, options: Options, wanted: Mapping[str, float]) -> Row:
    """ "value": microseconds that a call takes beyond ``F.linear``, a median of paired means of 20 calls."""
    calls: dict[str, Call] = {
        "": partial(lora_layers.ours, c, options),
        lora_rivals.FROZEN: partial(linear, c.x, c.weight),
    }
    calls |= {name: lora_rivals.rival(name, c, options) for name in wanted if lora_rivals.able(name)}
    for call in calls.values():
        for _ in range(50):
            call()
    found = turns.by_turns(calls, _mean, limit=LIMIT, rounds=4 * turns.ROUNDS)
    over = {name: turns.more(found, name, lora_rivals.FROZEN) for name in calls}
    row: Row = over[""].record("value") | {"peers": []}
    for name, least in wanted.items():
        if name in over:
            x = over[name].value / over[""].value
            row["peers"].append(
                {"name": name, "ms": over[name].value / 1e3, "x": x, "least": least, "met": x >= least}
            )
    return row


def _mean(call: Callable[[], object], count: int = 20) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


CALLS: dict[str, Callable[[Inputs, torch.Tensor | None, Options], Any]] = {"lora_linear": _ours}
TRAFFIC: dict[str, Callable[[Spec], int]] = {"lora_linear": lambda spec: spec.tensor_bytes}
