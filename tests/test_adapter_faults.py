"""`pykernels lora merge` under faults: killed at every step that shows on the disk, and out of room."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from pykernels.cli import main
from pykernels.engine.companions import INDEX
from tests.adapter_files import write_base, write_mixed

STEPS = ("mkdir", "pwrite", "replace")
"""The calls that merges make to change a disk, beside those that write small files into the hidden folder."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter, and ``good``, what a run without faults makes of them."""
    path = tmp_path_factory.mktemp("faults")
    write_base(path / "base")
    write_mixed(path / "a")
    assert run(path, path / "good").exit_code == 0
    return path


def run(home: Path, out: Path, *options: str) -> Result:
    """The command, with several shards."""
    arguments = [str(p) for p in (home / "base", home / "a", out)]
    return CliRunner().invoke(main, ["lora", "merge", *arguments, "--shard-size", "15KB", *options])


def names(out: Path) -> list[str]:
    """Final names in OUT, which are all but that of the hidden folder."""
    return sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) if out.exists() else []


def content(out: Path) -> dict[str, bytes]:
    """All files."""
    return {p.name: p.read_bytes() for p in out.iterdir()}


def count(patch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[str]:
    """The names of STEPS as they come; ``act`` is called before each, with its number."""
    seen: list[str] = []

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **more: Any) -> Any:
            seen.append(name)
            act(len(seen))
            return call(*arguments, **more)

        return step

    for name in STEPS:
        patch.setattr(os, name, wrapped(name, getattr(os, name)))
    return seen


def killed(home: Path, out: Path, at: int) -> None:
    """A run that SIGKILL ends before its step of number ``at``."""

    def end(step: int) -> None:
        if step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            count(pytest.MonkeyPatch(), end)
            run(home, out)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_merge_leaves_nothing_that_loads(home, tmp_path):
    """No final name until all is written, the index last; the next run makes what it would have made."""
    with pytest.MonkeyPatch.context() as patch:
        steps = count(patch, lambda step: None)
        assert run(home, tmp_path / "counted").exit_code == 0
    published = steps.index("replace")
    assert steps.count("pwrite") >= 4 and set(steps[published:]) == {"replace"}
    wanted = content(home / "good")
    assert content(tmp_path / "counted") == wanted and INDEX in wanted
    for at in range(1, len(steps) + 1):
        out = tmp_path / f"out{at}"
        killed(home, out, at)
        held = names(out)
        assert len(held) == max(0, at - 1 - published) and INDEX not in held
        if held:
            assert "is not empty" in run(home, out).stderr
        assert run(home, out, *(["--overwrite"] if held else [])).exit_code == 0
        assert content(out) == wanted


@pytest.mark.parametrize("limit", [5000, 14_000], ids=["first block", "later"])
def test_a_limit_of_the_system_itself(home, tmp_path, limit):
    """The kernel cuts a write short and refuses the next, as it does where a disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        refused = run(home, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.exit_code == 2 and not (tmp_path / "out").exists()
    assert f"File too large at byte {limit}" in refused.stderr and "model-0000" in refused.stderr
    assert "Traceback" not in refused.output
    assert run(home, tmp_path / "out").exit_code == 0
    assert content(tmp_path / "out") == content(home / "good")
