"""LoRA's benchmarks without a device: schemes compute what they should, rows run, targets judge."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import pykernels
from pykernels import backends
from pykernels.bench import (
    cases,
    gpu,
    gpu_cases,
    gpu_lora,
    gpu_lora_merge,
    gpu_lora_whole,
    gpu_report,
    gpu_softmax,
    gpu_table,
    gpu_targets,
    lora_layers,
    lora_rivals,
    lora_rows,
    lora_schemes,
    report,
    roofline,
    turns,
)
from pykernels.bench.gpu_clock import HostClock
from pykernels.bench.inputs import LOGITS, Spec
from pykernels.bench.llama import Layout
from pykernels.bench.turns import Middle

SHAPE = (40, 48)
DTYPES = [torch.float32, torch.bfloat16]
SCHEMES = {"vllm", "addmm_", "unsloth", "lorafusion", "peft scheme"}


def forever() -> float:
    """Time is never short."""
    return 1e9


def small(case):
    """The same row on a small layer and few rows of x."""
    options = {**case.options, "rows": min(case.options["rows"], 33)}
    options |= {"rows": 6, "adapters": 6} if "adapters" in options else {}
    return replace(case, spec=Spec(SHAPE, case.spec.dtype, 1), options=options)


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
    assert ran == ["a", "b", "c", "a", "b", "a", "b", "a", "b"]
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


def compile_without_inductor(monkeypatch):
    """The compiler's front alone: what it traces, the tests see; code takes ten seconds a row."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


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


def test_the_table_takes_such_rows(monkeypatch):
    monkeypatch.setattr(lora_rows, "LIMIT", 0.01)
    case = small(next(c for c in cases.CASES if c.kind == "over"))
    monkeypatch.setattr(roofline, "CASES", (case,))
    [row] = roofline.run(lambda case: True)
    assert row["unit"] == "us" and row["met"] == (row["value"] <= 30)


@pytest.fixture
def host(monkeypatch):
    """Few rounds, and the compiler's front alone."""
    monkeypatch.setattr(gpu_lora, "ROUNDS", 2)
    monkeypatch.setattr(turns, "ROUNDS", 2)
    compile_without_inductor(monkeypatch)
    return HostClock()


def test_every_layer_of_the_devices_table_is_measured_by_each_backend(host):
    """By the kernels for devices, emulated and interpreted, where there are any."""
    wanted = [*gpu_lora.CASES, *gpu_lora.COMPILED]
    rows = list(gpu_lora.measure([small(c) for c in wanted], host, left=forever))
    assert len({c.name for c in gpu_lora.CASES}) == len(gpu_lora.CASES)
    for case, row in zip(wanted, rows, strict=True):
        assert set(row["backends"]) == set(gpu_lora.able()) and row["fastest"] in row["backends"]
        for column in row["backends"].values():
            assert column["difference"] < 0.1 and column["ms"] > 0 and column["pairs"] == 2, column
        names = [lora_rivals.stand_in(name, case.options) for name in case.peers]
        assert [peer["name"] for peer in row["peers"]] == names
        for peer in row["peers"]:
            assert peer.get("missing") == "not installed" or peer["x"] > 0, peer
            assert peer.get("graph", True) == (peer["name"] != "peft" or row["kind"] != "adapters"), peer
        assert gpu.line(row).startswith(row["name"])
    kinds = {row["kind"] for row in rows}
    assert kinds == {"forward", "decode", "step", "step dropout", "adapters", "dora"}
    dropped = next(row for row in rows if row["kind"] == "step dropout")
    keeps = {peer["name"]: peer["kept"] for peer in dropped["peers"] if "kept" in peer}
    assert keeps["lorafusion"] > 3  # x without what is dropped, a mask and h
    for column in dropped["backends"].values():
        assert column["kept"] == pytest.approx(4 * 16 / SHAPE[1], rel=0.02)  # h alone


def test_merges_and_norms_of_the_devices_table_are_measured(host, monkeypatch):
    monkeypatch.setattr(gpu_lora, "able", lambda op="": ["cpu"])
    rows = list(gpu_lora_merge.measure(host, left=forever, shape=(70, 48)))
    layout = Layout(hidden=32, layers=1, intermediate=48, vocabulary=10, key_value=16)
    rows += gpu_lora_whole.measure(host, left=forever, layout=layout, reserve=0)
    assert [row["kind"] for row in rows] == [*(op for op, _, _ in gpu_lora_merge.ROWS), "whole", "whole"]
    for row in rows:
        assert row["fastest"] == "cpu" and row["base_ms"] > 0, row
        assert all(peer["x"] > 0 for peer in row["peers"]) and row["peers"], row
        if row["kind"] == "merge_lora":
            assert row["backends"]["cpu"]["misrounded"] <= 1e-3
    assert "over_one" in rows[-1]["backends"]["cpu"] and "over_one" not in rows[-2]["backends"]["cpu"]
    found = {"lora": {"rows": rows}, "device": {"device": None, "versions": {}}, "commit": "", "date": ""}
    assert rows[-1]["name"] in gpu_report.markdown(json.loads(json.dumps(found)))


def test_the_devices_kernels_merge_where_they_are(host):
    """Emulated and interpreted: one row is enough, as each of their launches takes long here."""
    able = gpu_lora.able("merge_lora")
    rows = gpu_lora_merge.measure(host, left=forever, shape=(17, 24))
    first = next(iter(rows))
    assert set(first["backends"]) == set(able)
    assert all("ms" in column for column in first["backends"].values()), first


def test_what_does_not_fit_or_is_late_says_so(host):
    [late, *_] = gpu_lora.measure(gpu_lora.CASES, host, left=lambda: 0.0)
    assert late["left_out"] == "out of time"
    rows = list(gpu_lora_merge.measure(host, left=lambda: 0.0))
    assert {row["left_out"] for row in rows} == {"out of time"}
    host.free = lambda: 1 << 30
    one, eight = gpu_lora_whole.measure(host, left=forever)
    assert one["left_out"] == eight["left_out"] == "needs 32 GB, the device has 1 GB free"
    assert 6.9e9 < one["parameters"] < 7e9


def test_a_kernel_that_errs_costs_its_own_column_only(host, monkeypatch):
    real = lora_layers.ours

    def ours(c, options):
        if backends.chosen("lora_linear", c.x) == "torch":
            raise RuntimeError("no such kernel")
        return real(c, options)

    monkeypatch.setattr(gpu_lora, "able", lambda op="": ["cpu", "torch"])
    monkeypatch.setattr(lora_layers, "ours", ours)
    found = gpu.collect(gpu_lora.measure([small(gpu_lora.CASES[0])], host, left=forever), json.dumps)
    assert found["rows"][0]["fastest"] == "cpu"
    [text] = gpu.failed(found)
    assert text.endswith("on torch: RuntimeError: no such kernel")


def test_pefts_scheme_stands_in_where_peft_is_missing(host, monkeypatch):
    monkeypatch.setattr(lora_rivals, "able", lambda name: name not in ("peft", "peft compiled"))
    options = {"rows": 2, "rank": 4, "step": True, "dropout": 0.1}
    case = cases.Case("lora_linear", Spec(SHAPE, n=1), options, peers={"peft": 1.0, "peft compiled": 1.0})
    [row] = gpu_lora.measure([case], host, left=forever)
    scheme, compiled = row["peers"]
    assert scheme["name"] == "peft scheme" and scheme["x"] > 0
    assert compiled == {"name": "peft compiled", "missing": "not installed"}
    judged = {t["about"]: t for t in gpu_targets.judge({"lora": {"rows": [row]}})}
    assert judged["the same with dropout 0.1"]["rows"] == 1


def test_what_no_graph_can_hold_is_called_as_it_is():
    class Refusing(HostClock):
        def capture(self, calls):
            raise RuntimeError("operation not permitted when stream is capturing")

    samples, used = gpu_lora.Samples(Refusing()), []
    samples.add(
        "peer", [lambda: used.append(backends.chosen("lora_linear", torch.empty(0)))], {}, backend="torch"
    )
    samples.calls["peer"]()
    assert samples.about["peer"] == {"graph": False} and used == ["torch"] * 3
    samples.attempt("bad", lambda: 1 / 0)
    assert samples.about["bad"] == {"error": "ZeroDivisionError: division by zero"}


def linear_row(kind, rows, rank, over, peers=(), **column):
    """A row of a device's table as a run holds it."""
    ours = {"ms": 0.1, "over": over, "low": over - 0.01, "high": over + 0.01, "pairs": 101}
    ours |= {"more_us": 3.0, "more_low": 2.5, "more_high": 3.5, **column}
    row = {"name": f"{kind} {rows} {rank}", "op": "lora_linear", "kind": kind, "rows": rows, "rank": rank}
    row |= {"base_ms": 0.09, "fastest": "cuda"}
    row["backends"] = {"cuda": ours, "triton": {"ms": 0.2, "over": 2.0}}
    row["peers"] = [
        {"name": name, "x": x, "low": x - 0.02, "high": x + 0.02, "pairs": 101} for name, x in peers
    ]
    return row


def test_targets_hold_intervals_against_their_bounds():
    rows = [
        linear_row("forward", 2048, 16, 1.05), linear_row("forward", 8192, 16, 1.075),
        linear_row("forward", 8192, 64, 1.2), linear_row("forward", 512, 16, 1.3),
        linear_row("decode", 1, 16, 1.5), linear_row("adapters", 32, 16, 1.3),
        linear_row("step", 8192, 16, 1.1, [("peft", 1.4)]),
        linear_row("step dropout", 8192, 16, 1.1, [("peft", 1.34)], kept=0.016),
    ]  # fmt: skip
    merge = {
        **linear_row("merge_lora", 1, 16, 1.1, ms=0.018, misrounded=2e-6),
        "op": "merge_lora",
        "adapters": 1,
    }
    whole = linear_row("whole", 1, 16, 1.1, ms=8.0, over_one=1.05, one_low=1.04, one_high=1.06)
    run = {"lora": {"rows": [*rows, merge, whole]}}
    judged = {row["about"]: row for row in gpu_targets.judge(run)}
    met = {
        "lora_linear r=16, 2048 rows or more": None,
        "lora_linear r=64, 2048 rows or more": False,
        "lora_linear, 512 rows": False,
        "lora_linear r=16, 1 to 32 rows": True,
        "32 rows x 32 adapters r=16": True,
        "forward and backward r=16": True,
        "forward and backward against PEFT": True,
        "the same with dropout 0.1": None,
        "kept for the backward pass with dropout": True,
        "merge_lora r=16, one 4096 x 4096 layer": True,
        "merge_lora, elements not rounded rightly": True,
        "merge_lora, all layers of 8B, 1 or 8 adapters": True,
        "the same, 8 adapters": True,
        "dora_norm r=16, 4096 x 4096": None,
    }
    assert {about: judged[about]["met"] for about in met} == met
    text = gpu_targets.words(judged["lora_linear r=16, 2048 rows or more"])
    assert text.endswith("<= 1.08 x frozen: not resolved (1.07, 1.06 to 1.08, forward 8192 16)")
    assert judged["dora_norm r=16, 4096 x 4096"]["why"] == "not measured"
    assert gpu_targets.fastest(run)["lora_linear"] == "cuda"


@pytest.mark.skipif(bool(backends.missing("cuda")), reason="the CUDA kernels are not there, emulated or real")
def test_softmax_is_timed_on_every_backend_and_says_which_is_faster(monkeypatch):
    """cuda and triton, emulated and interpreted; which one is faster here says nothing."""
    monkeypatch.setattr(gpu_table, "ROUNDS", 1)
    monkeypatch.setattr(gpu_softmax, "ROUNDS", 1)
    monkeypatch.setattr(gpu_table, "CHECKED", (3, 67))
    case = gpu_cases.Case("softmax", Spec((2, 70), torch.float32, 0, LOGITS))
    sizes = {"sample_bytes": 1, "copy_bytes": 1 << 10}
    [row] = gpu_softmax.measure([(case.spec, [case])], HostClock(), left=forever, **sizes)
    assert all(row["backends"][backend]["ms"] > 0 for backend in ("cuda", "triton")), row
    assert gpu_targets.fastest({"softmax": {"rows": [row]}}) == {"softmax": row["fastest"]}


def test_ours_is_forced_onto_the_named_backend(host, monkeypatch):
    monkeypatch.setattr(gpu_lora, "able", lambda op="": ["cpu", "torch"])
    seen = []
    real = pykernels.lora_linear

    def spy(x, *arguments, **named):
        seen.append(backends.chosen("lora_linear", x))
        return real(x, *arguments, **named)

    monkeypatch.setattr(pykernels, "lora_linear", spy)
    [_] = gpu_lora.measure([replace(small(gpu_lora.CASES[0]), peers={})], host, left=forever)
    assert seen.count("cpu") == seen.count("torch") > 2
