"""LoRA's tables of a device without one: every row runs, targets judge, and what goes wrong is on record."""

from __future__ import annotations

import json
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch

import pykernels
from pykernels import backends
from pykernels.bench import (
    cases,
    device_steps,
    gpu,
    gpu_cases,
    gpu_lora,
    gpu_lora_merge,
    gpu_lora_whole,
    gpu_report,
    gpu_softmax,
    gpu_table,
    gpu_targets,
    gpu_traffic,
    lora_layers,
    lora_rivals,
    turns,
)
from pykernels.bench.gpu_clock import CudaClock, HostClock
from pykernels.bench.inputs import LOGITS, Spec
from pykernels.bench.llama import Layout
from tests.bench_layers import SHAPE, compile_without_inductor, small


def forever() -> float:
    """Time is never short."""
    return 1e9


@pytest.fixture
def host(monkeypatch):
    """Few rounds, the compiler's front alone, and the CPU's kernels in the place of a device's."""
    monkeypatch.setattr(
        gpu_lora, "able", lambda op="lora_linear": ["cpu", "torch"][: 1 + (op == "lora_linear")]
    )
    monkeypatch.setattr(gpu_lora, "ROUNDS", 2)
    monkeypatch.setattr(turns, "ROUNDS", 2)
    compile_without_inductor(monkeypatch)
    return HostClock()


def test_every_layer_of_the_devices_table_is_measured(host):
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


def test_merges_and_norms_of_the_devices_table_are_measured(host):
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are emulated and interpreted where no device is")
@pytest.mark.parametrize(
    "options",
    [{"rows": 2}, {"rows": 3, "adapters": 2}, {"rows": 3, "step": True, "dropout": 0.1}],
    ids=["decode", "adapters", "step"],
)
def test_the_devices_kernels_run_in_the_table(options, monkeypatch):
    """cuda and triton where they have the op: few rows, as each launch takes long here."""
    monkeypatch.setattr(gpu_lora, "ROUNDS", 1)
    case = cases.Case("lora_linear", Spec((16, 24), n=1), {"rank": 4, **options})
    [row] = gpu_lora.measure([case], HostClock(), left=forever)
    assert set(row["backends"]) == set(gpu_lora.able())
    assert all("ms" in column for column in row["backends"].values()), row


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are emulated and interpreted where no device is")
def test_the_devices_kernels_merge_in_the_table(monkeypatch):
    monkeypatch.setattr(gpu_lora, "ROUNDS", 1)
    monkeypatch.setattr(gpu_lora_merge, "ROWS", (("merge_lora", 4, 2), ("dora_norm", 4, 1)))
    for row in gpu_lora_merge.measure(HostClock(), left=forever, shape=(16, 24)):
        own = row["op"] if row["op"] in backends.TABLE else "merge_lora"
        assert set(row["backends"]) == set(gpu_lora.able(own))
        assert all("ms" in column for column in row["backends"].values()), row


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


def test_a_graph_keeps_what_it_reads_and_a_failed_one_gives_the_stream_back(monkeypatch):
    """Where PEFT's layers were freed, the next rival's tensors would lie."""
    streams, graph = ["default"], Mock()

    @contextmanager
    def on(stream):
        before, streams[:] = streams[:], [stream]
        try:
            yield
        finally:
            streams[:] = before

    @contextmanager
    def capturing(graph):
        streams[:] = ["capture"]
        yield
        streams[:] = ["default"]

    stand_ins = {"Stream": Mock(), "stream": on, "synchronize": Mock(), "graph": capturing}
    stand_ins |= {"current_stream": lambda device: Mock(), "CUDAGraph": lambda: graph}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    clock, held = CudaClock.__new__(CudaClock), torch.empty(3)
    clock.device, alive = torch.device("cuda"), weakref.ref(held)
    call = clock.capture(partial(torch.Tensor.numel, held))
    del held
    call()
    assert alive() is not None and graph.replay.call_count == 1
    del call
    assert alive() is None
    fails = iter((None, None))
    with pytest.raises(StopIteration):
        clock.capture(lambda: next(fails))
    assert streams == ["default"]


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


COUNTED = """==PROF== Connected to process 7
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","shrink","dram__bytes_read.sum","byte","67,108,864"
"0","shrink","dram__bytes_write.sum","byte","1,024"
"0","shrink","launch__grid_size","","99"
"1","gemm","dram__bytes_read.sum","byte","1000000"
"""


def test_bytes_are_counted_by_a_tool_and_judged(tmp_path, capsys):
    assert gpu_traffic.counted(COUNTED) == 67_108_864 + 1024 + 1_000_000
    tool, out = tmp_path / "ncu", tmp_path / "out.json"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{COUNTED}END\n")
    tool.chmod(0o755)
    assert gpu_traffic.main([str(tool), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found["bytes"]) == {*gpu_lora.able(), *gpu_traffic.RIVALS} and not found["errors"]
    judged = {row["about"]: row for row in gpu_targets.judge({"traffic": found})}
    assert judged["bytes to and from memory, step with dropout"]["met"] is True
    tool.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'\n")
    assert gpu_traffic.main([str(tool), "--out", str(out)]) == 1
    assert device_steps._REFUSED.search(capsys.readouterr().out)


@pytest.mark.parametrize("who", ["torch", *gpu_traffic.RIVALS])
def test_what_the_tool_watches_runs(who):
    gpu_traffic.step(who, "cpu", SHAPE, {**gpu_traffic.OPTIONS, "rows": 5})


@pytest.mark.skipif(
    torch.cuda.is_available() or bool(backends.missing("cuda")), reason="the CUDA kernels are not emulated"
)
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
    seen = []
    real = pykernels.lora_linear

    def spy(x, *arguments, **named):
        seen.append(backends.chosen("lora_linear", x))
        return real(x, *arguments, **named)

    monkeypatch.setattr(pykernels, "lora_linear", spy)
    [_] = gpu_lora.measure([replace(small(gpu_lora.CASES[0]), peers={})], host, left=forever)
    assert seen.count("cpu") == seen.count("torch") > 2
