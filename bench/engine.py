"""Whole checkpoints: the engine against ``cat`` of three files and ``cp`` of one, which moves the same bytes.

Hot, cold and flushed to the disk, in turns within one run; then the whole process against mergekit's.
``python -m pykernels.bench.engine [--large]`` runs this part alone.
"""

from __future__ import annotations

import os
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

from pykernels.bench.llama import Layout, write

ROUNDS = 5
MERGE = [sys.executable, "-m", "pykernels.cli", "merge"]
_ENGINE_TIME = re.compile(r"engine time ([\d.]+) s")

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
        memory = {m: _anonymous(place, m) for m in ("linear", "ties")}
    for row in rows:
        say(f"{row['name']}: {row['seconds']:.2f} s, {row['ratio']:.2f} x {row['against']} ({row['target']})")
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
                _drop(files) if state == "cold" else _warm(files)
                seconds[call].append(run())
        control = statistics.median(seconds["copy"])
        against = "cat 3 + cp 1" + (" + fsync" if durable else "")
        for method, target in targets.items():
            rows.append(
                _row(f"{method}, {state}", statistics.median(seconds[method]), against, control, target)
            )
    return rows


def _processes(place: Path) -> list[dict[str, Any]]:
    """Whole processes: what start-up costs, and mergekit on the same recipe."""
    whole, engine, bare = [], [], []
    for _ in range(3):
        inner, outer = _merge(place, "ties", False)
        whole.append(outer)
        engine.append(inner)
        bare.append(_seconds([sys.executable, "-c", "import torch"]))
    start = statistics.median(w - e for w, e in zip(whole, engine, strict=True))
    torch = statistics.median(bare)
    rows = [_row("start-up", start, "import torch", torch, f"<= 0.3 s beyond it (is {start - torch:.2f} s)")]
    peer = Path(sys.executable).with_name("mergekit-yaml")
    if peer.exists():
        took = _seconds(
            [str(peer), str(place / "ties.yml"), str(place / "peer"), "--quiet", "--no-copy-tokenizer"]
        )
        ours = statistics.median(whole)
        rows.append(_row("mergekit-yaml, ties, whole process", took, "pykernels merge", ours, ">= 40"))
    return rows


def _row(name: str, seconds: float, against: str, control: float, target: str) -> dict[str, Any]:
    return {
        "name": name, "seconds": seconds, "against": against, "control": control, "ratio": seconds / control,
        "target": target,
    }  # fmt: skip


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def copy_seconds(place: Path, files: list[Path], *, durable: bool = False) -> float:
    """Seconds of ``cat`` of all files but the first and ``cp`` of the first: the bytes of a merge."""
    out = place / "copied"
    out.unlink(missing_ok=True)
    start = time.perf_counter()
    subprocess.run(["cat", *map(str, files[1:])], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cp", str(files[0]), str(out)], check=True)
    if durable:
        _sync(out)
    took = time.perf_counter() - start
    out.unlink()
    return took


def _merge_seconds(place: Path, method: str, durable: bool) -> float:
    return _merge(place, method, durable)[0]


def _merge(place: Path, method: str, durable: bool) -> tuple[float, float]:
    """Engine seconds as the command prints them, and the seconds of the whole process."""
    out = place / "merged"
    shutil.rmtree(out, ignore_errors=True)
    command = [*MERGE, str(place / f"{method}.yml"), str(out), *(["--durable"] if durable else [])]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    took = time.perf_counter() - start
    shutil.rmtree(out)
    return engine_seconds(done.stdout), took


def engine_seconds(printed: str) -> float:
    """The engine time in what ``pykernels merge`` printed."""
    found = _ENGINE_TIME.search(printed)
    if found is None:
        raise RuntimeError(f"the merge printed no engine time: {printed}")
    return float(found.group(1))


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


def _warm(files: list[Path]) -> None:
    subprocess.run(["cat", *map(str, files)], check=True, stdout=subprocess.DEVNULL)


def _drop(files: list[Path]) -> None:
    """Out of the page cache, which needs them on the disk first."""
    for file in files:
        _sync(file)
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    measure(large="--large" in sys.argv[1:])
