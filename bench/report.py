"""From rows to something to read: the table in the terminal, the README's table, and the file of a run.

``python -m pykernels.bench.report README`` rewrites the README's table from ``bench/results/``;
``--check`` only says whether it is current.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pykernels.bench import turns

Row = dict[str, Any]
Run = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- bench:begin (generated) -->", "<!-- bench:end -->"
_SAID = {True: "yes", False: "NO", None: "not resolved"}
HEAD = ("case", "ms", "GB/s", "% of copy", "x ideal", "target", "x faster than")


def machine() -> dict[str, Any]:
    """What the figures belong to; nothing that names the computer itself."""
    import torch

    from pykernels import _C
    from pykernels.bench import peers

    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pykernels": version("pykernels"),
        "commit": _commit(),
        "peers": peers.installed(),
    }


def _commit() -> str:
    """The checkout's commit, with a + where files differ from it; empty outside a checkout."""
    said = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--dirty=+"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip()


def slug(about: dict[str, Any]) -> str:
    """File name of a machine's results: ``amd-epyc-avx512-2-threads``."""
    text = f"{about['cpu']} {about['isa']} {about['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def checkout() -> Path:
    """The source checkout that this module lies in. ValueError where it is installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        raise ValueError("bench/results and README.md are files of a source checkout; run this from one")
    return root


def save(run: Run, path: Path | None = None) -> Path:
    """Write a run as JSON, by default to ``bench/results/<machine>.json`` of a source checkout."""
    if path is None:
        checkout()
        path = RESULTS / f"{slug(run['machine'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(run), indent=1) + "\n")
    return path


def load(path: Path) -> Run:
    """Read a saved run."""
    run: Run = json.loads(path.read_text())
    return run


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table as text, in the order of its head."""
    beaten = ", ".join(map(peer, row.get("peers", ())))
    if row["kind"] != "time":
        return (row["name"], f"{row['value']:.3g} {row['unit']}", "", "", "", target(row), beaten)
    return (
        row["name"], f"{row['value']:.2f}", f"{row['gbs']:.1f}", f"{100 * row['of_copy']:.0f} %",
        f"{row['x_ideal']:.2f}", target(row), beaten,
    )  # fmt: skip


def peer(found: Row) -> str:
    """How many times longer a competitor takes; where percents matter, the interval and the bound too."""
    if "x" not in found:
        return f"{found['name']}: {found['left_out']}"
    text = f"{found['name']} {found['x']:.3g}x"
    if "pairs" not in found or (found["pairs"] < turns.ROUNDS and found["met"] is not None):
        return text
    bound = f">= {found['least']:.3g}: {_SAID[found['met']]}"
    return f"{text} ({found['low']:.3g} to {found['high']:.3g}; {bound})"


def target(row: Row) -> str:
    """The row's bound, where it has one, and whether it was met: ``<= 1.3: yes``."""
    bound = row["target"]
    if "met" not in row:
        return ""
    sign, value = ("<=", bound["most"]) if "most" in bound else (">=", bound["least"])
    between = f", {row['low']:.2f} to {row['high']:.2f}" if bound["word"] and "pairs" in row else ""
    against = f" x {bound['word']} (is {row['ratio']:.2f}{between})" if bound["word"] else ""
    return f"{sign} {value:g}{against}: {_SAID[row['met']]}"


def markdown(run: Run) -> str:
    """A run as a Markdown section: what it ran on, its controls, its rows."""
    if run.get("kind") == "device":
        from pykernels.bench import gpu_report

        return gpu_report.markdown(run)
    about, control = run["machine"], run["controls"]
    peers = ", ".join(f"{name} {number}" for name, number in about["peers"].items())
    lines = [
        f"**{about['cpu']}**, {about['threads']} threads, {about['isa']}, torch {about['torch']}"
        + (f", commit {about['commit']}" if about.get("commit") else "")
        + (f", {run['date']}" if run.get("date") else "")
        + (f", against {peers}" if peers else "")
        + f". Control before and after the rows: {control['before']['ideal']:.1f} and "
        f"{control['after']['ideal']:.1f} GB/s; copy {control['before']['copy']:.1f} and "
        f"{control['after']['copy']:.1f} GB/s.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
        *("| " + " | ".join(cells(row)) + " |" for row in run["rows"]),
    ]
    if engine := run.get("engine"):
        lines += ["", *engine_lines(engine)]
    return "\n".join(lines)


def engine_lines(engine: dict[str, Any]) -> list[str]:
    """The end-to-end figures as a Markdown table."""
    return [
        f"Whole checkpoints: {engine['about']}.",
        "",
        "| merge | seconds | against | seconds | ratio | target |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['name']} | {r['seconds']:.2f} | {r['against']} | {r['control']:.2f} "
            f"| {r['ratio']:.2f} | {r['target']} |"
            for r in engine["rows"]
        ),
    ]


def readme_table() -> str:
    """What stands between the README's markers: one section per committed run."""
    runs = [load(path) for path in sorted(RESULTS.glob("*.json"))]
    if not runs:
        return "No run is committed yet; `pykernels bench` prints the table for your machine."
    return "\n\n".join(markdown(run) for run in runs)


def write_readme(path: Path, *, check: bool = False) -> bool:
    """Put the table between the README's markers; returns whether it was current before."""
    text = path.read_text()
    head, begin, rest = text.partition(BEGIN)
    old, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: has no lines {BEGIN} and {END}")
    new = f"\n{readme_table()}\n"
    if not check and new != old:
        path.write_text(head + begin + new + end + tail)
    return new == old


def rounded(value: Any) -> Any:
    """Four significant digits: the rest is noise and makes diffs unreadable."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def _cpu() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def main(arguments: Sequence[str]) -> int:
    """``README [--check]``: the path of the README, or the word for the one of the source tree."""
    check = "--check" in arguments
    names = [a for a in arguments if a != "--check"]
    if len(names) != 1:
        print("usage: python -m pykernels.bench.report README [--check]", file=sys.stderr)
        return 2
    try:
        path = checkout() / "README.md" if names[0] == "README" else Path(names[0])
        current = write_readme(path, check=check)
    except (ValueError, OSError) as error:
        print(f"pykernels.bench.report: {error}", file=sys.stderr)
        return 2
    print(f"{path.name}: {'current' if current else 'out of date' if check else 'rewritten'}")
    return 1 if check and not current else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
