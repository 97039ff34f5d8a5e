"""LoRA's benchmarks: medians of pairs, layers and their schemes, and the CPU's rows, on small layers."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from pykernels.bench import cases, lora_layers, lora_rivals, lora_rows, lora_schemes, report, roofline, turns
from pykernels.bench.turns import Middle
from tests.bench_layers import SHAPE, compile_without_inductor, small

DTYPES = [torch.float32, torch.bfloat16]
SCHEMES = {"vllm", "addmm_", "unsloth", "lorafusion", "peft scheme"}


def spread(values: int, at: float = 1.0, width: float = 0.0) -> Middle:
    """A median at ``at`` of so many values, with an interval of that half width."""
    return Middle(at, at - width, at + width, values)


@pytest.mark.parametrize(
    ("n", "skip"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (20, 5), (50, 17), (101, 40)]
)
def test_the_interval_of_a_median_is_the_binomials(n, skip):
    """``skip`` values lie beyond each end, by tables of the sign test (Dixon and Massey, 1969, A-25)."""
    found = turns.middle([float(i) for i in range(n)][::-1])
    assert found == Middle((n - 1) / 2, skip, n - 1 - skip, n)


@pytest.mark.parametrize(
    ("found", "at_least", "at_most"),
    [
        (spread(50, 1.0, 0.01), None, None),
        (spread(50, 1.02, 0.01), True, False),
        (spread(50, 0.98, 0.01), False, True),
        (spread(49, 1.02, 0.01), None, None),
        (spread(49, 1.2, 0.01), True, False),
        (spread(49, 1.2, 0.3), None, None),
        (spread(1, 0.5), False, True),
    ],
)
def test_small_differences_need_pairs_and_their_whole_interval(found, at_least, at_most):
    assert found.within(1.0, least=True) is at_least
    assert found.within(1.0, least=False) is at_most


def test_turns_end_with_time_or_when_enough_is_known():
    ran = []
    calls = {name: partial(ran.append, name) for name in ("a", "b", "c")}
    seconds = {"a": 2.0, "b": 1.0, "c": 4.0}

    def clock(call):
        call()
        return seconds[ran[-1]]

    found = turns.by_turns(calls, clock, limit=60, rounds=4, enough=lambda name, _: name == "c")
    assert ran == ["a", "b", "c", "b", "a", "a", "b", "b", "a"]
    assert turns.ratio(found, "a", "b") == Middle(2.0, 2.0, 2.0, 4)
    assert turns.ratio(found, "c", "b").pairs == 1 and turns.more(found, "a", "b").value == 1e6
    assert len(turns.by_turns(calls, clock, limit=0.0)) == 1
    assert len(turns.by_turns(calls, clock, limit=60, enough=lambda name, _: name != "a")) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
def test_schemes_and_frozen_products_give_what_float64_gives(rows, step, dtype):
    options = {"rows": rows, "rank": 4, "step": step}
    c = lora_layers.make(SHAPE, dtype, options)
    names = SCHEMES - ({"vllm"} if step else set())
    for name in (*names, lora_rivals.FROZEN, lora_rivals.OWN):
        result = lora_rivals.rival(name, c, options)()
        lora_layers.difference(c, options, result, adapted=lora_rivals.adapted(name))
    lora_layers.difference(c, options, lora_layers.ours(c, options))


def test_a_wrong_result_is_caught():
    options = {"rows": 5, "rank": 4, "step": True}
    c = lora_layers.make(SHAPE, torch.float32, options)
    good = lora_layers.ours(c, options)
    for i in range(3):
        wrong = [g * (1.0 + 1e-4 * (i == j)) for j, g in enumerate(good)]
        with pytest.raises(RuntimeError, match="units from float64"):
            lora_layers.difference(c, options, wrong)


def test_lorafusions_dropout_has_the_gradients_of_what_it_kept():
    c = lora_layers.make((5, 6), torch.float64, {"rows": 4, "rank": 2})
    leaves = [t.requires_grad_() for t in (c.x, *c.adapters[0][:2])]

    def call(x, a, b):
        torch.manual_seed(3)
        return lora_schemes.lorafusion(x, c.weight, a, b, 1.5, 0.5)

    dense = c.x @ c.weight.T + 1.5 * c.x @ c.adapters[0].A.T @ c.adapters[0].B.T
    assert not torch.allclose(call(*leaves), dense)
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "mixed ranks"])
def test_rows_with_adapters_of_their_own(mixed):
    options = {"rows": 7, "rank": 4, "adapters": 5, "mixed": mixed}
    c = lora_layers.make(SHAPE, torch.float32, options)
    assert {a.A.shape[0] for a in c.adapters} == ({2, 4, 8} if mixed else {4})
    for name in filter(lora_rivals.able, ("vllm", "peft")):
        lora_layers.difference(c, options, lora_rivals.rival(name, c, options)())


@pytest.mark.parametrize(
    "case", [c for c in cases.CASES if c.kind in ("turns", "over")], ids=lambda c: c.name
)
def test_every_row_of_the_cpus_table_is_measured(case, monkeypatch):
    monkeypatch.setattr(lora_rows, "_PROBES", (1, 2))
    monkeypatch.setattr(lora_rows, "LIMIT", 0.02)
    compile_without_inductor(monkeypatch)
    reduced = small(case)
    c = lora_layers.make(SHAPE, case.spec.dtype, reduced.options)
    measure = lora_rows.measure_over if case.kind == "over" else partial(lora_rows.measure, limit=0.0)
    row = measure(c, reduced.options, case.peers)
    assert {peer["name"] for peer in row["peers"]} == set(filter(lora_rivals.able, case.peers))
    assert all(peer["ms"] > 0 for peer in row["peers"]) or case.kind == "over"
    json.dumps(row)


def test_a_rival_that_would_take_a_minute_is_left_out(monkeypatch):
    monkeypatch.setattr(turns, "wall", lambda call: (call(), 0.1)[1])
    options = {"rows": 128, "rank": 4}
    c = lora_layers.make(SHAPE, torch.float32, options)
    assert lora_rows.left_out("addmm_", c, options) == ""
    seconds = iter([9.0, 1.0, 2.0])
    monkeypatch.setattr(turns, "wall", lambda call: next(seconds))
    assert lora_rows.left_out("addmm_", c, options) == "about 64 s a call"


def test_a_row_of_the_cpus_table_reads_well():
    peers = [
        {
            "name": "own frozen",
            "x": 0.98,
            "low": 0.975,
            "high": 0.985,
            "pairs": 50,
            "least": 0.97,
            "met": True,
        },
        {"name": "peft", "x": 0.99, "low": 0.9, "high": 1.1, "pairs": 9, "least": 1.0, "met": None},
        {"name": "addmm_", "x": 4.0, "low": 3.0, "high": 5.0, "pairs": 5, "least": 1.0, "met": True},
        {"name": "unsloth", "left_out": "about 64 s a call"},
    ]
    row = {"name": "a", "kind": "turns", "value": 1.5, "unit": "ms", "target": {}, "peers": peers}
    assert report.cells(row)[-1] == (
        "own frozen 0.98x (0.975 to 0.985; >= 0.97: yes), peft 0.99x (0.9 to 1.1; >= 1: not resolved), "
        "addmm_ 4x, unsloth: about 64 s a call"
    )


@pytest.mark.parametrize(
    ("low", "high", "said"), [(5.0, 29.0, "yes"), (31.0, 40.0, "NO"), (-9.0, 40.0, "not resolved")]
)
def test_what_a_call_takes_beyond_torchs_is_judged_by_its_interval(low, high, said, monkeypatch):
    case = small(next(c for c in cases.CASES if c.kind == "over"))
    found = {"value": (low + high) / 2, "low": low, "high": high, "pairs": 200, "peers": []}
    monkeypatch.setattr(lora_rows, "measure_over", lambda *arguments: dict(found))
    monkeypatch.setattr(roofline, "CASES", (case,))
    [row] = roofline.run(lambda case: True)
    assert row["unit"] == "us" and report.cells(row)[-2] == f"<= 30: {said}"
