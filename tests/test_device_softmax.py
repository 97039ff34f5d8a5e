"""What bench/device.sh measures of softmax, without a device: rows, competitors, and what goes wrong."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from pykernels.bench import gpu_cases, gpu_clock, gpu_softmax, gpu_table, inputs
from pykernels.bench.inputs import Spec


def forever() -> float:
    """Time is never short."""
    return 1e9


@pytest.fixture
def host(monkeypatch):
    """The CPU kernels stand in for a device's backend."""
    monkeypatch.setattr(gpu_table, "able", lambda: ["cpu"])
    monkeypatch.setattr(gpu_table, "ROUNDS", 2)
    return gpu_clock.HostClock()


def logits_case(case):
    """The same row of softmax on few elements."""
    return case.on(Spec((4, 200), case.spec.dtype, case.spec.n, case.spec.data))


def test_every_row_of_softmax_is_measured(host, monkeypatch):
    monkeypatch.setattr(gpu_softmax, "ROUNDS", 1)
    monkeypatch.setattr(gpu_softmax, "_MOST_CALLS", 2)
    rows = gpu_cases.softmax()
    names = [case.name for _, cases in rows for case in cases]
    assert len(set(names)) == len(names) == 29
    cases = {logits_case(case).name: logits_case(case) for _, [case] in rows}
    for case in cases.values():
        [row] = gpu_softmax.measure(
            [(case.spec, [case])], host, left=forever, sample_bytes=1, copy_bytes=4096
        )
        assert row["fastest"] == "cpu" and row["length"] == 200, row
        found = {peer["name"]: peer for peer in row["peers"]}
        eager = "copy, scale, torch" if "temperature" in case.options else "torch"
        assert found[eager]["x"] > 0, found
        for name in found.keys() - {eager}:
            assert found[name].get("missing") == "not installed" or found[name]["x"] > 0


def test_the_compiler_is_a_peer_of_long_rows(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    rows = [case for _, [case] in gpu_cases.softmax()]
    long = [case for case in rows if "torch.compile" in gpu_softmax.peers(case)]
    assert {case.spec.shape[1] for case in long} == {131_072, 262_144}
    case = logits_case(long[0])
    x = inputs.make(case.spec)
    gpu_softmax.close(gpu_softmax.peers(long[0])["torch.compile"](case, x)(), case.call(x)())
    with pytest.raises(RuntimeError, match="disagree"):
        gpu_softmax.close(x.base, case.call(x)())
    with pytest.raises(RuntimeError, match="another shape"):
        gpu_softmax.close(x.base[0], case.call(x)())


def test_optional_peers_are_called_with_the_logits(monkeypatch):
    module = types.ModuleType("quack.softmax")
    module.softmax = lambda z: torch.softmax(z, -1)
    monkeypatch.setattr(gpu_softmax.importlib.util, "find_spec", lambda name: name == "quack" or None)
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.softmax", module)
    case = logits_case(gpu_cases.softmax()[0][1][0])
    x = inputs.make(case.spec)
    found = gpu_softmax.peers(case)
    assert found["liger"] is None
    gpu_softmax.close(found["quack"](case, x)(), case.call(x)())


def test_a_peer_of_softmax_that_fails_is_a_finding(host, monkeypatch):
    def fail(case, x):
        raise ZeroDivisionError("no")

    monkeypatch.setattr(gpu_softmax, "peers", lambda case: {"torch": fail})
    case = logits_case(gpu_cases.softmax()[0][1][0])
    [row] = gpu_softmax.measure([(case.spec, [case])], host, left=forever, sample_bytes=1, copy_bytes=4096)
    assert row["peers"] == [{"name": "torch", "error": "ZeroDivisionError: no"}]
    [row] = gpu_softmax.measure([(case.spec, [case])], host, left=lambda: 0.0)
    assert row["left_out"] == "out of time" and row["peers"] == []
