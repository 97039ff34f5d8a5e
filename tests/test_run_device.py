"""Merges on devices: the bytes of the CPU's merge, whatever the budgets, and nothing half-written.

Every case runs on stand-ins in host memory, and on CUDA devices where there are some.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pykernels
from pykernels import backends, grouping
from pykernels.engine.run import Report, merge
from pykernels.engine.verify import verify
from pykernels.methods import Linear
from tests.checkpoints import METHODS, SHAPES, load, recipe, same, write_model, write_models
from tests.stand_in import StandIn, install

KINDS = [
    "stand-in",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes in bfloat16."""
    path = tmp_path_factory.mktemp("models")
    write_models(path)
    return path


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """What the devices are."""
    return str(request.param)


@pytest.fixture
def devices(kind: str, monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """Stand-ins for cuda:0 and cuda:1; none for real devices."""
    monkeypatch.setattr(grouping, "SMALL", 5000)
    return [] if kind == "cuda" else install(monkeypatch, late=0.001)


BUDGETS: dict[str, dict[str, Any]] = {
    "all at once": {"device": "cuda:0"},
    "two devices": {"device": "cuda:0,cuda:1", "device_memory": "4MB"},
    "two devices, small host": {"device": "cuda:0,cuda:1", "memory": "1MB", "shard_size": "30KB"},
    "chunks": {"device": "cuda:0", "device_memory": "900KB", "memory": "8MB"},
    "single blocks": {"device": "cuda:0,cuda:1", "device_memory": "70KB", "memory": "1MB", "threads": 1},
    "durable": {"device": "cuda", "durable": True, "shard_size": "60KB"},
}


def on_device(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options for the devices that there are."""
    if kind == "cuda" and torch.cuda.device_count() < 2:
        options = {**options, "device": options["device"].split(",")[0]}
    return options


def files(out: Path) -> dict[str, bytes]:
    """All that a merge wrote, but for the record, which names the backend."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name not in ("pykernels.json", "README.md")}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", METHODS)
def test_files_are_those_of_the_cpu_whatever_the_budget(
    home: Path, tmp_path: Path, kind: str, devices: list[StandIn], method: str, budget: str
) -> None:
    options = on_device(kind, BUDGETS[budget])
    report = merge(recipe(home, method), tmp_path / "out", **options)
    shards = {"shard_size": options["shard_size"]} if "shard_size" in options else {}
    merge(recipe(home, method), tmp_path / "cpu", **shards)
    assert files(tmp_path / "out") == files(tmp_path / "cpu")
    assert len(report.devices) == options["device"].count("cuda") and report.busy is not None
    assert report.busy.reading > 0 and report.busy.merging > 0 and report.busy.writing > 0
    assert report.busy.limit() in ("reading", "copying up", "merging", "copying down", "writing")
    if kind == "stand-in":
        kept_within(devices, report, options)


def kept_within(devices: list[StandIn], report: Report, options: dict[str, Any]) -> None:
    """Both budgets hold: one allocation per device, pinned buffers within the host's share."""
    for use, device in zip(report.devices, devices, strict=False):
        assert device.allocated == [use.held] and use.held <= use.allowed * 3 // 4
    pinned = sum(sum(device.page_locked) for device in devices)
    memory = {"1MB": 10**6, "8MB": 8 * 10**6}.get(options.get("memory", ""), 2 * 10**9)
    assert pinned <= memory // 2 + (2 << 20)  # the writer's ring has at least 2 MiB


@pytest.mark.parametrize("memory", ["70KB", "900KB", "100MB"])
@pytest.mark.parametrize("count", [1, 2])
def test_model_scope(
    home: Path, tmp_path: Path, kind: str, devices: list[StandIn], count: int, memory: str
) -> None:
    options = on_device(kind, {"device": "cuda:0,cuda:1"[: 7 * count - 1 + count // 2]})
    for tie in ("index", "keep"):
        made = recipe(home, "ties", scope="model")
        made["parameters"] = {**made["parameters"], "tie": tie}
        merge(made, tmp_path / f"out {tie}", device_memory=memory, **options)
        merge(made, tmp_path / f"cpu {tie}")
        assert files(tmp_path / f"out {tie}") == files(tmp_path / f"cpu {tie}")


@pytest.mark.parametrize("memory", ["200KB", "900KB", "100MB"])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_mixed_dtypes_are_widened_on_the_device(
    tmp_path: Path, kind: str, devices: list[StandIn], method: str, memory: str
) -> None:
    write_models(tmp_path, torch.bfloat16)
    for name, dtype in (("t1", torch.float16), ("t2", torch.float32)):
        state = load(tmp_path / name)
        path = tmp_path / f"new {name}"
        write_model(path, {n: t.to(dtype) if n in SHAPES else t for n, t in state.items()})
        (path / "model.safetensors").replace(tmp_path / name / "model.safetensors")
    for dtype in ({}, {"dtype": "float32"}, {"dtype": "float64"}):
        made = recipe(tmp_path, method, **dtype)
        out, cpu = tmp_path / f"out{len(str(dtype))}", tmp_path / f"cpu{len(str(dtype))}"
        merge(made, out, device="cuda:0", device_memory=memory, overwrite=True)
        merge(made, cpu, overwrite=True)
        assert files(out) == files(cpu)


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("which", ["all", "one model"])
def test_float64_is_left_to_the_cpu(
    tmp_path: Path, kind: str, devices: list[StandIn], which: str, scope: str
) -> None:
    write_models(tmp_path, torch.float64 if which == "all" else torch.bfloat16)
    state = load(tmp_path / "t0")
    name = "model.layers.1.mlp.down_proj.weight"
    write_model(tmp_path / "new", {n: t.double() if n == name or (scope == "model" and n in SHAPES) else t
                                   for n, t in state.items()})  # fmt: skip
    (tmp_path / "new" / "model.safetensors").replace(tmp_path / "t0" / "model.safetensors")
    merge(recipe(tmp_path, "ties", scope=scope), tmp_path / "out", device="cuda:0")
    merge(recipe(tmp_path, "ties", scope=scope), tmp_path / "cpu")
    assert files(tmp_path / "out") == files(tmp_path / "cpu")
    if kind == "stand-in":
        assert (devices[0].uploaded == 0) == (which == "all" or scope == "model")


def test_data_at_odd_offsets(home: Path, tmp_path: Path, devices: list[StandIn]) -> None:
    for name in ("base", "t0", "t1", "t2"):
        write_model(tmp_path / name, load(home / name))
        path = tmp_path / name / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little") + 3
        path.write_bytes(length.to_bytes(8, "little") + raw[8 : length + 5] + b"   " + raw[length + 5 :])
    merge(recipe(tmp_path, "ties"), tmp_path / "odd", device="cuda:0")
    merge(recipe(home, "ties"), tmp_path / "cpu")
    assert same(load(tmp_path / "odd"), load(tmp_path / "cpu"))


def test_nothing_to_merge(tmp_path: Path, devices: list[StandIn]) -> None:
    for name in ("base", "t0"):
        write_model(tmp_path / name, {"ids": torch.arange(3), "none": torch.empty(0, 4)})
    merge(recipe(tmp_path, "ties", tuned=1), tmp_path / "out", device="cuda:0")
    assert same(load(tmp_path / "out"), {"ids": torch.arange(3), "none": torch.empty(0, 4)})


def test_a_model_of_one_tensor_and_one_scope(tmp_path: Path, kind: str, devices: list[StandIn]) -> None:
    """The threshold may lie on the device that found it, so that device merges."""
    for i, name in enumerate(("base", "t0", "t1")):
        generator = torch.Generator().manual_seed(i)
        embed = torch.randn(200, 50, generator=generator)
        state = {"model.embed_tokens.weight": embed, "lm_head.weight": embed.clone()}
        write_model(tmp_path / name, state, tie_word_embeddings=True)
    made = recipe(tmp_path, "ties", tuned=2, scope="model")
    both = on_device(kind, {"device": "cuda:0,cuda:1"})
    merge(made, tmp_path / "out", **both)
    merge(made, tmp_path / "cpu")
    assert files(tmp_path / "out") == files(tmp_path / "cpu")
    if kind == "stand-in":
        # Beside two outputs: the look at the segment, the end of its round, the cut.
        assert devices[0].merges == 5 and devices[1].merges == 0


def many_small(home: Path, count: int) -> None:
    """A base and two models of ``count`` small tensors with a larger one after every tenth."""
    for m, name in enumerate(("base", "t0", "t1")):
        generator = torch.Generator().manual_seed(m)
        shapes = {f"model.layers.{i}.norm": (100 + i % 7,) for i in range(count)}
        shapes |= {f"model.layers.{i}.w": (90, 100) for i in range(0, count, 10)}
        write_model(
            home / name,
            {n: torch.randn(shapes[n], generator=generator).bfloat16() for n in sorted(shapes)},
        )


@pytest.mark.parametrize("method", METHODS)
def test_small_tensors_share_loads(tmp_path: Path, kind: str, devices: list[StandIn], method: str) -> None:
    many_small(tmp_path, 300)
    merge(recipe(tmp_path, method, tuned=2), tmp_path / "out", device="cuda:0", shard_size="100KB")
    merge(recipe(tmp_path, method, tuned=2), tmp_path / "cpu", shard_size="100KB")
    assert files(tmp_path / "out") == files(tmp_path / "cpu")
    if kind == "stand-in":
        assert devices[0].merges == 30 + 1  # the large ones, and one load of all that are small


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each launch of ``linear`` merged: as on a device whose kernels take tables."""
    seen: list[int] = []
    real = Linear.merge

    def run(jobs: list[Any]) -> None:
        seen.append(len(jobs))
        for job in jobs:
            real(*job)

    def submit(*job: Any) -> None:
        grouping.submit(run, "linear", job, job[2].numel(), job[2].device)

    monkeypatch.setattr(Linear, "merge", submit)
    return seen


def test_small_tensors_share_launches(
    tmp_path: Path, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    many_small(tmp_path, 300)
    tuned = [load(tmp_path / name) for name in ("t0", "t1")]
    apart = {n: pykernels.linear_merge([t[n] for t in tuned], [0.5, 0.3]) for n in tuned[0]}
    assert same(pykernels.merge_state_dicts(None, tuned, "linear", weight=[0.5, 0.3]), apart)
    assert together == [330]
    install(monkeypatch)
    monkeypatch.setattr(grouping, "SMALL", 5000)
    merge(recipe(tmp_path, "linear", tuned=2), tmp_path / "out", device="cuda:0")
    assert sorted(together) == [1] * 30 + [300, 330]


@pytest.mark.parametrize(
    "method, scope, memory",
    [("ties", "tensor", "80KB"), ("ties", "model", "80KB"), ("dare_ties", "tensor", "100MB")],
    ids=["chunks", "model", "whole"],
)
@pytest.mark.parametrize("backend", ["ref", "cuda", "triton"])
def test_a_forced_backend_reaches_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, method: str, scope: str, memory: str
) -> None:
    """On stand-ins: "cuda" in its emulated build, "triton" in its interpreter, where they run."""
    if why := backends.missing(backend):
        pytest.skip(why)
    install(monkeypatch)
    many_small(tmp_path, 2)
    made = recipe(tmp_path, method, scope=scope, tuned=2)
    with pykernels.use_backend(backend):
        try:
            report = merge(made, tmp_path / "out", device="cuda:0", device_memory=memory)
        except ValueError as error:
            if "does not run on" not in str(error):
                raise
            pytest.skip(f"addresses another memory: {error}")
    assert report.devices[0].backend == backend
    assert json.loads((tmp_path / "out" / "pykernels.json").read_text())["backend"] == backend
    assert any("the references merge there" in text for text in report.warnings) == (backend == "ref")
    with pykernels.use_backend("ref" if backend == "ref" else "cpu"):
        merge(made, tmp_path / "cpu")
    assert files(tmp_path / "out") == files(tmp_path / "cpu")


def test_a_merge_on_a_device_is_verified_as_any_other(
    home: Path, tmp_path: Path, devices: list[StandIn]
) -> None:
    merge(recipe(home, "dare_ties"), tmp_path / "out", device="cuda:0", shard_size="60KB")
    report = verify(tmp_path / "out", samples=3)
    assert report.ok and len(report.recomputed) == 3


def test_progress_and_dry_run(home: Path, tmp_path: Path, devices: list[StandIn]) -> None:
    seen: list[Any] = []
    for dry_run in (True, False):
        report = merge(
            recipe(home, "ties"), tmp_path / "out", device="cuda:0", dry_run=dry_run, progress=seen.append
        )
        assert (tmp_path / "out").exists() != dry_run
        assert (report.devices[0].held == 0) == dry_run and (report.busy is None) == dry_run
    assert seen[-1].done == seen[-1].total > 0


def test_nan_and_overflow_are_counted(home: Path, tmp_path: Path, devices: list[StandIn]) -> None:
    for name in ("base", "t0", "t1", "t2"):
        state = load(home / name)
        if name == "t1":
            state["model.norm.weight"] = torch.full((1,), float("nan")).bfloat16()
            state["model.embed_tokens.weight"][5, :3] = 3e38
        write_model(tmp_path / name, state)
    made = recipe(tmp_path, "linear", dtype="float16")
    report = merge(made, tmp_path / "out", device="cuda:0", device_memory="300KB")
    assert report.nonfinite == {"model.norm.weight": 1, "model.embed_tokens.weight": 3}
