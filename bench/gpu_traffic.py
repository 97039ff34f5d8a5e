"""Bytes that a training step of a LoRA layer moves to and from a device's memory, counted by Nsight Compute.

``python -m pykernels.bench.gpu_traffic NCU --out FILE`` runs itself under that tool, a process per contender.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pykernels
from pykernels.bench import gpu_lora, lora_layers, lora_rivals
from pykernels.bench.lora_layers import Layer, Options

SHAPE = (4096, 4096)
OPTIONS: Options = {"rows": 8192, "rank": 16, "step": True, "dropout": 0.1}
RIVALS = (lora_rivals.SCHEME, "lorafusion")
_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_COUNT = (
    "--csv", "--print-units", "base", "--metrics", ",".join(_METRICS), "--profile-from-start", "off",
    "--clock-control", "none",
)  # fmt: skip
"""The device's clocks stay as they are: bytes do not depend on them."""


def step(who: str, device: str, shape: tuple[int, int] = SHAPE, options: Options = OPTIONS) -> None:
    """One forward and backward pass of a contender, compiled and loaded before the tool is told to look."""
    c = lora_layers.make(shape, torch.bfloat16, options, device=device)
    run = _call(who, c, options)
    run()
    if device == "cpu":
        run()
        return
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def _call(who: str, c: Layer, options: Options) -> Callable[[], object]:
    if who in RIVALS:
        return lora_rivals.rival(who, c, options)

    def ours() -> None:
        with pykernels.use_backend(who):
            lora_layers.ours(c, options)

    return ours


def counted(printed: str) -> int:
    """Bytes read and written by all kernels in what the tool printed. RuntimeError where it has no counts."""
    lines = printed.splitlines()
    heads = [i for i, line in enumerate(lines) if '"Metric Name"' in line]
    if not heads:
        raise RuntimeError("no counts: " + " ".join(lines[-3:])[:200])
    rows = csv.DictReader(lines[heads[0] :])
    found = [row["Metric Value"].replace(",", "") for row in rows if row["Metric Name"] in _METRICS]
    return round(sum(map(float, found)))


def measure(ncu: str, save: Callable[[dict[str, Any]], None], seconds: float = math.inf) -> dict[str, Any]:
    """Bytes by contender, or an error in their place; none is begun after so many seconds."""
    end = time.monotonic() + seconds
    found: dict[str, Any] = {
        "about": f"{OPTIONS['rows']} x {SHAPE[0]} x {SHAPE[1]}",
        "bytes": {},
        "errors": {},
    }
    ours = [who for who in gpu_lora.able() if who != "torch"]
    for who in (*ours, *RIVALS, "torch"):
        if time.monotonic() > end:
            break
        child = [sys.executable, "-m", "pykernels.bench.gpu_traffic", "--step", who]
        done = subprocess.run([ncu, *_COUNT, *child], capture_output=True, text=True, check=False)
        try:
            found["bytes"][who] = counted(done.stdout + done.stderr)
        except RuntimeError as error:
            found["errors"][who] = str(error)
            print(f"{who}: {error}", flush=True)
        save(found)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and write; 1 where nothing could be counted."""
    parser = argparse.ArgumentParser(prog="python -m pykernels.bench.gpu_traffic")
    parser.add_argument("ncu", nargs="?", default="ncu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", help="the contender to run: what the tool watches")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf)
    given = parser.parse_args(arguments)
    if given.step:
        step(given.step, given.device)
        return 0
    found = measure(given.ncu, partial(_save, given.out), given.seconds)
    return int(not found["bytes"])


def _save(out: Path, found: dict[str, Any]) -> None:
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
