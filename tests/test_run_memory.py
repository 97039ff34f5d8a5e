"""The bound on anonymous memory, measured in a fresh process while it merges."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.adapter_files import factors, write_adapter
from tests.checkpoints import load, recipe, same, write_model

MEASURE = """
import sys, threading, time, torch
import pykernels.engine.run as run
def anonymous():
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("RssAnon"))
recipe, out, memory = sys.argv[1:]
pykernels_ready = torch.randn(10).sort()
peak, stop = [0], threading.Event()
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
run.merge(recipe, out, memory=memory)
stop.set()
thread.join()
print(peak[0] - before)
"""


def grown(made: dict[str, Any], out: Path, memory: str) -> int:
    """Bytes of anonymous memory that a merge in a fresh process takes."""
    path = out.parent / "recipe.yml"
    path.write_text(json.dumps(made))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(out), memory],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_anonymous_memory(tmp_path: Path) -> None:
    largest = 16_000_000
    for layers in (2, 8):
        for name in ("base", "t0", "t1"):
            values = torch.randn(2000, 4000)
            state = {f"model.layers.{i}.w": (values + i).bfloat16() for i in range(layers)}
            write_model(tmp_path / str(layers) / name, state)
    made = {layers: recipe(tmp_path / f"{layers}", "ties", tuned=2) for layers in (2, 8)}
    few = grown(made[2], tmp_path / "2" / "out", "2GB")
    many = grown(made[8], tmp_path / "8" / "out", "2GB")
    assert many <= 3 * largest + 100_000_000 and many <= few + 16_000_000
    assert grown(made[2], tmp_path / "2" / "small", "8MB") <= 8_000_000 + 24_000_000
    assert same(load(tmp_path / "2" / "out"), load(tmp_path / "2" / "small"))


def test_adapters_take_no_more(tmp_path: Path) -> None:
    """A tensor of four times the bound, merged with an adapter, alone and as one of two models."""
    write_model(tmp_path / "base", {"model.q_proj.weight": torch.randn(4000, 4000).bfloat16()})
    write_adapter(tmp_path / "a", factors("model.q_proj", 4000, 4000))
    model = {"model": f"{tmp_path / 'base'}+{tmp_path / 'a'}"}
    alone = {"merge_method": "passthrough", "models": [model]}
    assert grown(alone, tmp_path / "alone", "8MB") <= 8_000_000 + 24_000_000
    base = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "parameters": {"weight": 1},
    }
    assert grown({**base, "models": [model]}, tmp_path / "two", "8MB") <= 8_000_000 + 24_000_000
    assert same(load(tmp_path / "alone"), load(tmp_path / "two"))


def test_roundings_of_peft_take_no_more_for_more_adapters(tmp_path: Path) -> None:
    write_model(tmp_path / "base", {"model.q_proj.weight": torch.randn(2000, 2000).bfloat16()})
    write_adapter(tmp_path / "a", factors("model.q_proj", 2000, 2000))
    model = {"model": "+".join([str(tmp_path / "base"), *[str(tmp_path / "a")] * 8])}
    made = {"merge_method": "passthrough", "models": [model], "rounding": "peft"}
    assert grown(made, tmp_path / "out", "64MB") <= 64_000_000 + 24_000_000
