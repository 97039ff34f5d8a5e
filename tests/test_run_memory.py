"""The bound on anonymous memory, measured in a fresh process while it merges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.adapter_files import factors, write_adapter
from tests.checkpoints import load, recipe, same, write_model

MEASURE = """
import sys, threading, time, torch
def anonymous():
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("RssAnon"))
def peak(run):
    highest, stop = [0], threading.Event()
    def watch():
        while not stop.is_set():
            highest[0] = max(highest[0], anonymous())
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    run()
    stop.set()
    thread.join()
    return highest[0]
torch.randn(10).sort()
"""
MERGE = """
import pykernels.engine.run as run
recipe, out, memory = sys.argv[1:]
before = anonymous()
print(peak(lambda: run.merge(recipe, out, memory=memory)) - before)
"""
EXTRACT = """
from pykernels.adapters.extract import extract
def run(home):
    return peak(lambda: extract(f"{home}/base", f"{home}/tuned", f"{home}/out", rank=2))
few, many = map(run, sys.argv[1:])
print(many - few)
"""


def measured(code: str, *arguments: object, **environment: str) -> int:
    """What a measurement prints in a fresh process."""
    command = [sys.executable, "-c", MEASURE + code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return int(done.stdout)


def grown(made: dict[str, Any], out: Path, memory: str) -> int:
    """Bytes of anonymous memory that a merge in a fresh process takes."""
    path = out.parent / "recipe.yml"
    path.write_text(json.dumps(made))
    return measured(MERGE, path, out, memory)


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


def test_roundings_of_peft_take_no_more_for_more_adapters_and_layers(tmp_path: Path) -> None:
    modules = [f"model.layers.{i}.q_proj" for i in range(6)]
    weight = torch.randn(2000, 2000)
    write_model(tmp_path / "base", {f"{m}.weight": (weight + i).bfloat16() for i, m in enumerate(modules)})
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        tensors |= factors(module, 2000, 2000)
    write_adapter(tmp_path / "a", tensors)
    model = {"model": "+".join([str(tmp_path / "base"), *[str(tmp_path / "a")] * 3])}
    made = {"merge_method": "passthrough", "models": [model], "rounding": "peft"}
    assert grown(made, tmp_path / "out", "64MB") <= 64_000_000 + 10_000_000


def test_an_extraction_takes_no_more_for_more_layers(tmp_path: Path) -> None:
    """One layer's difference at a time. Blocks of 64 KiB or more go back at once, as the heap's gaps would
    hide what is held.
    """
    random = torch.Generator().manual_seed(1)
    low = torch.randn(600, 2, generator=random) @ torch.randn(2, 800, generator=random)
    for layers in (2, 8):
        for name, change in (("base", 0.0), ("tuned", 0.1)):
            weights = (torch.eye(600, 800) * i + change * low for i in range(layers))
            state = {f"model.layers.{i}.q_proj.weight": weight for i, weight in enumerate(weights)}
            write_model(tmp_path / str(layers) / name, state)
    more = measured(EXTRACT, tmp_path / "2", tmp_path / "8", MALLOC_MMAP_THRESHOLD_="65536")
    assert more <= low.nbytes
