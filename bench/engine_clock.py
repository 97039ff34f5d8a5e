"""Seconds of whole commands on files: merges as they print them, copies of as many bytes, processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROUNDS = 5
_ENGINE_TIME = re.compile(r"engine time ([\d.]+) s")


def row(name: str, seconds: float, against: str, control: float, target: str = "") -> dict[str, Any]:
    """One end-to-end figure, beside the seconds of what it is held against."""
    return {
        "name": name, "seconds": seconds, "against": against, "control": control, "ratio": seconds / control,
        "target": target,
    }  # fmt: skip


def print_rows(rows: Iterable[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Each row as a line."""
    for r in rows:
        target = f" ({r['target']})" if r["target"] else ""
        say(f"{r['name']}: {r['seconds']:.2f} s, {r['ratio']:.2f} x {r['against']}{target}")


def process_seconds(command: list[str]) -> float:
    """Seconds of a whole process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def copy_seconds(place: Path, files: list[Path], *, durable: bool = False) -> float:
    """Seconds of ``cat`` of all files but the first and ``cp`` of the first: the bytes of a merge."""
    out = place / "copied"
    out.unlink(missing_ok=True)
    start = time.perf_counter()
    if files[1:]:
        warm(files[1:])
    subprocess.run(["cp", str(files[0]), str(out)], check=True)
    if durable:
        _sync(out)
    took = time.perf_counter() - start
    out.unlink()
    return took


def merge_seconds(command: list[str], out: Path, *options: str) -> tuple[float, float]:
    """Engine seconds as ``command out options`` prints them, and the seconds of the whole process."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    done = subprocess.run([*command, str(out), *options], check=True, capture_output=True, text=True)
    took = time.perf_counter() - start
    shutil.rmtree(out)
    return engine_seconds(done.stdout), took


def engine_seconds(printed: str) -> float:
    """The engine time in what ``pykernels merge`` printed."""
    found = _ENGINE_TIME.search(printed)
    if found is None:
        raise RuntimeError(f"the merge printed no engine time: {printed}")
    return float(found.group(1))


def warm(files: list[Path]) -> None:
    """Into the page cache."""
    subprocess.run(["cat", *map(str, files)], check=True, stdout=subprocess.DEVNULL)


def drop(files: list[Path]) -> None:
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
