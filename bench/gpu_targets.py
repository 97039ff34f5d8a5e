"""What a run on one H200 has to reach, as data, and whether it did.

``python -m pykernels.bench.gpu_targets RUN OUT`` judges the run in one file, prints it and writes the other.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykernels.bench import gpu_lora_targets, turns
from pykernels.bench.turns import Middle

Run = dict[str, Any]
Found = Iterator[tuple[str, float | Middle]]


@dataclass(frozen=True)
class Target:
    """A bound on figures of a run: at least ``must`` ("least") or at most, and what is hoped for.

    ``figures``: (name, value) of every row that it holds for, each on its faster backend; a value that was
    measured by pairs has its interval, and the bound must lie outside of that.
    """

    about: str
    unit: str
    least: bool
    must: float
    aim: float | None
    figures: Callable[[Run], Found]

    def judge(self, run: Run) -> dict[str, Any]:
        """The worst figure and whether it is within the bound; None, with the reason, where nobody knows."""
        found = [(name, _interval(value)) for name, value in self.figures(run)]
        row: dict[str, Any] = {"about": self.about, "unit": self.unit, "must": self.must, "aim": self.aim}
        row["least"] = self.least
        if not found:
            return row | {"met": None, "why": "not measured"}
        name, worst = min(found, key=lambda item: item[1].low if self.least else -item[1].high)
        met = self._all_within([value for _, value in found], self.must)
        row |= {"met": met, "worst": name, "value": worst.value, "rows": len(found)}
        row["aim_met"] = self.aim and self._all_within([value for _, value in found], self.aim)
        if worst.low < worst.high:
            row |= {"low": worst.low, "high": worst.high}
        if met is None:
            row["why"] = f"not resolved ({worst.value:.3g}, {worst.low:.3g} to {worst.high:.3g}, {name})"
        return row

    def _all_within(self, values: Sequence[Middle], bound: float) -> bool | None:
        said = [value.within(bound, least=self.least) for value in values]
        return False if False in said else None if None in said else True


def _interval(value: float | Middle) -> Middle:
    return value if isinstance(value, Middle) else Middle(value, value, value, turns.ROUNDS)


def _rows(*ops: str) -> Callable[[Run], Iterator[dict[str, Any]]]:
    def rows(run: Run) -> Iterator[dict[str, Any]]:
        for row in run.get("table", {}).get("rows", ()):
            if row["op"] in ops and row["dtype"] == "bfloat16" and row["n"] == 3 and "fastest" in row:
                yield row

    return rows


def _share(*ops: str) -> Callable[[Run], Found]:
    """Percent of the copy's bandwidth, by the least bytes of one pass."""
    return lambda run: ((r["name"], 100 * r["backends"][r["fastest"]]["of_copy"]) for r in _rows(*ops)(run))


def _reads(*ops: str) -> Callable[[Run], Found]:
    """Times of one read of the inputs at the copy's bandwidth."""
    return lambda run: ((r["name"], 1 / r["backends"][r["fastest"]]["of_copy"]) for r in _rows(*ops)(run))


def _whole(run: Run) -> Found:
    """Milliseconds of the whole layout by TIES."""
    for title, columns in run.get("llama", {}).get("methods", {}).items():
        ms = [c["ms"] for c in columns.values() if "ms" in c]
        if title.startswith("ties") and ms:
            yield title, min(ms)


def _softmax(run: Run, op: str, least: int = 0, most: int = 1 << 40) -> Iterator[dict[str, Any]]:
    """Rows of softmax by their length; those with a temperature are few rows of a vocabulary."""
    for row in run.get("softmax", {}).get("rows", ()):
        if row["op"] == op and "fastest" in row and least <= row["length"] <= most:
            yield row


def _softmax_share(least: int, most: int) -> Callable[[Run], Found]:
    """Percent of the copy's bandwidth, of tensors that no cache holds."""
    return lambda run: (
        (r["name"], 100 * r["backends"][r["fastest"]]["of_copy"])
        for r in _softmax(run, "softmax", least, most)
        if "temperature" not in r["name"]
    )


def _softmax_ratio(peer: str, op: str, least: int = 0) -> Callable[[Run], Found]:
    return lambda run: (
        (r["name"], p["x"])
        for r in _softmax(run, op, least)
        for p in r["peers"]
        if p["name"] == peer and "x" in p
    )


def _ratio(peer: str, op: str) -> Callable[[Run], Found]:
    """How many times longer a peer takes; nothing where it did not run."""

    def figures(run: Run) -> Found:
        for row in run.get("peers", {}).get("rows", ()):
            for other in row["peers"]:
                if row["op"] == op and other["name"] == peer and "x" in other:
                    yield row["name"], other["x"]

    return figures


TARGETS = (
    Target("linear_merge, task_arithmetic, the TIES merge pass", "% of copy", True, 85, 93,
           _share("linear_merge", "task_arithmetic", "ties_pass")),
    Target("dare_merge", "% of copy", True, 60, 85, _share("dare_merge")),
    Target("kth_magnitude, 3 models", "x one read", False, 1.7, 1.2, _reads("kth_magnitude")),
    Target("ties_merge as a whole", "% of the one-pass ideal", True, 40, 60, _share("ties_merge")),
    Target("whole 8B layout, TIES, one CUDA graph", "ms", False, 80, 50, _whole),
    Target("against mergekit's TIES", "x", True, 30, None, _ratio("mergekit", "ties_merge")),
    Target("against mergekit's DARE", "x", True, 8, None, _ratio("mergekit", "dare_merge")),
    Target("softmax, rows of 1024 to 131072", "% of copy", True, 85, 92, _softmax_share(1024, 131_072)),
    Target("softmax, rows of 262144", "% of copy", True, 80, None, _softmax_share(262_144, 262_144)),
    Target("softmax against torch, rows of 4096 or more", "x", True, 1.3, None,
           _softmax_ratio("torch", "softmax", 4096)),
    Target("softmax against torch.compile, rows of 128k or more", "x", True, 1.4, None,
           _softmax_ratio("torch.compile", "softmax", 1 << 17)),
    Target("softmax with temperature against copy, scale, torch", "x", True, 3, None,
           _softmax_ratio("copy, scale, torch", "softmax")),
    Target("softmax_backward against torch", "x", True, 1.5, None,
           _softmax_ratio("torch", "softmax_backward")),
    *(Target(*row) for row in gpu_lora_targets.ROWS),
)  # fmt: skip
"""On one H200, against the copy bandwidth measured in that run; merges of base + 3 tuned in bfloat16."""


def judge(run: Run) -> list[dict[str, Any]]:
    """Every target against the run; they are set for an H200, another device is judged by them too."""
    return [target.judge(run) for target in TARGETS]


def fastest(run: Run) -> dict[str, str]:
    """The backend that each op should take, by the geometric mean of the times of rows that all have."""
    times: dict[str, list[dict[str, float]]] = {}
    for part in ("table", "softmax", "lora"):
        for row in run.get(part, {}).get("rows", ()):
            ms = {b: c["ms"] for b, c in row["backends"].items() if "ms" in c}
            times.setdefault(row["op"], []).append(ms)
    found = {}
    for op, rows in times.items():
        able = {backend for ms in rows for backend in ms}
        common = [ms for ms in rows if able <= ms.keys()]
        if len(able) > 1 and common:
            found[op] = min(sorted(able), key=lambda b: sum(math.log(ms[b]) for ms in common))
    return found


def words(row: dict[str, Any]) -> str:
    """One target as a line."""
    bound = f"{'>=' if row['least'] else '<='} {row['must']:g} {row['unit']}"
    if row["met"] is None:
        return f"{row['about']}: {bound}: {row['why']}"
    return (
        f"{row['about']}: {bound}: {'met' if row['met'] else 'NOT MET'} ({row['value']:.3g}, {row['worst']})"
    )


def main(arguments: Sequence[str]) -> int:
    """Judge a run: {"rows": one per target, "fastest": the backend per op}."""
    run = json.loads(Path(arguments[0]).read_text())
    judged = {"rows": judge(run), "fastest": fastest(run)}
    Path(arguments[1]).write_text(json.dumps(judged, indent=1) + "\n")
    print("\n".join(map(words, judged["rows"])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
