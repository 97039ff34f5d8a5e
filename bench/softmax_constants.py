"""What each constant of ``csrc/cpu/softmax_jobs.h`` is worth, on both sides of where it stands.

``python -m pykernels.bench.softmax_constants [--out DIR] [--keep] [--only NAME]`` compiles the softmax
kernels of this machine's instruction set once more, with the constants as variables, runs the same rows under
two or more values by turns, and prints nanoseconds per element of one thread (its own time, as other load
counts less there). Where the best value changes from row to row is where the constant belongs. It needs a
source checkout and a C++ compiler. ``--only`` keeps what the file holds of the other constants.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pykernels import _C, backends
from pykernels.bench import report

FLAGS = {
    "avx512": "-DPK_AVX512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mbmi2 -mf16c -mpopcnt",
    "avx2": "-DPK_AVX2 -mavx2 -mfma -mbmi2 -mf16c -mpopcnt",
    "baseline": "",
}
"""As in ``CMakeLists.txt``."""
VARIABLES = (
    "kCachedFloats",
    "kCachedHalves",
    "kTogetherFloats",
    "kColumnRows",
    "kColumnFloats",
    "kStreamed",
    "kAhead",
    "kNear",
)
"""The constants that can vary at run time; of the others tables have their sizes."""
DRIVERS = ("softmax", "process", "parallel")
"""Files of ``csrc/drive`` that serve; in place of ``isa`` stands ``softmax_constants.cpp``."""
NEVER = 1 << 62
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MILLION, TENSOR = 1 << 20, 1 << 24
SOFTMAX, LOG_SOFTMAX, BACKWARD = 0, 1, -1

Call = Callable[[], Any]


class Crossing(NamedTuple):
    """A constant, the values to compare, and the rows to compare them on."""

    constant: str
    values: tuple[int, ...]
    shapes: tuple[tuple[int, int, int], ...]
    """(outer, n, inner)"""
    dtype: torch.dtype = torch.float32
    kind: int = SOFTMAX
    streamed: int | None = None
    """``Regime::streamed`` meanwhile, None: never; ``Regime::stored`` is a million."""


def _single(*lengths: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((1, n, 1) for n in lengths)


def _many(*lengths: int) -> tuple[tuple[int, int, int], ...]:
    """As many rows as make a tensor that no cache holds."""
    return tuple((TENSOR // n, n, 1) for n in lengths)


_LONG = (16_384, 65_536, 131_072, 262_144, MILLION, 2 * MILLION, 4 * MILLION)
CROSSINGS = (
    Crossing("stored", (0, NEVER), _single(*_LONG)),
    Crossing("stored", (0, NEVER), _many(*_LONG[:-1]), streamed=0),
    Crossing("streamed", (0, NEVER), tuple((rows, 4096, 1) for rows in (4, 64, 512, 1024, 2048, 4096))),
    Crossing("kStreamed", (0, NEVER), _single(MILLION, 4 * MILLION, 8 * MILLION, 16 * MILLION)),
    Crossing("kCachedFloats", (0, NEVER), _single(1000, 4096, *_LONG[:4]), kind=LOG_SOFTMAX),
    Crossing("kCachedFloats", (0, NEVER), _many(4096, *_LONG[:4]), kind=LOG_SOFTMAX, streamed=0),
    Crossing("kCachedHalves", (0, NEVER), _many(4096, *_LONG[:5]), torch.bfloat16),
    Crossing("kCachedHalves", (0, NEVER), _many(4096, *_LONG[:5]), torch.float16),
    Crossing(
        "kTogetherFloats",
        (0, 1024, 2048, 4096),
        tuple((16_384 // n, n, 1) for n in (32, 64, 128, 256, 512, 1024)),
    ),
    Crossing("kNear", (0, NEVER), tuple((rows, 64, 1) for rows in (256, 1024, 4096, 65_536))),
    Crossing("kNear", (0, NEVER), _many(4096), streamed=0),
    Crossing("kColumnRows", (1024, 4096), ((1, 4096, 4096), (1, 65_536, 256))),
    Crossing("kColumnFloats", (65_536, 262_144, MILLION), ((1, 1024, 16_384), (1, 4096, 4096))),
    Crossing("streamed", (0, NEVER), _many(128, 1024, 4096, 131_072), kind=BACKWARD),
    Crossing("kAhead", (0, 1024, 4096, 16_384), _many(2 * MILLION, 16 * MILLION), streamed=0),
)


def compiled(isa: str) -> Any:
    """The library, or RuntimeError where there is no compiler or no checkout."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "csrc"
        shutil.copytree(report.checkout() / "csrc", source)
        loosen(source / "cpu" / "softmax_jobs.h")
        files = [*sorted((source / "cpu").glob("softmax_*.cpp")), Path(__file__).with_suffix(".cpp")]
        files += [source / "drive" / f"{name}.cpp" for name in DRIVERS]
        command = [compiler, "-O3", "-ffp-contract=off", "-std=c++17", "-fPIC", "-pthread", f"-DPK_ISA={isa}"]
        command += [*FLAGS[isa].split(), f"-I{source}"]

        def built(file: Path) -> str:
            made = f"{folder}/{file.stem}-{file.parent.name}.o"
            subprocess.run([*command, "-c", str(file), "-o", made], check=True)
            return made

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(built, files))
        subprocess.run([*command, "-shared", *objects, "-o", f"{folder}/constants.so"], check=True)
        return ctypes.CDLL(f"{folder}/constants.so")


def loosen(header: Path) -> None:
    """Turn constants into variables that C can see. ValueError where one is not there."""
    text = header.read_text()
    for name in VARIABLES:
        text, count = re.subn(
            rf"constexpr int64_t {name} = ([^;]+);", rf'extern "C" {{ inline int64_t {name} = \1; }}', text
        )
        if count != 1:
            raise ValueError(f"{header.name} must have one constant {name}, has {count}")
    header.write_text(re.sub(r"static_assert\([^;]*;", "", text))


def using(library: Any, crossing: Crossing, value: int) -> Iterator[None]:
    """Two steps: the constant becomes ``value``, and then what it was."""
    streamed = NEVER if crossing.streamed is None else crossing.streamed
    own = crossing.constant in VARIABLES
    place = ctypes.c_int64.in_dll(library, crossing.constant) if own else ctypes.c_int64()
    before = place.value
    place.value = value
    regime = {"stored": MILLION, "streamed": streamed} | ({} if own else {crossing.constant: value})
    library.set_regime(ctypes.c_int64(regime["stored"]), ctypes.c_int64(regime["streamed"]))
    yield
    place.value = before


def call(library: Any, crossing: Crossing, x: torch.Tensor, out: torch.Tensor) -> Call:
    """The op on ``x`` [outer, n, inner]."""
    data = ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(x.data_ptr())
    shape, dtype = [ctypes.c_int64(n) for n in x.shape], ctypes.c_int(CODES[x.dtype])
    if crossing.kind == BACKWARD:
        return lambda: library.backward(dtype, *data, *shape[:2])
    return lambda: library.forward(ctypes.c_int(crossing.kind), dtype, *data, *shape)


def measure(library: Any, crossing: Crossing, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Nanoseconds per element under each value, medians by turns."""
    x = backends.fresh(shape, crossing.dtype, torch.device("cpu"))
    x.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(3))
    out = torch.empty_like(x)
    run, inner = call(library, crossing, x, out), max(1, 200_000 // x.numel())
    spent: dict[int, list[float]] = {value: [] for value in crossing.values}
    for _ in range(7):
        for value, times in spent.items():
            setting = using(library, crossing, value)
            next(setting)
            if x.numel() < TENSOR:
                run()  # what a cache holds is found there
            start = time.thread_time()
            for _ in range(inner):
                run()
            times.append((time.thread_time() - start) / inner / x.numel() * 1e9)
            next(setting, None)
    ns = {"never" if v == NEVER else str(v): statistics.median(t) for v, t in spent.items()}
    kind = {SOFTMAX: "softmax", LOG_SOFTMAX: "log_softmax", BACKWARD: "softmax_backward"}[crossing.kind]
    return {
        "constant": crossing.constant, "op": kind, "dtype": str(crossing.dtype).removeprefix("torch."),
        "shape": list(shape), "ns": ns,
    }  # fmt: skip


def line(row: Mapping[str, Any]) -> str:
    """One row of the printed table: the best value has a star."""
    best = min(row["ns"], key=row["ns"].__getitem__)
    ns = "  ".join(f"{value}: {t:.3f}{'*' if value == best else ' '}" for value, t in row["ns"].items())
    return f"{row['constant']:<16} {row['op']:<17} {row['dtype']:<9} {row['shape']!s:<20} {ns}"


def together(rows: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """New rows, and those of a file's other constants, in the order of :data:`CROSSINGS`."""
    new = {row["constant"] for row in rows}
    found = report.load(path)[0]["rows"] if path.exists() else []
    order = {name: i for i, name in enumerate({c.constant: 0 for c in CROSSINGS})}
    kept = [row for row in found if row["constant"] in order.keys() - new]
    return sorted([*rows, *kept], key=lambda row: order[row["constant"]])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; ``--keep`` writes into ``bench/results/softmax/`` too."""
    parser = argparse.ArgumentParser(prog="python -m pykernels.bench.softmax_constants", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--only", action="append", help="one constant; may be given again")
    given = parser.parse_args(arguments)
    chosen = [c for c in CROSSINGS if given.only is None or c.constant in given.only]
    if {c.constant for c in chosen} < set(given.only or ()) or not chosen:
        parser.error(f"--only: known constants are {', '.join({c.constant: 0 for c in CROSSINGS})}")
    torch.set_num_threads(1)
    library = compiled(_C.isa())
    rows = []
    for crossing in chosen:
        for shape in crossing.shapes:
            rows.append(measure(library, crossing, shape))
            print(line(rows[-1]), flush=True)
    about = report.machine()
    paths = [given.out / "softmax_constants.json"]
    paths += [report.RESULTS / "softmax" / f"constants-{report.slug(about)}.json"] * given.keep
    for path in paths:
        result = {"machine": about, "date": time.strftime("%Y-%m-%d"), "rows": together(rows, path)}
        print(f"saved {report.save(result, path)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
