"""Whole checkpoints: the engine against ``cat`` of three files and ``cp`` of one, which moves the same bytes.

Hot, cold and flushed to the disk, in turns within one run; then the whole process against mergekit's; then
adapters (`engine_lora`). ``python -m pykernels.bench.engine [--large]`` runs this part alone.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pykernels.bench import engine_lora
from pykernels.bench.engine_clock import (
    ROUNDS,
    copy_seconds,
    drop,
    merge_seconds,
    print_rows,
    process_seconds,
    row,
    warm,
)
from pykernels.bench.llama import Layout, write

MERGE = [sys.executable, "-m", "pykernels.cli", "merge"]

_HOT = {"linear": "<= 1.2 (aim 0.9)", "ties": "<= 1.6 (aim 1.2)"}
_COLD = {"linear": "<= 1.2", "ties": "<= 1.4"}
_DURABLE = {"linear": "<= 1.1", "ties": "<= 1.1"}


def recipes(models: list[Path]) -> dict[str, dict[str, Any]]:
    """Base and three tuned models, by name of the method."""
    each: Mapping[str, dict[str, float]] = {
        "linear": {"weight": 0.25},
        "ties": {"weight": 0.3333, "density": 0.5},
    }
    made: dict[str, dict[str, Any]] = {}
    for method, parameters in each.items():
        members = models if method == "linear" else models[1:]
        made[method] = {
            "merge_method": method,
            "base_model": str(models[0]),
            "models": [{"model": str(m), "parameters": parameters} for m in members],
            "dtype": "bfloat16",
        }
    return made


def measure(
    *, large: bool = False, folder: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """All end-to-end rows: name, seconds, what it is held against, its seconds, ratio, target."""
    layout = replace(Layout(), layers=21) if large else Layout()
    with tempfile.TemporaryDirectory(dir=folder, prefix="pykernels-bench-") as name:
        place = Path(name)
        models = write(place / "models", layout)
        for method, recipe in recipes(models).items():
            (place / f"{method}.yml").write_text(yaml.safe_dump(recipe))
        rows = [*_against_copy(place, models), *_processes(place)]
        rows += engine_lora.measure(place, models[0], layout)
        memory = {m: _anonymous(place, m) for m in ("linear", "ties")}
    print_rows(rows, say)
    for method, peak in memory.items():
        say(f"{method}: anonymous memory {peak:.0f} MB at its peak")
    about = f"base + 3 tuned, {layout.nbytes / 1e9:.2f} GB each, Llama layout, bfloat16"
    return {"about": about, "rows": rows, "anonymous_mb": memory}


def _against_copy(place: Path, models: list[Path]) -> list[dict[str, Any]]:
    """Engine time against cat + cp: hot, cold, and with everything flushed."""
    files = [m / "model.safetensors" for m in models]
    rows = []
    for state, targets, durable in (
        ("hot", _HOT, False),
        ("cold", _COLD, False),
        ("hot, durable", _DURABLE, True),
    ):
        calls: dict[str, Callable[[], float]] = {
            "copy": partial(copy_seconds, place, files, durable=durable),
            **{method: partial(_merge_seconds, place, method, durable) for method in targets},
        }
        seconds: dict[str, list[float]] = {call: [] for call in calls}
        for _ in range(ROUNDS):
            for call, run in calls.items():
                drop(files) if state == "cold" else warm(files)
                seconds[call].append(run())
        control = statistics.median(seconds["copy"])
        against = "cat 3 + cp 1" + (" + fsync" if durable else "")
        for method, target in targets.items():
            rows.append(
                row(f"{method}, {state}", statistics.median(seconds[method]), against, control, target)
            )
    return rows


def _processes(place: Path) -> list[dict[str, Any]]:
    """Whole processes: what start-up costs, and mergekit on the same recipe."""
    whole, engine, bare = [], [], []
    for _ in range(3):
        inner, outer = merge_seconds([*MERGE, str(place / "ties.yml")], place / "merged")
        whole.append(outer)
        engine.append(inner)
        bare.append(process_seconds([sys.executable, "-c", "import torch"]))
    start = statistics.median(w - e for w, e in zip(whole, engine, strict=True))
    torch = statistics.median(bare)
    rows = [row("start-up", start, "import torch", torch, f"<= 0.3 s beyond it (is {start - torch:.2f} s)")]
    peer = Path(sys.executable).with_name("mergekit-yaml")
    if peer.exists():
        took = process_seconds(
            [str(peer), str(place / "ties.yml"), str(place / "peer"), "--quiet", "--no-copy-tokenizer"]
        )
        ours = statistics.median(whole)
        rows.append(row("mergekit-yaml, ties, whole process", took, "pykernels merge", ours, ">= 40"))
    return rows


def _merge_seconds(place: Path, method: str, durable: bool) -> float:
    options = ["--durable"] if durable else []
    return merge_seconds([*MERGE, str(place / f"{method}.yml")], place / "merged", *options)[0]


def _anonymous(place: Path, method: str) -> float:
    """Peak of the process's anonymous memory in MB, the interpreter and torch included."""
    out = place / "merged"
    shutil.rmtree(out, ignore_errors=True)
    process = subprocess.Popen([*MERGE, str(place / f"{method}.yml"), str(out)], stdout=subprocess.DEVNULL)
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
        peak = max(peak, int(found.group(1)) if found else 0)
        time.sleep(0.002)
    return peak * 1024 / 1e6


if __name__ == "__main__":
    measure(large="--large" in sys.argv[1:])
