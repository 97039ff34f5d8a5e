"""What is Triton's own: blocks of other sizes, launches of many tensors, words of a launch that failed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from pykernels import grouping
from pykernels.kernels import launch, table
from tests.bounds import assert_same_bits
from tests.cases import Case
from tests.where import DEVICE, nans, on_cpu, rows_of, run, there

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, at Inf and NaN
kernels = rows_of("triton")


def test_blocks_of_the_size_that_devices_run(monkeypatch):
    monkeypatch.setattr(launch, "TILE", 4096)
    monkeypatch.setattr(launch, "BLOCK", 1024)
    for case in (
        Case("linear_merge", numel=9001),
        Case("ties_merge", "ties", 9001),
        Case("dare_merge", numel=9001),
    ):
        assert_same_bits(run(kernels, case), on_cpu(case))


@pytest.mark.parametrize("op", ["linear_merge", "ties_merge", "dare_merge"])
def test_a_group_is_launched_once(op, monkeypatch):
    launches = []
    real = launch.Launch.run
    monkeypatch.setattr(
        launch.Launch, "run", lambda self, *a, **k: (launches.append(self.op), real(self, *a, **k))
    )
    group = [Case(op, numel=n, dtype=torch.float16) for n in (1, 63, 4096, 4097, 0, 40_001, 300)]
    group += [replace(case, dtype=torch.float32) for case in group[:2]]
    outs = [nans(case.numel, case.dtype) for case in group]
    with grouping.grouped():
        for case, out in zip(group, outs, strict=True):
            getattr(kernels, op)(out, *map(there, case.arguments()))
        assert not launches
    assert launches == [op] * 2
    for case, out in zip(group, outs, strict=True):
        assert_same_bits(out.cpu(), on_cpu(case))


def test_a_table_that_is_packed_from_arguments():
    words = [7, -1, 2**40, 16, -(2**62), 1, 0, 2**63 - 1] * 10
    rows = torch.zeros(len(words), dtype=torch.int64, device=DEVICE)
    launch.pack(rows, words)
    assert rows.tolist() == words and len(words) == 2 * table.WORDS


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("CUDA: invalid argument"), "CUDA: invalid"),
        (OutOfResources(9, 8, "x"), "out of resource"),
    ],
)
def test_a_failed_launch_names_op_shapes_and_error(error, words):
    class Kernel:
        def __getitem__(self, grid):
            raise error

    job = launch.Job(None, None, [torch.ones(3, 5, device=DEVICE)])
    said = rf"linear_merge: 1 tensors \(\[3, 5\]\) of 1 models .*: {words}"
    with pytest.raises(RuntimeError, match=said):
        launch.Launch("linear_merge", [job]).run(Kernel(), 1)
