"""What ``bench/device.sh`` measures, one part a process: ``python -m pykernels.bench.gpu PART --out FILE``.

PART is table, peers, llama, softmax or lora. The file is written anew after every row, so that a part that is
stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pykernels.bench import (
    gpu_cases,
    gpu_llama,
    gpu_lora,
    gpu_lora_merge,
    gpu_lora_whole,
    gpu_peers,
    gpu_softmax,
    gpu_table,
)
from pykernels.bench.gpu_clock import Clock, clock_of
from pykernels.bench.report import rounded

Part = dict[str, Any]


def measure(part: str, clock: Clock, left: Callable[[], float], save: Callable[[Part], None]) -> Part:
    """One part of a run; ``save`` gets what there is so far."""
    if part == "llama":
        found = gpu_llama.measure(clock, left=left)
        save(found)
        return found
    if part == "table":
        return collect(gpu_table.measure(gpu_cases.table(), clock, left=left), save)
    if part == "softmax":
        return collect(gpu_softmax.measure(gpu_cases.softmax(), clock, left=left), save)
    if part == "lora":
        return collect(_lora(clock, left), save)
    return collect(gpu_peers.measure(gpu_cases.PEERS, clock, left=left), save)


def _lora(clock: Clock, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Layers in inference, merges, training steps and the rest, and the layers' compiled rivals last."""
    yield from gpu_lora.measure(gpu_lora.CASES[: gpu_lora.FIRST], clock, left=left)
    yield from gpu_lora_merge.measure(clock, left=left)
    yield from gpu_lora_whole.measure(clock, left=left)
    yield from gpu_lora.measure(gpu_lora.CASES[gpu_lora.FIRST :], clock, left=left)
    yield from gpu_lora.measure(gpu_lora.COMPILED, clock, left=left)


def collect(rows: Iterable[dict[str, Any]], save: Callable[[Part], None]) -> Part:
    """All rows, saved and printed one by one."""
    found: Part = {"rows": []}
    for row in rows:
        found["rows"].append(row)
        save(found)
        print(line(row), flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    """A row of the table or of the peers in the terminal."""
    parts = [f"{row['name']:<60}"]
    for backend, column in row.get("backends", {}).items():
        parts.append(f"{backend} {_figure(column)}")
    for peer in row.get("peers", ()):
        parts.append(f"{peer['name']} {peer['x']:.3g}x" if "x" in peer else f"{peer['name']} -")
    return "  ".join([*parts, row.get("left_out", "")]).rstrip()


def _figure(column: dict[str, Any]) -> str:
    if "ms" not in column:
        return "failed"
    if "over" in column:
        return f"{column['ms']:8.4f} ms {column['over']:.3f}x base"
    return f"{column['ms']:8.4f} ms {100 * column['of_copy']:4.0f} %"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one part and write it; 1 where a kernel of ours failed or gave other bits than the CPU's."""
    parser = argparse.ArgumentParser(prog="python -m pykernels.bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("table", "peers", "llama", "softmax", "lora"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=120.0, help="after which no new row is begun")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args(arguments)
    end = time.monotonic() + given.seconds

    def save(found: Part) -> None:
        given.out.write_text(json.dumps(rounded(found), indent=1) + "\n")

    found = measure(given.part, clock_of(given.device), lambda: end - time.monotonic(), save)
    failures = list(failed(found))
    for text in failures:
        print(f"FAILED {text}")
    return int(bool(failures))


def failed(found: Part) -> Iterable[str]:
    """Our own kernels' failures: a peer's are findings."""
    tables = [(row["name"], row.get("backends", {})) for row in found.get("rows", ())]
    tables += list(found.get("methods", {}).items())
    for name, columns in tables:
        for backend, column in columns.items():
            if "error" in column:
                yield f"{name} on {backend}: {column['error']}"


if __name__ == "__main__":
    raise SystemExit(main())
