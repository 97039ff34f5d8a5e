"""A run of ``bench/device.sh`` as Markdown: device, targets, table, a whole layout, peers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pykernels.bench import gpu_targets

Run = dict[str, Any]
Row = dict[str, Any]
_COLUMNS = ("cuda", "triton")


def markdown(run: Run) -> str:
    """All sections that the run has figures for."""
    about = run["device"]["device"] or {"name": "no device"}
    versions = run["device"]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "nvcc") if name in versions)
    driver = f", driver {about['driver_version']}" if "driver_version" in about else ""
    parts = [f"**{about['name']}**{driver}, {named}, commit {run['commit']}, {run['date']}."]
    if targets := run.get("targets"):
        parts += ["", *_targets(targets["rows"])]
    if rows := [row for row in run.get("table", {}).get("rows", ()) if "fastest" in row]:
        parts += ["", *_table(rows)]
    if rows := [row for row in run.get("softmax", {}).get("rows", ()) if "fastest" in row]:
        parts += ["", *_softmax(rows)]
    if rows := [row for row in run.get("lora", {}).get("rows", ()) if "fastest" in row]:
        parts += ["", *_lora(rows)]
    if moved := run.get("traffic", {}).get("bytes"):
        said = ", ".join(f"{who} {count / 2**30:.3f} GiB" for who, count in moved.items())
        parts += [
            "",
            f"A step with dropout 0.1, {run['traffic']['about']}, moves to and from memory: {said}.",
        ]
    if whole := run.get("llama"):
        parts += ["", *_whole(whole)]
    if rows := [row for row in run.get("peers", {}).get("rows", ()) if row["peers"]]:
        parts += ["", *_peers(rows)]
    return "\n".join(parts)


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|",
            *("| " + " | ".join(row) + " |" for row in rows)]  # fmt: skip


def _targets(rows: Sequence[Row]) -> list[str]:
    said = (gpu_targets.words(row).split(": ", 2) for row in rows)
    return _lines(("on one H200 (merges: bf16, base + 3 tuned)", "must", "is"), said)


def _column(row: Row, backend: str, share: str = "of_copy") -> tuple[str, str]:
    column = row["backends"].get(backend, {})
    if "ms" not in column:
        return "failed" if "error" in column else "", ""
    if share == "over":
        return f"{column['ms']:.4g}", f"{column['over']:.3f}"
    return f"{column['ms']:.4g}", f"{100 * column['of_copy']:.0f} %"


def _table(rows: Sequence[Row]) -> list[str]:
    copies = [row["copy_gbs"] for row in rows]
    head = ("case", *(f"{b} {unit}" for b in _COLUMNS for unit in ("ms", "of copy")))
    cells = ((row["name"], *(cell for b in _COLUMNS for cell in _column(row, b))) for row in rows)
    rates = f"{min(copies):.0f} to {max(copies):.0f} GB/s, read and written"
    return [f"Device-to-device copy in the same run: {rates}.", "", *_lines(head, cells)]


def _softmax(rows: Sequence[Row]) -> list[str]:
    head = ("case", *(f"{b} {unit}" for b in _COLUMNS for unit in ("ms", "of copy")), "faster than")
    cells = []
    for row in rows:
        beaten = ", ".join(f"{p['name']} {p['x']:.3g}x" for p in row["peers"] if "x" in p)
        cells.append((row["name"], *(cell for b in _COLUMNS for cell in _column(row, b)), beaten))
    return _lines(head, cells)


def _lora(rows: Sequence[Row]) -> list[str]:
    columns = (*_COLUMNS, "torch")
    head = ("case", "base ms", *(f"{b} {unit}" for b in columns for unit in ("ms", "x base")), "faster than")
    cells = []
    for row in rows:
        beaten = ", ".join(f"{p['name']} {p['x']:.3g}x" for p in row["peers"] if "x" in p)
        ours = (cell for b in columns for cell in _column(row, b, "over"))
        cells.append((row["name"], f"{row['base_ms']:.4g}", *ours, beaten))
    base = "Base: cuBLAS's frozen product, forward (and the gradient of x); of merges a copy of the weight, "
    return [f"{base}of the norm torch's norm of its rows.", "", *_lines(head, cells)]


def _whole(found: Row) -> list[str]:
    size = f"A whole model in memory: {found['parameters'] / 1e9:.2f} G parameters, {found['about']}"
    if "left_out" in found:
        return [f"{size}: {found['left_out']}."]
    rows = []
    for title, columns in found["methods"].items():
        ms = (f"{c['ms']:.1f}" if (c := columns.get(b, {})) and "ms" in c else "" for b in _COLUMNS)
        rows.append((title, *ms))
    ideal = f"one pass at the copy's bandwidth takes {found['one_pass_ms']:.1f} ms."
    return [f"{size}, one CUDA graph; {ideal}", "", *_lines(("method", *(f"{b} ms" for b in _COLUMNS)), rows)]


def _peers(rows: Sequence[Row]) -> list[str]:
    cells = []
    for row in rows:
        beaten = ", ".join(f"{p['name']} {p['x']:.3g}x" for p in row["peers"] if "x" in p)
        absent = ", ".join(p["name"] for p in row["peers"] if "x" not in p)
        cells.append((row["name"], f"{row['ms']:.4g}", beaten, absent))
    return _lines(("case, called eagerly", "ms", "faster than", "did not run"), cells)
