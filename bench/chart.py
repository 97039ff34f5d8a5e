"""The run as a picture: how much of the memory bandwidth every row reaches. PNG, and one HTML file."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from pykernels.bench.report import HEAD, cells

_COLOUR = {
    "linear_merge": "#4c78a8",
    "task_arithmetic": "#72b7b2",
    "kth_magnitude": "#eeca3b",
    "ties_merge": "#e45756",
    "dare_merge": "#b279a2",
}
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}"
    "img{max-width:100%}table{border-collapse:collapse;font-size:.9em}"
    "td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
)


def draw(run: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``roofline.png`` and ``roofline.html`` into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = png(run)
    paths = [folder / "roofline.png", folder / "roofline.html"]
    paths[0].write_bytes(picture)
    paths[1].write_text(page(run, picture))
    return paths


def png(run: dict[str, Any]) -> bytes:
    """One bar per row: the share of the ideal that it reaches; the line at 100 % is the roofline."""
    from matplotlib.figure import Figure

    rows = [row for row in run["rows"] if row["kind"] == "time"][::-1]
    figure = Figure(figsize=(11, 1 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    shares = [100 / row["x_ideal"] for row in rows]
    bars = axes.barh([r["name"] for r in rows], shares, color=[_COLOUR.get(r["op"], "#9d9d9d") for r in rows])
    labels = [f"{share:.0f} %  {row['gbs']:.1f} GB/s" for share, row in zip(shares, rows, strict=True)]
    axes.bar_label(bars, labels, padding=3, fontsize=7)
    axes.axvline(100, color="black", linewidth=1, linestyle="--")
    axes.tick_params(axis="y", labelsize=7)
    about = run["machine"]
    axes.set_title(f"{about['cpu']}, {about['threads']} threads, {about['isa']}")
    axes.set_xlabel("% of the ideal (XOR of all inputs, same buffers, same run)")
    axes.set_xlim(0, max([*shares, 100]) * 1.2)
    axes.margins(y=0.01)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def page(run: dict[str, Any], picture: bytes) -> str:
    """Chart and table in one HTML file that needs nothing beside it."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in HEAD)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>"
        for row in run["rows"]
    )
    image = base64.b64encode(picture).decode()
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>pykernels roofline</title>"
        f"<style>{_STYLE}</style><h1>pykernels roofline</h1>"
        f"<img alt='share of the ideal per row' src='data:image/png;base64,{image}'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></html>\n"
    )
