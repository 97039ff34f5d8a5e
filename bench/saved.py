"""The file of a machine: its runs, the latest first, each with the rows that no later one measured.

A run keeps its own commit, date, versions and controls, so rows of different days stand apart and each tells
what it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Run = dict[str, Any]


def runs(loaded: dict[str, Any]) -> list[Run]:
    """The runs that a file holds: several, or itself."""
    found: list[Run] = loaded.get("runs", [loaded])
    return found


def merged(old: list[Run], new: Run, selects: Callable[[str], bool]) -> dict[str, list[Run]]:
    """``new`` before what it did not measure: rows whose names it does not select, whole checkpoints if none.

    Rows of a selected name that ``new`` lacks (renamed, or not for this machine any more) go as well.
    """
    kept = []
    for run in old:
        left = {**run, "rows": [row for row in run["rows"] if not selects(row["name"])]}
        if "engine" in new:
            left.pop("engine", None)
        if left["rows"] or "engine" in left:
            kept.append(left)
    return {"runs": [new, *kept]}
