"""Every Triton kernel compiled ahead of time for three generations of GPU: no spill, no fused operation, wide
loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.long
def test_no_kernel_spills_fuses_or_reads_in_short_pieces():
    """In a process of its own: whether kernels are interpreted is settled when they are defined."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "pykernels.kernels.compiled"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = {line.split()[0] for line in done.stdout.splitlines()[1:]}
    folder = Path(__file__).parent.parent / "kernels"
    text = "\n".join(path.read_text() for path in folder.glob("*.py"))
    launched = set(re.findall(r"^@triton\.jit.*\ndef (_\w+)\(", text, re.MULTILINE))
    assert {"_linear_merge", "_collect", "_softmax_whole", "_lora_finish"} <= launched == kernels
