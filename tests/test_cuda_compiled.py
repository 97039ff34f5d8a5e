"""The CUDA kernels as nvcc compiled them: all architectures, nothing spilled; importing needs no driver."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pykernels.bench import registers

BUILT = registers.built() is not None
REQUIRED = os.environ.get("PYKERNELS_REQUIRE_CUDA") == "1"
needs_nvcc = pytest.mark.skipif(not BUILT and not REQUIRED, reason="no nvcc built pykernels._cuda here")


@needs_nvcc
def test_every_kernel_is_compiled_for_every_architecture_and_none_spills(capsys):
    assert registers.main() == 0, capsys.readouterr().err
    table = capsys.readouterr().out
    assert "merge<bf16, KeepLarge, Weighted>" in table and "sample<float>" in table
    assert len(table.splitlines()) > 30


@needs_nvcc
def test_the_module_imports_without_a_device():
    code = "from pykernels import _cuda; print(_cuda.memory(), _cuda.unavailable())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("cuda ") and ("no CUDA device" in said or said == "cuda None\n")


SAID = """
arch = sm_90
 Function _ZN2pk4cuda5mergeINS_4bf16ENS0_9KeepLargeENS0_8WeightedEEEvNS0_5TableE:
  REG:79 STACK:8 SHARED:3208 LOCAL:0
 Function _ZN2pk4cuda49_GLOBAL__N__3abff190_16_kth_magnitude_cu_7ebd7bad6sampleIfEEvNS0_5TableE:
  REG:40 STACK:0 SHARED:8464 LOCAL:0
"""


def test_a_spill_and_a_missing_architecture_are_seen(monkeypatch, capsys, tmp_path):
    assert registers.usage(SAID) == {
        "merge<bf16, KeepLarge, Weighted>": {"sm_90": (79, 8)},
        "sample<float>": {"sm_90": (40, 0)},
    }
    monkeypatch.setattr(registers, "built", lambda: tmp_path)
    monkeypatch.setattr(
        registers.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout=SAID)
    )
    assert registers.main() == 1
    said = capsys.readouterr().err
    assert "merge<bf16, KeepLarge, Weighted>: sm_90: (79, 8)" in said and "sample<float>: sm_80: None" in said
    monkeypatch.setenv("CUDAARCHS", "90-real")
    assert registers.main() == 1
    assert "sm_80" not in (said := capsys.readouterr().err) and "sm_90: (79, 8)" in said


def test_without_the_module_the_table_says_so(monkeypatch, capsys):
    monkeypatch.setattr(registers, "built", lambda: None)
    for variable in ("PYKERNELS_CUDA", "PYKERNELS_REQUIRE_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    assert registers.main() == 2 and "is not built" in capsys.readouterr().err
    monkeypatch.setenv("PYKERNELS_REQUIRE_CUDA", "0")  # somebody meant it
    assert registers.main() == 0 and "left out" in capsys.readouterr().out
