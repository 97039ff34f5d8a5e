"""The writer of adapters under faults: every call that can fail does, runs are killed, disks are full."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pykernels.adapters.checkpoint import open_adapter
from pykernels.adapters.compose import compose
from pykernels.adapters.extract import extract
from tests.adapter_files import PREFIX, factors, write_adapter
from tests.checkpoints import load, write_model

CALLS = ("write", "fsync", "replace", "mkdir")
FILES = ["adapter_config.json", "adapter_model.safetensors"]
ROOM = "pykernels.engine.preflight.os.statvfs"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, and a base with a fine-tune."""
    path = tmp_path_factory.mktemp("writing")
    for seed, name in enumerate("ab"):
        write_adapter(path / name, factors("q", 40, 30, seed=seed))
    for name, norm in (("base", 1.0), ("tuned", 2.0)):
        write_model(path / name, {"q.weight": torch.eye(30) * norm, "norm.weight": torch.full((30,), norm)})
    return path


RUNS: dict[str, Callable[[Path, Path], Any]] = {
    "compose": lambda home, out: compose([str(home / n) for n in "ab"], out),
    "extract": lambda home, out: extract(str(home / "base"), str(home / "tuned"), out, rank=2),
}


class Fault:
    """Counts the calls that may fail while one is armed, and does ``what`` at the one of number ``at``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, what: Callable[[str], None]) -> None:
        self.count = 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name), at, what))

    def _wrapped(self, name: str, call: Callable[..., Any], at: int, what: Callable[[str], None]) -> Any:
        def run(*arguments: Any, **more: Any) -> Any:
            self.count += 1
            if self.count == at:
                what(name)
            return call(*arguments, **more)

        return run


def fail(name: str) -> None:
    """The call fails as on a full or broken disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def calls(home: Path, out: Path, run: str) -> int:
    """How many calls a run without faults makes."""
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, 0, fail)
        RUNS[run](home, out)
    assert sorted(p.name for p in out.iterdir()) == FILES
    return fault.count


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_every_call_may_fail_and_nothing_is_left(home, tmp_path, run, there):
    total = calls(home, tmp_path / "good", run)
    assert total >= 10
    for at in range(2 if there else 1, total + 1):  # the first makes OUT
        out = tmp_path / f"out{at}"
        if there:
            out.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, at, fail)
            with pytest.raises(OSError, match="No space left") as error:
                RUNS[run](home, out)
        assert error.value.errno == errno.ENOSPC
        assert out.exists() == there and (not there or not any(out.iterdir()))
        RUNS[run](home, out)
        assert (out / FILES[1]).read_bytes() == (tmp_path / "good" / FILES[1]).read_bytes()


def test_a_fault_names_the_file(home, tmp_path):
    total = calls(home, tmp_path / "good", "compose")
    for at in range(1, total + 1):
        with pytest.MonkeyPatch.context() as patch:
            seen: list[str] = []
            Fault(patch, at, lambda name, seen=seen: (seen.append(name), fail(name)))
            with pytest.raises(OSError) as error:
                compose([str(home / "a")], tmp_path / "out")
        if seen[0] in ("write", "fsync"):  # the system names the paths of the others itself
            assert str(tmp_path) in str(error.value), error.value


@pytest.mark.parametrize("run", RUNS)
def test_a_killed_run_leaves_nothing_that_loads(home, tmp_path, run):
    total = calls(home, tmp_path / "good", run)
    complete = 0
    for at in range(1, total + 1):
        out = tmp_path / f"out{at}"
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                Fault(pytest.MonkeyPatch(), at, lambda name: os._exit(9))
                RUNS[run](home, out)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        held = sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) if out.exists() else []
        if "adapter_config.json" in held:  # the last name: all is there
            complete += 1
            assert (out / FILES[1]).read_bytes() == (tmp_path / "good" / FILES[1]).read_bytes()
            open_adapter(str(out))
        elif not held:  # its hidden folder is no hindrance
            RUNS[run](home, out)
            assert sorted(p.name for p in out.iterdir()) == FILES
    assert 1 <= complete <= 2  # while the folders' names go to the disk


def test_a_limit_of_the_system_itself(home, tmp_path):
    """Not a stand-in for a fault: the kernel cuts a write short, and refuses the next."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large after byte") as error:
            compose([str(home / "a")], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "adapter_model.safetensors" in str(error.value) and not (tmp_path / "out").exists()


def test_no_room_is_said_before_anything_is_written(home, tmp_path, monkeypatch):
    free = type("Free", (), {"f_bavail": 100, "f_frsize": 4096})
    monkeypatch.setattr(ROOM, lambda path: free)
    for run in RUNS.values():
        with pytest.raises(ValueError, match=r"out': needs \d+ bytes \(\d+ of weights.*, 409600 are free"):
            run(home, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_an_input_that_changes_meanwhile_is_named(home, tmp_path, monkeypatch):
    path = write_adapter(tmp_path / "a", factors("q", 40, 30))
    write = os.write
    monkeypatch.setattr(os, "write", lambda *rest: (os.utime(path / FILES[1]), write(*rest))[1])
    with pytest.raises(ValueError, match=r"a/adapter_model\.safetensors': changed since its header"):
        compose([str(path)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_runs_into_one_folder(home, tmp_path):
    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="out': another run is writing into it"):
            compose([str(home / "a")], tmp_path / "out")
    finally:
        os.close(handle)


def test_bytes_go_to_the_disk_before_names_do(home, tmp_path, monkeypatch):
    order: list[str] = []
    for name in ("write", "fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *r, name=name, call=call: (order.append(name), call(*r))[1])
    compose([str(home / "a")], tmp_path / "out")
    names = [name for name in order if name != "write"]
    files, folder, published = ["fsync"] * 2, ["fsync"], ["replace", "fsync"] * 2
    assert names == [*files, *folder, *published, "fsync"]
    assert "write" not in order[order.index("replace") :]
    assert load(tmp_path / "out").keys() == {f"{PREFIX}q.lora_{f}.weight" for f in "AB"}
