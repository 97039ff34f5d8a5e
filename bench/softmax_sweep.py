"""The sweep of The Two-Pass Softmax Algorithm (Dukhan and Ablavatski, 2020): one row of 10^3 to 10^8 floats.

``python -m pykernels.bench.softmax_sweep [--out DIR] [--keep] [--threads N] [--largest N]`` times the paper's
three algorithms (``softmax_forms.cpp``, compiled where it runs, always on one thread), torch and pykernels by
turns on the same buffers, prints nanoseconds per element, and writes the figures and their plot.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import pykernels
from pykernels import backends
from pykernels.bench import report

SOURCE = Path(__file__).with_name("softmax_forms.cpp")
FORMS = {
    "three passes, recompute": "recompute",
    "three passes, reload": "reload",
    "two passes, published": "two_pass",
}
OURS, TORCH, COPY = "pykernels", "torch", "copy"
SIZES = (
    1_000,
    4_000,
    10_000,
    32_000,
    100_000,
    200_000,
    1_000_000,
    3_000_000,
    10_000_000,
    30_000_000,
    100_000_000,
)
_STEP = 64
"""A multiple of what the forms take at a time."""

Call = Callable[[], Any]


def compiled() -> dict[str, Any]:
    """The paper's algorithms by name, or none where there is no C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "forms.so"
        options = [
            "-O3",
            "-march=native",
            "-ffp-contract=fast",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-Wno-psabi",
        ]
        subprocess.run([compiler, *options, str(SOURCE), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
    library.step.restype = ctypes.c_int64
    if _STEP % library.step():
        raise RuntimeError(f"the forms take {library.step()} elements at a time, the sweep {_STEP}")
    return {name: getattr(library, symbol) for name, symbol in FORMS.items()}


def contenders(x: torch.Tensor, out: torch.Tensor, forms: dict[str, Any]) -> dict[str, Call]:
    """Every algorithm as a call on ``x`` [1, n] that fills ``out``."""

    def form(function: Any) -> Call:
        arguments = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(x.numel())
        return lambda: function(*arguments)

    return {
        COPY: lambda: out.copy_(x),
        **{name: form(function) for name, function in forms.items()},
        TORCH: lambda: torch.softmax(x, -1, out=out),
        OURS: lambda: pykernels.softmax(x, -1, out=out),
    }


def compare(calls: dict[str, Call], x: torch.Tensor, out: torch.Tensor) -> None:
    """Raise unless every algorithm gives softmax: to 1 % of each result, as float sums drift on long rows."""
    exact = torch.empty_like(out)
    with pykernels.use_backend("ref"):
        pykernels.softmax(x, -1, out=exact)
    for name, call in calls.items():
        if name == COPY:
            continue
        call()
        worst = float(((out - exact).abs() / exact).max())
        if not worst < 0.01:
            raise RuntimeError(f"{name} on {x.numel()} elements is off by {worst:g} of a result")


def measure(n: int, forms: dict[str, Any]) -> dict[str, Any]:
    """Nanoseconds per element of every algorithm on a row of about ``n`` elements, medians by turns."""
    n = -(-n // _STEP) * _STEP
    x = backends.fresh([1, n], torch.float32, torch.device("cpu"))
    out = backends.fresh([1, n], torch.float32, torch.device("cpu"))
    x.normal_(generator=torch.Generator().manual_seed(0)).mul_(3)
    calls = contenders(x, out, forms)
    if n <= 1 << 20:
        compare(calls, x, out)
    inner = max(1, 200_000 // n)
    rounds = 15 if n <= 10_000_000 else 7
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            for _ in range(inner):
                call()
            spent[name].append((time.perf_counter() - start) / inner / n * 1e9)
    return {"n": n, "ns": {name: statistics.median(s) for name, s in spent.items()}}


def line(row: dict[str, Any]) -> str:
    """One size of the printed table."""
    return f"{row['n']:>11,} " + " ".join(f"{ns:>24.3f}" for ns in row["ns"].values())


def plot(run: dict[str, Any], path: Path) -> Path:
    """Nanoseconds per element over the length of the row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    lengths = [row["n"] for row in run["rows"]]
    for name in run["rows"][0]["ns"]:
        style = {COPY: ":", TORCH: "--"}.get(name, "-")
        width = 2.5 if name == OURS else 1.3
        axes.plot(
            lengths, [row["ns"][name] for row in run["rows"]], style, marker="o", ms=3, lw=width, label=name
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.set_xlabel("elements of the row, float32")
    axes.set_ylabel("ns per element")
    about = run["machine"]
    axes.set_title(f"softmax of one row: {about['cpu']}, {about['isa']}, {about['threads']} thread(s)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def run(sizes: Sequence[int], say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure all sizes, printing line by line."""
    forms = compiled()
    if not forms:
        say("no C++ compiler, so the paper's algorithms are not compared")
    rows = []
    for n in sizes:
        rows.append(measure(n, forms))
        if len(rows) == 1:
            say(f"{'elements':>11} " + " ".join(f"{name:>24}" for name in rows[0]["ns"]))
        say(line(rows[-1]))
    return {"machine": report.machine(), "date": time.strftime("%Y-%m-%d"), "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; ``--keep`` writes into ``bench/results/softmax/`` of a source checkout too."""
    parser = argparse.ArgumentParser(prog="python -m pykernels.bench.softmax_sweep", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--largest", type=int, default=SIZES[-1])
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.keep:
        report.checkout()
    result = run([n for n in SIZES if n <= given.largest])
    folders = [given.out] + [report.RESULTS / "softmax"] * given.keep
    for folder in folders:
        stem = folder / (report.slug(result["machine"]) if folder != given.out else "softmax_sweep")
        print(f"saved {report.save(result, stem.with_suffix('.json'))}")
        print(f"saved {plot(result, stem.with_suffix('.png'))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
