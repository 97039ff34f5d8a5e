"""The walls around buffers: results come through them unchanged, and whatever oversteps is seen."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import walls
from tests.bounds import assert_same_bits
from tests.cases import make

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
ROOT = Path(__file__).resolve().parent.parent
OVERRUN = """
import sys, torch
from tests import walls
extension, place = sys.argv[1:]
walls.PLACES = (int(place) if place.isdigit() else place,)
kernels = walls.load(extension)
tensor = torch.ones(37, dtype=torch.bfloat16)
stage = walls.Stage("overrun")
here = stage.put(tensor.data_ptr(), 2 * 37)
print("finite:", kernels.count_nonfinite(1, here, 37 + int(sys.stdin.read())))
"""


def overrun(place: str, elements: int) -> subprocess.CompletedProcess[str]:
    """A process in which a kernel is told that 37 elements are so many more."""
    return subprocess.run(
        [sys.executable, "-c", OVERRUN, native._C.__file__, place],
        input=str(elements),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_kernel_is_behind_walls():
    public = {name for name in vars(native._C) if not name.startswith("_")}
    assert public == set(walls.LAYOUT) | walls.WITHOUT_TENSORS | walls.ELSEWHERE


@pytest.mark.parametrize("place", walls.PLACES)
def test_results_come_through_the_walls(place, monkeypatch):
    monkeypatch.setattr(walls, "PLACES", (place,))
    base, tuned = make("gaussian", 70_001, 3, torch.bfloat16)
    wanted = torch.full_like(base, math.nan)
    native.linear_merge(wanted, base, tuned, [0.5, 0.25, 0.125])
    monkeypatch.setattr(native, "_C", walls.Walled(native._C))
    in_place = base.clone()
    native.linear_merge(in_place, in_place, tuned, [0.5, 0.25, 0.125])
    assert_same_bits(in_place, wanted)


@pytest.mark.parametrize("beside", [-1, 40])
def test_a_write_beside_a_buffer_is_seen(beside, monkeypatch):
    monkeypatch.setattr(walls, "PLACES", (7,))
    wrong = ModuleType("wrong")
    wrong.count_nonfinite = lambda dtype, data, numel: setattr(
        ctypes.c_char.from_address(data + beside), "value", b"x"
    )
    tensor = torch.ones(10)
    with pytest.raises(AssertionError, match="count_nonfinite: wrote beside a buffer of 40 bytes"):
        walls.Walled(wrong).count_nonfinite(0, tensor.data_ptr(), 10)


def test_an_overrun_is_fatal():
    assert overrun("end", 0).stdout == "finite: 0\n"
    died = overrun("end", 1)
    assert died.returncode != 0 and not died.stdout


@pytest.mark.skipif(not walls.asan(), reason="only AddressSanitizer guards single bytes (make sanitize)")
@pytest.mark.parametrize("place", ["start", "7"])
def test_an_overrun_by_one_element_is_fatal_anywhere(place):
    died = overrun(place, 1)
    assert "AddressSanitizer: use-after-poison" in died.stderr and not died.stdout
