"""The short form of the runs, for the README: the rows a newcomer looks for, and how many targets are met."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Run = dict[str, Any]
Row = dict[str, Any]

SHOWN = (
    r"(linear_merge|task_arithmetic) 4096x4096 bf16 n=3",
    r"kth_magnitude 4096x4096 bf16 n=3 d=0\.2",
    r"ties_merge 4096x4096 bf16 n=3 d=0\.2 tie=keep",
    r"dare_merge 4096x4096 bf16 n=3 d=0\.5",
    r"softmax 8192x4096 (fp32|bf16)",
    r"softmax 1x100000000 fp32",
    r"softmax_backward 8192x4096 fp32",
    r"merge_lora 4096x4096 bf16 r=16",
    r"lora_linear turns 4096x4096 bf16 n=1 rank=16 rows=(1|32|512)",
    r"compose_lora 2048x2048 fp32 r=16 adapters=8 method=svd",
)
"""Names of rows, one pattern per op and regime; of whole checkpoints all hot and whole-process rows."""
_WHOLE = re.compile(r".*(, hot|whole process)")
_SAID = re.compile(r"(<=|>=) ([\d.]+)(?: s beyond it \(is ([\d.]+) s\))?")
HEAD = ("case", "time", "of what memory allows", "x faster than")


class Judged(NamedTuple):
    """A target by name, and whether it was met; None: not resolved, or not measured."""

    name: str
    met: bool | None


def markdown(runs: Sequence[Run]) -> str:
    """One machine: what ran when, a short table, and the count of its targets."""
    if runs[0].get("kind") == "device":
        from pykernels.bench import gpu_report

        return "\n".join([gpu_report.markdown(runs[0]).split("\n", 1)[0], "", count(runs)])
    about = runs[0]["machine"]
    said = " and ".join(f"commit {run['machine'].get('commit', '?')}, {run.get('date', '?')}" for run in runs)
    threads = f"{about['threads']} threads"
    rows = [cells(row) for pattern in SHOWN for row in _named(runs, pattern)]
    rows += [whole(row) for run in runs for row in _engine(run) if _WHOLE.fullmatch(row["name"])]
    return "\n".join(
        [
            f"**{about['cpu']}**, {threads}, {about['isa']}, torch {about['torch']}, {said}:",
            "",
            "| " + " | ".join(HEAD) + " |",
            "|---" * len(HEAD) + "|",
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            count(runs),
        ]
    )


def cells(row: Row) -> tuple[str, ...]:
    """A row of one op: its time, its share of the copy's bandwidth, and its competitors."""
    share = f"{100 * row['of_copy']:.0f} % of copy" if "of_copy" in row else ""
    beaten = ", ".join(f"{p['name']} {p['x']:.3g}x" for p in row.get("peers", ()) if "x" in p)
    return row["name"], f"{row['value']:.3g} {row['unit']}", share, beaten


def whole(row: Row) -> tuple[str, ...]:
    """A row of whole checkpoints; where the other one is a competitor's process, how much longer it takes."""
    if "whole process" in row["name"]:
        theirs = row["name"].split(",")[0]
        return (
            f"{row['against']}, whole process",
            f"{row['control']:.2f} s",
            "",
            f"{theirs} {row['ratio']:.3g}x",
        )
    return (
        f"checkpoint: {row['name']}",
        f"{row['seconds']:.2f} s",
        f"{row['ratio']:.2f} x {row['against']}",
        "",
    )


def count(runs: Sequence[Run]) -> str:
    """How many targets are met, and which are not."""
    judged = [target for run in runs for target in targets(run)]
    missed = [target.name for target in judged if target.met is False]
    open_ = sum(target.met is None for target in judged)
    text = f"{sum(target.met is True for target in judged)} of {len(judged)} targets met"
    text += f", {open_} not resolved" if open_ else ""
    return f"{text}; missed: {'; '.join(missed)}." if missed else f"{text}, none missed."


def targets(run: Run) -> Iterator[Judged]:
    """Every bound of a run: of rows, of their competitors, of whole checkpoints, of a device."""
    for row in run.get("rows", ()):
        if "met" in row:
            yield Judged(row["name"], row["met"])
        for peer in row.get("peers", ()):
            if "met" in peer:
                yield Judged(f"{row['name']} against {peer['name']}", peer["met"])
    for row in _engine(run):
        if found := _SAID.match(row["target"]):
            sign, bound, beyond = found.groups()
            value = float(beyond or row["ratio"])
            yield Judged(row["name"], value <= float(bound) if sign == "<=" else value >= float(bound))
    for row in run.get("targets", {}).get("rows", ()):
        yield Judged(row["about"], row["met"])


def _named(runs: Sequence[Run], pattern: str) -> Iterator[Row]:
    return (row for run in runs for row in run["rows"] if re.fullmatch(pattern, row["name"]))


def _engine(run: Run) -> Sequence[Row]:
    found: Sequence[Row] = run.get("engine", {}).get("rows", ())
    return found
