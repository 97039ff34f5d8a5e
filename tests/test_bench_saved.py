"""The files of measured runs, and the pages made from them: nothing is lost, and what is missed is said."""

from __future__ import annotations

import json
import re

import pytest

from pykernels.bench import command, report, roofline, summary
from pykernels.bench.cases import CASES
from pykernels.bench.report import BEGIN, END
from tests.test_bench_table import MERGE, ROW, RUN


def time(name, **more):
    """A timed row of this name."""
    return {**ROW, "name": name, **more}


def run(*names, commit="new", **more):
    """A run with such rows."""
    about = {**RUN["machine"], "commit": commit}
    return {
        "machine": about,
        "date": "2026-01-02",
        "controls": RUN["controls"],
        "rows": [*map(time, names)],
        **more,
    }


def names(runs):
    """The rows of several runs, by their commits."""
    return {r["machine"]["commit"]: [row["name"] for row in r["rows"]] for r in runs}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder in the place of the committed results."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def test_a_run_replaces_what_it_measured_and_keeps_the_rest(results):
    engine = {"about": "base + 3 tuned", "rows": [MERGE]}
    path = report.keep(
        run("softmax a", "softmax b", "trim a", commit="old", engine=engine), lambda name: True
    )
    assert path.name == "some-cpu-2-avx2-2-threads.json"
    report.keep(run("softmax a", "softmax c"), lambda name: "softmax" in name)
    new, old = report.load(path)
    assert names([new, old]) == {"new": ["softmax a", "softmax c"], "old": ["trim a"]}
    assert old["engine"] == engine and old["controls"] == RUN["controls"] and old["date"] == "2026-01-02"
    report.keep(run("trim a", commit="third", engine=engine), lambda name: name == "trim a")
    assert names(report.load(path)) == {"third": ["trim a"], "new": ["softmax a", "softmax c"]}
    report.keep(run("all", commit="last"), lambda name: True)
    assert names(report.load(path)) == {"last": ["all"], "third": []}, "checkpoints stay until measured anew"


def test_a_file_of_one_run_is_read_as_before(results):
    path = report.save(RUN, results / "some-cpu-2-avx2-2-threads.json")
    assert report.load(path) == [RUN]
    report.keep(run("trim a"), lambda name: name == "trim a")
    assert len(report.load(path)) == 2


def test_the_command_keeps_what_only_does_not_select(results, monkeypatch):
    case = next(c for c in CASES if c.op == "trim" and c.kind == "call")
    monkeypatch.setattr(roofline, "run", lambda select, with_peers: [time(case.name)] if select(case) else [])
    monkeypatch.setattr(roofline, "controls", lambda: {"ideal": 1.0, "copy": 1.0})
    monkeypatch.setattr(report, "machine", lambda: {**RUN["machine"], "commit": "new"})
    monkeypatch.setattr("pykernels.bench.chart.draw", lambda run, out: [])
    path = report.keep(run(case.name, "softmax a", commit="old"), lambda name: True)
    said = []
    command.run(only=["trim"], with_peers=False, out=results / "out", keep=True, say=said.append)
    assert names(report.load(path)) == {"new": [case.name], "old": ["softmax a"]}
    assert f"saved {path}" in said and json.loads((results / "out" / "results.json").read_text())["rows"]


def test_the_readme_is_short_and_the_page_has_every_row(tmp_path, results):
    readme = tmp_path / "readme" / "README.md"
    readme.parent.mkdir()
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    report.save(RUN, results / "one.json")
    assert not report.write_readme(readme, check=True)
    assert "old" in readme.read_text() and not (results / "README.md").exists()
    assert not report.write_readme(readme) and report.write_readme(readme, check=True)
    text, page = readme.read_text(), (results / "README.md").read_text()
    assert text.startswith(f"above\n{BEGIN}\n") and text.endswith(f"{END}\nbelow\n")
    assert "checkpoint: ties, hot" in text and "trim call 64 elements | 20 us" not in text
    assert all(row["name"] in page for row in RUN["rows"]) and "mergekit 301x" in page
    (results / "README.md").write_text("changed by hand")
    assert not report.write_readme(readme, check=True)
    assert not report.write_readme(readme) and report.write_readme(readme, check=True)


def test_without_a_run_the_pages_say_so(tmp_path, results):
    (tmp_path / "README.txt").write_text(f"{BEGIN}{END}")
    report.write_readme(tmp_path / "README.txt")
    assert "No run is committed yet" in (tmp_path / "README.txt").read_text()
    assert "No run is committed yet" in (results / "README.md").read_text()


def test_a_readme_without_the_place_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing here\n")
    with pytest.raises(ValueError, match="has no lines"):
        report.write_readme(tmp_path / "README.md")


@pytest.mark.parametrize("pattern", summary.SHOWN)
def test_what_a_newcomer_looks_for_is_measured(pattern):
    found = [case.name for case in CASES if re.fullmatch(pattern, case.name)]
    assert 1 <= len(found) <= 3


def test_targets_are_counted_and_the_missed_are_named():
    peers = [
        {"name": n, "x": 2.0, "met": met} for n, met in (("torch", True), ("peft", False), ("addmm_", None))
    ]
    rows = [time("softmax a", met=True, peers=peers), time("softmax b", met=False, peers=[])]
    del rows[0]["peers"][0]["x"]
    merges = [
        MERGE,
        {**MERGE, "name": "mergekit, whole process", "target": ">= 40"},
        {**MERGE, "name": "start-up", "ratio": 1.06, "target": "<= 0.3 s beyond it (is 0.40 s)"},
        {**MERGE, "name": "lora merge", "target": ""},
    ]
    one = {**run(), "rows": rows, "engine": {"about": "", "rows": merges}}
    assert summary.count([one]) == (
        "3 of 8 targets met, 1 not resolved; missed: softmax a against peft; softmax b; "
        "mergekit, whole process; start-up."
    )
    assert summary.count([run()]) == "0 of 0 targets met, none missed."
    device = {"targets": {"rows": [{"about": "copy", "met": True}, {"about": "decode", "met": None}]}}
    assert summary.count([device]) == "1 of 2 targets met, 1 not resolved, none missed."


def test_the_short_table_names_what_ran_when():
    engine = {"about": "", "rows": [MERGE, {**MERGE, "name": "mergekit-yaml, ties, whole process",
                                            "against": "pykernels merge", "ratio": 20.0}]}  # fmt: skip
    turns = {"name": "lora_linear turns 4096x4096 bf16 n=1 rank=16 rows=32", "kind": "turns", "value": 16.0,
             "unit": "ms",
             "peers": [{"name": "peft", "x": 4.0}, {"name": "vllm", "left_out": "absent"}]}  # fmt: skip
    first = {**run(), "rows": [turns]}
    text = summary.markdown([first, run("softmax 8192x4096 fp32", "other", commit="old", engine=engine)])
    assert ", commit new, 2026-01-02 and commit old, 2026-01-02:" in text and "other" not in text
    lines = text.split("\n")
    assert lines[4] == "| softmax 8192x4096 fp32 | 12.3 ms | 50 % of copy | mergekit 301x |"
    assert lines[5] == f"| {turns['name']} | 16 ms |  | peft 4x |"
    assert lines[6] == "| checkpoint: ties, hot | 0.50 s | 1.25 x cp |  |"
    assert lines[7] == "| pykernels merge, whole process | 0.40 s |  | mergekit-yaml 20x |"
