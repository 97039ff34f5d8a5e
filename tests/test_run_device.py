"""Merges on devices: the bytes of the CPU's merge, whatever the budgets, and nothing half-written.

Every case runs on stand-ins in host memory, and on CUDA devices where there are some.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pykernels import grouping
from pykernels.engine import target
from pykernels.engine.run import Report, merge
from tests.checkpoints import METHODS, recipe, write_models
from tests.stand_in import StandIn

Run = Callable[..., Report]
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
    """Stand-ins for cuda:0 and cuda:1, which no option of the command line reaches; none for real devices."""
    if kind == "cuda":
        return []
    made = [StandIn(i, late=0.001 * i) for i in range(2)]
    monkeypatch.setattr(target, "open_devices", lambda device: made[: device.count("cuda")])
    monkeypatch.setattr(grouping, "SMALL", 5000)
    return made


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
