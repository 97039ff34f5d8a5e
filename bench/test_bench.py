"""``pytest bench``: every timed case under pytest-benchmark. ``--benchmark-json=FILE`` saves the figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pykernels.bench.cases import CASES, Case
from pykernels.bench.inputs import Inputs, Spec, make
from pykernels.bench.lora_calls import values
from pykernels.bench.roofline import Setting, rounds, runs_here

TIMED = [case for case in CASES if case.kind in ("time", "call") and runs_here(case)]
_cache: dict[Spec, Inputs] = {}


@pytest.fixture
def inputs(request: pytest.FixtureRequest) -> Iterator[Inputs]:
    """The inputs of the case; only the last spec is kept, as a set takes up to 2 GB."""
    spec = request.node.callspec.params["case"].spec
    if spec not in _cache:
        _cache.clear()
        _cache[spec] = make(spec)
    yield _cache[spec]


@pytest.mark.parametrize("case", sorted(TIMED, key=lambda c: repr(c.spec)), ids=lambda c: c.name)
def test_case(case: Case, inputs: Inputs, benchmark: Any) -> None:
    """Time the case; the result must have been written and be finite."""
    call = case.call(inputs)
    benchmark.extra_info.update(case=case.name, least_bytes=case.nbytes)
    with Setting(case, lambda i: call()).setting():
        iterations = 50 if case.kind == "call" else 1
        times = {"rounds": rounds([case]), "iterations": iterations, "warmup_rounds": 1}
        result = benchmark.pedantic(call, **times)
    assert bool(torch.isfinite(values(result)).all())
