"""bench/device.sh without a device: its steps, what they leave on record, and the code that measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pykernels import backends
from pykernels.bench import (
    device_probe,
    device_steps,
    gpu,
    gpu_cases,
    gpu_clock,
    gpu_llama,
    gpu_peers,
    gpu_report,
    gpu_table,
    gpu_targets,
    report,
    sanitize_cases,
)
from pykernels.bench.cases import Case
from pykernels.bench.device_steps import Step
from pykernels.bench.inputs import Spec
from pykernels.bench.llama import LLAMA_8B, Layout

ROOT = Path(__file__).resolve().parent.parent
SMALL = Spec((8, 300))


def forever() -> float:
    """Time is never short."""
    return 1e9


def python(code: str) -> list[str]:
    """A command that runs Python code."""
    return [sys.executable, "-c", code]


def carry_out(steps, tmp_path, limit=60.0):
    """The exit status, the record, and the log of some steps."""
    record, saved = {}, []
    status = device_steps.run(
        steps, record, lambda r: saved.append(json.dumps(r)), tmp_path / "log", limit=limit
    )
    assert len(saved) == len(steps) and json.loads(saved[-1]) == record
    return status, {s["name"]: s for s in record["steps"]}, record


def test_steps_are_on_record_whatever_happens(tmp_path):
    result = tmp_path / "good.json"
    good = Step("good", python(f"open({str(result)!r}, 'w').write('[7]'); print('3 passed, 1 skipped')"), 20,
                result=result)  # fmt: skip
    bad = Step("bad", python("print('why'); raise SystemExit(4)"), 20, ("good",))
    status, steps, record = carry_out([good, bad, Step("after", python("1"), 20, ("bad",))], tmp_path)
    assert status == 1 and record["good"] == [7]
    assert steps["good"]["status"] == "passed" and steps["good"]["counts"] == {"passed": 3, "skipped": 1}
    assert (steps["bad"]["status"], steps["bad"]["rc"], steps["bad"]["tail"]) == ("failed", 4, ["why"])
    assert (steps["after"]["status"], steps["after"]["why"]) == ("left out", "bad: failed")
    assert "== bad: " in (tmp_path / "log").read_text()


def test_a_step_that_dies_while_it_writes_fails_and_stops_nothing(tmp_path):
    steps = []
    for name, written in (("half", "b'[7, '"), ("bytes", "bytes([255])")):
        result = tmp_path / f"{name}.json"
        code = f"open({str(result)!r}, 'wb').write({written})"
        steps.append(Step(name, python(code), 20, result=result))
    status, done, record = carry_out([*steps, Step("next", python("1"), 20)], tmp_path)
    assert status == 1 and done["next"]["status"] == "passed"
    for name in ("half", "bytes"):
        assert done[name]["status"] == "failed" and name not in record
        assert done[name]["result"].startswith(f"; {name}.json cannot be read: ")


def test_a_step_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, time; p = subprocess.Popen(['sh', '-c', 'trap : INT TERM; sleep 60; sleep 60']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); print('begun', flush=True); time.sleep(60)"
    )
    status, steps, _ = carry_out([Step("long", python(code), 3), Step("next", python("1"), 20)], tmp_path)
    assert status == 1 and steps["next"]["status"] == "passed"
    assert (steps["long"]["status"], steps["long"]["tail"][0]) == ("timeout", "begun")
    time.sleep(0.2)
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_what_does_not_fit_is_left_out(tmp_path):
    slow = Step("slow", python("import time; time.sleep(1)"), 20)
    status, steps, _ = carry_out([slow, Step("late", python("1"), 20)], tmp_path, limit=5.5)
    assert status == 0 and (steps["late"]["status"], steps["late"]["why"]) == ("left out", "out of time")


def test_tools_that_are_missing_or_refuse_stop_nothing(tmp_path):
    refused = Step("refused", python("print('Device not supported'); raise SystemExit(1)"), 20,
                   tool=sys.executable)  # fmt: skip
    status, steps, _ = carry_out([refused, Step("gone", ["no-such-tool"], 20, tool="no-such-tool")], tmp_path)
    assert status == 0 and steps["refused"]["status"] == "refused"
    assert steps["gone"]["why"] == "no-such-tool is not installed"


def test_records_name_no_folder_of_this_machine():
    text = device_steps.scrub(f"{ROOT}/pykernels {sys.prefix}/bin {Path.home()}/x")
    assert text == "./pykernels <python>/bin ~/x"


def test_named_steps_run_with_those_that_always_do(tmp_path):
    plan = device_steps.steps(tmp_path)
    assert [s.name for s in device_steps.chosen(plan, ["table"])] == ["wheels", "device", "table"]
    assert device_steps.chosen(plan, []) == plan
    with pytest.raises(ValueError, match=r"steps are wheels, device, build, .*; got 'tables'"):
        device_steps.chosen(plan, ["tables"])


def test_the_times_of_all_steps_are_those_that_the_script_states(tmp_path):
    text = (ROOT / "bench" / "device.sh").read_text().replace("#", " ")
    steps = device_steps.steps(tmp_path)
    for step in steps:
        assert f"{step.name} {step.seconds:g}" in " ".join(text.split())
    assert sum(step.seconds for step in steps[:-2]) <= device_steps.LIMIT  # the last two: what is left over
    assert f"{device_steps.LIMIT:g} s" in text


@pytest.mark.parametrize(
    ("said", "found"), [("9.0\n", {"CUDAARCHS": "90-real"}), ("[N/A]\n", {}), (None, {})]
)
def test_the_build_is_for_the_device_alone(said, found, monkeypatch, tmp_path):
    def run(*given, **options):
        if said is None:
            raise FileNotFoundError("nvidia-smi")
        return subprocess.CompletedProcess(given, 0, stdout=said)

    monkeypatch.setattr(device_steps.subprocess, "run", run)
    steps = {step.name: step.environment for step in device_steps.steps(tmp_path)}
    for name in ("build", "tests"):
        assert {k: v for k, v in steps[name].items() if k == "CUDAARCHS"} == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_script_says_so_and_fails(tmp_path):
    done = subprocess.run(
        [str(ROOT / "bench" / "device.sh")],
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "PYKERNELS_COMMIT": "abc"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == device_steps.NO_DEVICE, done.stdout + done.stderr
    record = json.loads((tmp_path / "device.json").read_text())
    assert record["commit"] == "abc" and record["device"]["device"] is None
    assert record["device"]["why"] == "no CUDA device" and record["device"]["versions"]["torch"]
    left_out = {s["name"]: s.get("why") for s in record["steps"][2:]}
    assert set(left_out.values()) == {"no device"} and {"tests", "table", "llama"} <= left_out.keys()
    assert str(ROOT) not in json.dumps(record)
    assert gpu_report.markdown(record).startswith("**no device**")


def test_versions_leave_out_what_is_missing(monkeypatch):
    monkeypatch.setattr(device_probe, "PACKAGES", ("torch", "no-such-package"))
    assert set(device_probe.versions()) - {"nvcc"} == {"python", "torch"}


@pytest.fixture
def host(monkeypatch):
    """The CPU kernels stand in for a device's backend."""
    monkeypatch.setattr(gpu_table, "able", lambda: ["cpu"])
    monkeypatch.setattr(gpu_llama, "able", lambda: ["cpu"])
    monkeypatch.setattr(gpu_table, "ROUNDS", 2)
    return gpu_clock.HostClock()


def small(cases):
    """The same rows on small inputs."""
    return [case.on(Spec(SMALL.shape, case.spec.dtype, case.spec.n, case.spec.data)) for case in cases]


def test_every_row_of_the_table_is_measured(host):
    groups = [(cases[0].spec, cases) for cases in map(small, (c for _, c in gpu_cases.table()))]
    rows = list(gpu_table.measure(groups, host, left=forever, sample_bytes=1, copy_bytes=1 << 16))
    assert len({row["name"] for row in rows}) < len(rows) == sum(len(c) for _, c in groups)
    for row in rows:
        column = row["backends"]["cpu"]
        assert set(column) == {"ms", "best", "gbs", "of_copy"}, column
        assert row["fastest"] == "cpu" and row["copy_gbs"] > 0
        assert column["gbs"] == pytest.approx(row["nbytes"] / column["ms"] / 1e6)
        assert gpu.line(row).startswith(row["name"])
    names = [case.name for _, cases in gpu_cases.table() for case in cases]
    assert len(set(names)) == len(names)


def test_a_kernel_that_errs_costs_its_own_row_only(host, monkeypatch):
    real = gpu_table.compare

    def compare(case, backend, device):
        if case.op == "linear_merge":
            raise RuntimeError("other bits")
        real(case, backend, device)

    monkeypatch.setattr(gpu_table, "compare", compare)
    cases = [gpu_cases.Case("linear_merge", SMALL), gpu_cases.Case("task_arithmetic", SMALL)]
    found = gpu.collect(
        gpu_table.measure([(SMALL, cases)], host, left=forever, sample_bytes=1, copy_bytes=1 << 16),
        json.dumps,
    )
    assert [("fastest" in row) for row in found["rows"]] == [False, True]
    assert list(gpu.failed(found)) == ["linear_merge 8x300 bf16 n=3 on cpu: RuntimeError: other bits"]


def test_rows_say_that_time_ran_out(host):
    case = gpu_cases.Case("linear_merge", SMALL)
    rows = list(gpu_table.measure([(SMALL, [case])], host, left=lambda: 0.0, copy_bytes=1 << 16))
    assert rows[0]["left_out"] == "out of time" and not rows[0]["backends"]
    [row] = gpu_peers.measure([Case("linear_merge", SMALL)], host, left=lambda: 0.0)
    assert row["left_out"] == "out of time"


def test_other_bits_than_the_cpus_are_seen(monkeypatch):
    monkeypatch.setattr(gpu_cases.Case, "call", lambda self, x: lambda: x.base + x.out.isnan())
    with pytest.raises(RuntimeError, match=r"cpu and the CPU kernels disagree in .* elements"):
        gpu_table.compare(gpu_cases.Case("linear_merge", SMALL), "cpu", torch.device("cpu"))


def test_peers_are_compared_and_timed(host):
    eager = [c for c in gpu_cases.PEERS if gpu_peers.COMPILED not in c.peers]
    cases = {c.op + str(c.options): Case(c.op, SMALL, c.options, peers=c.peers) for c in eager}
    rows = list(gpu_peers.measure(list(cases.values()), host, left=forever))
    assert {row["backend"] for row in rows} == {"cpu"}
    for row in rows:
        assert row["ms"] > 0 and {p["name"] for p in row["peers"]} >= {"naive torch", "tuned torch"}
        for peer in row["peers"]:
            assert "x" in peer if "torch" in peer["name"] else peer.get("missing") or peer["x"] > 0, peer
    assert "naive torch" in gpu.line(rows[0])


def test_a_peer_that_fails_is_a_finding(host, monkeypatch):
    monkeypatch.setattr(gpu_peers, "naive", lambda case, x: 1 / 0)
    [row] = gpu_peers.measure(
        [Case("linear_merge", SMALL, peers={gpu_peers.COMPILED: 1.0})], host, left=forever
    )
    assert row["peers"] == [{"name": gpu_peers.COMPILED, "error": "ZeroDivisionError: division by zero"}]


def test_a_whole_layout_is_merged_and_checked(host):
    layout = Layout(hidden=64, layers=2, intermediate=96, vocabulary=50, key_value=16)
    found = gpu_llama.measure(host, layout=layout, left=forever, copy_bytes=1 << 16)
    assert set(found["methods"]) == set(gpu_llama.METHODS)
    for columns in found["methods"].values():
        assert columns["cpu"]["checked"] == 5 and columns["cpu"]["ms"] > 0
    assert found["nbytes"] == 5 * layout.nbytes


def test_a_layout_that_does_not_fit_says_so(host, monkeypatch):
    monkeypatch.setattr(host, "free", lambda: 80 << 30, raising=False)
    found = gpu_llama.measure(host, left=forever)
    assert found["left_out"] == "needs 87 GB, the device has 86 GB free" and "methods" not in found
    assert 8.0e9 < found["parameters"] < 8.1e9 and LLAMA_8B.nbytes == 2 * found["parameters"]


def test_every_row_of_the_backends_is_sanitized(monkeypatch):
    assert set(sanitize_cases.ROWS) == {op for op, row in backends.TABLE.items() if "cuda" in row}
    monkeypatch.setattr(sanitize_cases, "able", lambda: ["cpu"])
    said = []
    assert sanitize_cases.run(torch.device("cpu"), said.append) == 0
    assert said == ["cpu: every row ran"]


def test_what_the_sanitizer_sees_fail_is_named(monkeypatch):
    real = sanitize_cases.ROWS["elect_sign"]
    calls = []

    def fails(function, x):
        calls.append(x)
        if len(calls) % 2 == 0:  # the first of two is that of the CPU's kernels
            raise RuntimeError("unspecified launch failure")
        return real(function, x)

    monkeypatch.setattr(sanitize_cases, "ROWS", {"elect_sign": fails})
    said = []
    assert sanitize_cases.run(torch.device("cpu"), said.append, only="cpu") == 4
    assert said[0] == "elect_sign on cpu, torch.bfloat16, 1031 elements: unspecified launch failure"


@pytest.mark.skipif(bool(backends.missing("cuda")), reason="the CUDA kernels are not there, emulated or real")
def test_the_emulated_kernels_pass_what_the_sanitizer_runs(monkeypatch):
    monkeypatch.setattr(sanitize_cases, "able", lambda: ["cuda"])
    monkeypatch.setattr(sanitize_cases, "SHAPES", ((1, 1031),))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert sanitize_cases.run(torch.device(device)) == 0


RUN = {
    "kind": "device", "date": "2026-01-02", "commit": "abc",
    "device": {"device": {"name": "NVIDIA H200", "driver_version": "580"}, "versions": {"torch": "2.11"}},
    "steps": [],
    "table": {"rows": [
        {"name": "linear", "op": "linear_merge", "dtype": "bfloat16", "n": 3, "fastest": "triton",
         "copy_gbs": 4300,
         "backends": {"cuda": {"ms": 2.0, "of_copy": 0.45}, "triton": {"ms": 1.0, "of_copy": 0.9}}},
        {"name": "linear wide", "op": "linear_merge", "dtype": "float32", "n": 3, "fastest": "cuda",
         "copy_gbs": 4310,
         "backends": {"cuda": {"ms": 1.0, "of_copy": 0.1}, "triton": {"ms": 1.5, "of_copy": 0.09}}},
        {"name": "kth", "op": "kth_magnitude", "dtype": "bfloat16", "n": 3, "fastest": "cuda",
         "copy_gbs": 4300, "backends": {"cuda": {"ms": 1.0, "of_copy": 0.5}, "triton": {"error": "no"}}},
    ]},
    "peers": {"rows": [
        {"name": "ties", "op": "ties_merge", "ms": 0.2, "peers": [
            {"name": "mergekit", "x": 44.0}, {"name": "peft", "missing": "not installed"}]}]},
    "softmax": {"rows": [
        {"name": "softmax 512x131072 fp32", "op": "softmax", "length": 131072, "fastest": "cuda",
         "copy_gbs": 4300, "backends": {"cuda": {"ms": 1.0, "of_copy": 0.9}, "triton": {"error": "no"}},
         "peers": [{"name": "torch", "x": 1.6}, {"name": "torch.compile", "x": 1.3},
                   {"name": "quack", "missing": "not installed"}]},
        {"name": "softmax 1x151936 fp32 temperature=0.7", "op": "softmax", "length": 151936,
         "fastest": "cuda", "copy_gbs": 4300, "backends": {"cuda": {"ms": 0.1, "of_copy": 0.1}},
         "peers": [{"name": "copy, scale, torch", "x": 5.0}]}]},
    "llama": {"parameters": 8030000000, "about": "32 layers", "one_pass_ms": 18.0, "methods": {
        "ties d=0.2": {"cuda": {"ms": 45.0}, "triton": {"ms": 55.0}}}},
}  # fmt: skip


def test_targets_are_judged_on_the_faster_backend():
    judged = {row["about"]: row for row in gpu_targets.judge(RUN)}
    assert len(judged) == len(gpu_targets.TARGETS)
    linear = judged["linear_merge, task_arithmetic, the TIES merge pass"]
    assert (linear["met"], linear["aim_met"], linear["value"], linear["rows"]) == (True, False, 90.0, 1)
    kth = judged["kth_magnitude, 3 models"]
    assert (kth["met"], kth["value"]) == (False, 2.0)
    whole = judged["whole 8B layout, TIES, one CUDA graph"]
    assert (whole["met"], whole["aim_met"], whole["value"]) == (True, True, 45.0)
    assert judged["against mergekit's TIES"]["met"] is True
    shares = judged["softmax, rows of 1024 to 131072"]
    assert (shares["met"], shares["aim_met"], shares["value"], shares["rows"]) == (True, False, 90.0, 1)
    assert judged["softmax, rows of 262144"]["met"] is None
    assert judged["softmax against torch, rows of 4096 or more"]["value"] == 1.6
    assert judged["softmax against torch.compile, rows of 128k or more"]["met"] is False
    assert judged["softmax with temperature against copy, scale, torch"]["value"] == 5.0
    assert judged["dare_merge"]["met"] is None and judged["dare_merge"]["why"] == "not measured"


def test_the_faster_backend_is_told_per_op():
    assert gpu_targets.fastest(RUN) == {"linear_merge": "triton"}


def test_a_run_is_judged_in_a_file(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    gpu_targets.main([str(tmp_path / "run.json"), str(tmp_path / "targets.json")])
    assert "kth_magnitude, 3 models: <= 1.7 x one read: NOT MET (2, kth)" in capsys.readouterr().out
    assert json.loads((tmp_path / "targets.json").read_text())["fastest"] == {"linear_merge": "triton"}


def test_a_run_reads_well():
    text = report.markdown({**RUN, "targets": {"rows": gpu_targets.judge(RUN)}})
    assert text.startswith("**NVIDIA H200**, driver 580, torch 2.11, commit abc, 2026-01-02.")
    assert "| kth_magnitude, 3 models | <= 1.7 x one read | NOT MET (2, kth) |" in text
    assert "| linear | 2 | 45 % | 1 | 90 % |" in text and "| kth | 1 | 50 % | failed |  |" in text
    assert "| ties d=0.2 | 45.0 | 55.0 |" in text and "4300 to 4310 GB/s" in text
    assert "| ties | 0.2 | mergekit 44x | peft |" in text
    assert "| softmax 512x131072 fp32 | 1 | 90 % | failed |  | torch 1.6x, torch.compile 1.3x |" in text


def test_the_command_writes_after_every_row(tmp_path, monkeypatch, host):
    monkeypatch.setattr(gpu_cases, "GROUPS", ((SMALL, (("linear_merge", {}),)),))
    out = tmp_path / "table.json"
    assert gpu.main(["table", "--out", str(out), "--device", "cpu", "--seconds", "0"]) == 0
    assert json.loads(out.read_text())["rows"][0]["left_out"] == "out of time"
