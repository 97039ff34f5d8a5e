"""The paper's sweep: its algorithms agree with the reference, and a run becomes a table and a picture."""

from __future__ import annotations

import shutil

import pytest
import torch

from pykernels.bench import softmax_sweep as sweep

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@NEEDS_COMPILER
@pytest.mark.parametrize("n", [64, 4032, 65_536])
def test_every_algorithm_gives_softmax(n):
    x, out = torch.randn(1, n, generator=torch.Generator().manual_seed(1)) * 3, torch.empty(1, n)
    calls = sweep.contenders(x, out, sweep.compiled())
    assert set(calls) == {sweep.COPY, sweep.OURS, sweep.TORCH, *sweep.FORMS}
    sweep.compare(calls, x, out)


def test_a_wrong_algorithm_is_caught():
    x, out = torch.randn(1, 64), torch.empty(1, 64)
    calls = {"wrong": lambda: torch.softmax(x * 1.1, -1, out=out)}
    with pytest.raises(RuntimeError, match="wrong on 64 elements is off by"):
        sweep.compare(calls, x, out)


def test_a_run_is_printed_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "compiled", dict)
    threads = torch.get_num_threads()
    try:
        assert sweep.main(["--out", str(tmp_path), "--largest", "4000"]) == 0
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "no C++ compiler" in said and "1,024" in said and "4,032" in said
    assert (tmp_path / "softmax_sweep.json").is_file() and (
        tmp_path / "softmax_sweep.png"
    ).stat().st_size > 9999
