"""What LoRA has to reach on one H200: times of the frozen cuBLAS product, microseconds beyond it, rivals.

Every figure that pairs gave has its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pykernels.backends import BACKENDS
from pykernels.bench.turns import Middle

Run = dict[str, Any]
Row = dict[str, Any]
Figures = Callable[[Run], Iterator[tuple[str, float | Middle]]]


def _rows(run: Run, kind: str, **wanted: Any) -> Iterator[Row]:
    for row in run.get("lora", {}).get("rows", ()):
        if row["kind"] == kind and "fastest" in row and all(row.get(k) == v for k, v in wanted.items()):
            yield row


def _best(row: Row) -> Row:
    column: Row = row["backends"][row["fastest"]]
    return column


def _over(kind: str, least: int = 0, **wanted: Any) -> Figures:
    """Times of the base, of rows with at least as many rows of x."""

    def figures(run: Run) -> Iterator[tuple[str, float | Middle]]:
        for row in _rows(run, kind, **wanted):
            c = _best(row)
            if row["rows"] >= least:
                yield row["name"], Middle(c["over"], c["low"], c["high"], c["pairs"])

    return figures


def _more(run: Run) -> Iterator[tuple[str, float | Middle]]:
    """Microseconds beyond the base; the backend with the least of them is the fastest."""
    for row in _rows(run, "decode"):
        c = _best(row)
        yield row["name"], Middle(c["more_us"], c["more_low"], c["more_high"], c["pairs"])


def _ratio(peer: str, kind: str) -> Figures:
    """How many times longer a peer takes, or its scheme in its stead; nothing where neither ran."""

    def figures(run: Run) -> Iterator[tuple[str, float | Middle]]:
        for row in _rows(run, kind):
            for other in row["peers"]:
                if other["name"] in (peer, f"{peer} scheme") and "x" in other:
                    yield row["name"], Middle(other["x"], other["low"], other["high"], other["pairs"])

    return figures


def _figure(kind: str, key: str, scale: float = 1.0, **wanted: Any) -> Figures:
    """A plain figure of the fastest backend."""
    return lambda run: (
        (row["name"], scale * _best(row)[key]) for row in _rows(run, kind, **wanted) if key in _best(row)
    )


def _over_one(run: Run) -> Iterator[tuple[str, float | Middle]]:
    for row in _rows(run, "whole"):
        c = _best(row)
        if "over_one" in c:
            yield row["name"], Middle(c["over_one"], c["one_low"], c["one_high"], c["pairs"])


def _traffic(run: Run) -> Iterator[tuple[str, float | Middle]]:
    """GiB of our backend that moves least."""
    ours = {who: n for who, n in run.get("traffic", {}).get("bytes", {}).items() if who in BACKENDS}
    if ours:
        who = min(ours, key=ours.__getitem__)
        yield who, ours[who] / 2**30


_ONE_LAYER: dict[str, Any] = {"rank": 16, "adapters": 1}

ROWS: tuple[tuple[str, str, bool, float, float | None, Figures], ...] = (
    ("lora_linear r=16, 2048 rows or more", "x frozen", False, 1.08, 1.02, _over("forward", 2048, rank=16)),
    ("lora_linear r=64, 2048 rows or more", "x frozen", False, 1.10, 1.05, _over("forward", 2048, rank=64)),
    ("lora_linear, 512 rows", "x frozen", False, 1.12, 1.05, _over("forward", rows=512)),
    ("lora_linear r=16, 1 to 32 rows", "us beyond frozen", False, 4, 2, _more),
    ("32 rows x 32 adapters r=16", "x frozen", False, 1.5, None, _over("adapters")),
    ("forward and backward r=16", "x frozen", False, 1.12, 1.075, _over("step")),
    ("forward and backward against PEFT", "x", True, 1.25, None, _ratio("peft", "step")),
    ("the same with dropout 0.1", "x", True, 1.35, None, _ratio("peft", "step dropout")),
    ("kept for the backward pass with dropout", "bytes per element of x", False, 0.1, None,
     _figure("step dropout", "kept")),
    ("bytes to and from memory, step with dropout", "GiB", False, 1.1, 0.95, _traffic),
    ("merge_lora r=16, one 4096 x 4096 layer", "us", False, 20, 16,
     _figure("merge_lora", "ms", 1e3, **_ONE_LAYER)),
    ("merge_lora, elements not rounded rightly", "%", False, 0.01, None,
     _figure("merge_lora", "misrounded", 100)),
    ("merge_lora, all layers of 8B, 1 or 8 adapters", "ms", False, 10, 7.7, _figure("whole", "ms")),
    ("the same, 8 adapters", "x one adapter", False, 1.1, None, _over_one),
    ("dora_norm r=16, 4096 x 4096", "us", False, 10, None, _figure("dora_norm", "ms", 1e3)),
)  # fmt: skip
"""About, unit, whether at least, must, aim and figures: as ``gpu_targets.Target`` takes them."""
