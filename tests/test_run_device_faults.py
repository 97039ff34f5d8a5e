"""What goes wrong in a merge on devices: it reaches the caller, all threads end, nothing is left."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pykernels import grouping
from pykernels.engine import mapped, writer
from pykernels.engine.files import FileError
from pykernels.engine.run import Progress, merge
from pykernels.engine.station import Board, Stopped
from tests.checkpoints import recipe, write_models
from tests.stand_in import install


class Broken(RuntimeError):
    """What a device would say."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes in bfloat16."""
    path = tmp_path_factory.mktemp("models")
    write_models(path)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches hold the tiny tensors only."""
    monkeypatch.setattr(grouping, "SMALL", 100)


def at_call(count: int, stage: str, error: BaseException) -> Callable[[str], None]:
    """A fault that raises at the ``count``-th call for a stage."""
    calls = [0]

    def fault(now: str) -> None:
        calls[0] += now == stage
        if now == stage and calls[0] == count:
            raise error

    return fault


def nothing_is_left(out: Path) -> None:
    """No file, no folder, no thread."""
    assert not out.exists()
    assert [t.name for t in threading.enumerate() if t.name.startswith("pykernels-")] == []


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("memory", ["70KB", "100MB"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("stage", ["upload", "merge", "download"])
def test_a_device_fails(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    count: int,
    memory: str,
    scope: str,
) -> None:
    install(monkeypatch, fault=at_call(count, stage, Broken("the device fell off")))
    with pytest.raises(Broken, match="the device fell off"):
        merge(
            recipe(home, "ties", scope=scope), tmp_path / "out", device="cuda:0,cuda:1", device_memory=memory,
            memory="1MB",
        )  # fmt: skip
    nothing_is_left(tmp_path / "out")


def test_a_device_that_failed_cannot_hide_why(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(stage: str) -> None:
        if stage in ("merge", "synchronize"):
            raise Broken(stage)

    install(monkeypatch, fault=fault)
    with pytest.raises(Broken, match="merge"):
        merge(recipe(home, "ties"), tmp_path / "out", device="cuda:0")
    nothing_is_left(tmp_path / "out")


@pytest.mark.parametrize("count", [1, 5])
def test_a_file_cannot_be_read(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    real = mapped.Inputs.bytes
    fault = at_call(count, "read", FileError("t1: gone"))

    def read(self: mapped.Inputs, *arguments: Any) -> torch.Tensor:
        if threading.current_thread().name == "pykernels-read":
            fault("read")
        return real(self, *arguments)

    install(monkeypatch)
    monkeypatch.setattr(mapped.Inputs, "bytes", read)
    with pytest.raises(FileError, match="t1: gone"):
        merge(recipe(home, "ties"), tmp_path / "out", device="cuda:0")
    nothing_is_left(tmp_path / "out")


@pytest.mark.parametrize("count", [1, 3])
def test_the_disk_is_full(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    fault, real = at_call(count, "write", OSError(errno.ENOSPC, "No space left on device")), writer.os.pwrite

    def pwrite(*arguments: Any) -> int:
        fault("write")
        return real(*arguments)

    install(monkeypatch)
    monkeypatch.setattr(writer.os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        merge(recipe(home, "ties"), tmp_path / "out", device="cuda:0", shard_size="40KB", memory="1MB")
    nothing_is_left(tmp_path / "out")


@pytest.mark.parametrize("count", [1, 4])
def test_an_interrupt_stops_all_threads(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    fault = at_call(count, "progress", KeyboardInterrupt())
    monkeypatch.setattr("pykernels.engine.run.TICK", 0)
    install(monkeypatch, late=0.002)

    def moved(state: Progress) -> None:
        fault("progress")

    with pytest.raises(KeyboardInterrupt):
        merge(
            recipe(home, "ties"), tmp_path / "out", device="cuda:0,cuda:1", device_memory="300KB",
            progress=moved,
        )  # fmt: skip
    nothing_is_left(tmp_path / "out")


def test_an_input_that_changes_is_noticed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path, tuned=3)
    install(monkeypatch)

    def touch(state: Progress) -> None:
        (tmp_path / "t0" / "model.safetensors").touch()

    with pytest.raises(FileError, match="changed since its header was read"):
        merge(recipe(tmp_path, "ties"), tmp_path / "out", device="cuda:0", progress=touch)
    nothing_is_left(tmp_path / "out")


def test_threads_end_with_the_merge(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    merge(recipe(home, "ties", scope="model"), tmp_path / "out", device="cuda:0,cuda:1")
    assert [t.name for t in threading.enumerate() if t.name.startswith("pykernels-")] == []


def test_a_stopped_board_keeps_the_first_failure() -> None:
    board, first = Board(), Broken("first")
    board.stop(first)
    board.stop(Broken("second"))
    with pytest.raises(Stopped):
        board.wait(lambda: None)
    assert board.failure is first
