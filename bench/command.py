"""What ``pykernels bench`` does: controls, rows, controls again; then the files of the run."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pykernels.bench import engine, peers, report, roofline

_WIDTHS = (62, 10, 8, 10, 8, 30)


def run(
    *,
    only: Sequence[str] = (),
    threads: int | None = None,
    with_peers: bool = True,
    with_engine: bool = False,
    out: Path = Path("build/bench"),
    keep: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure and print row by row, then write ``results.json`` and the charts into ``out``.

    ``only``: substrings of row names; all when empty. ``keep`` puts the rows into
    ``bench/results/<machine>.json`` too, in place of those there that ``only`` selects.
    """
    if keep:
        report.checkout()  # refused before the minutes of measuring, not after
    if threads:
        torch.set_num_threads(threads)
    about = report.machine()
    say(f"{about['cpu']}, {about['threads']} threads, {about['isa']}, torch {about['torch']}")
    if with_peers and (absent := peers.missing()):
        say(f"not installed, so not compared: {', '.join(absent)} (pip install 'pykernels[bench]')")
    control = {"before": _controls(say)}
    say(_line(report.HEAD))
    rows = []
    selects = _selects(only)
    for row in roofline.run(lambda case: selects(case.name), with_peers=with_peers):
        rows.append(row)
        say(_line(report.cells(row)))
    control["after"] = _controls(say)
    result: dict[str, Any] = {
        "machine": about, "date": time.strftime("%Y-%m-%d"), "controls": control, "rows": rows
    }  # fmt: skip
    if with_engine:
        result["engine"] = engine.measure(say=say)
    say(f"saved {report.save(result, out / 'results.json')}")
    if keep:
        say(f"saved {report.keep(result, selects)}")
    if importlib.util.find_spec("matplotlib") is None:
        say("matplotlib is not installed, so no chart is drawn")
    else:
        from pykernels.bench.chart import draw

        for path in draw(result, out):
            say(f"saved {path}")
    return result


def _selects(only: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name is asked for."""
    return lambda name: not only or any(text in name for text in only)


def _controls(say: Callable[[str], None]) -> dict[str, float]:
    rates = roofline.controls()
    say(f"control: ideal {rates['ideal']:.1f} GB/s, copy {rates['copy']:.1f} GB/s")
    return rates


def _line(cells: Sequence[str]) -> str:
    padded = [f"{cells[0]:<{_WIDTHS[0]}}"]
    padded += [f"{cell:>{width}}" for cell, width in zip(cells[1:5], _WIDTHS[1:5], strict=True)]
    return " ".join([*padded, f" {cells[5]:<{_WIDTHS[5]}}", cells[6]]).rstrip()
