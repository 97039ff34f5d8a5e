"""The script that measures the constants of softmax: it finds each of them, and values take turns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("pykernels.native", exc_type=ImportError)

from pykernels.bench import softmax_constants as constants

HEADER = Path(__file__).parent.parent / "csrc" / "cpu" / "softmax_jobs.h"


class Library:
    """Kernels that do nothing; ``calls`` tells under which ``Regime::stored``."""

    def __init__(self):
        self.stored, self.calls = None, []

    def set_regime(self, stored, streamed):
        self.stored = stored.value

    def forward(self, kind, dtype, out, x, outer, n, inner):
        self.calls.append((kind.value, dtype.value, outer.value, n.value, inner.value, self.stored))


def test_every_variable_is_a_constant_of_the_header(tmp_path):
    copy = tmp_path / HEADER.name
    copy.write_text(HEADER.read_text())
    constants.loosen(copy)
    text = copy.read_text()
    assert all(f"inline int64_t {name} = " in text for name in constants.VARIABLES)
    assert "static_assert" not in text
    with pytest.raises(ValueError, match=f"one constant {constants.VARIABLES[0]}, has 0"):
        constants.loosen(copy)


def test_all_that_the_driver_needs_is_compiled():
    drive = HEADER.parent.parent / "drive"
    for name in constants.DRIVERS:
        text = "".join((drive / f"{name}.{kind}").read_text() for kind in ("h", "cpp"))
        needed = {
            other for other in re.findall(r'#include "(\w+)\.h"', text) if (drive / f"{other}.cpp").exists()
        }
        assert needed - {"isa"} <= set(constants.DRIVERS)


def test_values_take_turns():
    library = Library()
    crossing = constants.Crossing("stored", (0, constants.NEVER), ((2, 200_000, 1),))
    row = constants.measure(library, crossing, crossing.shapes[0])
    assert row["shape"] == [2, 200_000, 1] and set(row["ns"]) == {"0", "never"}
    assert {call[:5] for call in library.calls} == {(0, 0, 2, 200_000, 1)}
    assert [call[5] for call in library.calls[:4]] == [0, 0, constants.NEVER, constants.NEVER]


def test_the_best_has_a_star():
    row = {"constant": "kAhead", "op": "softmax", "dtype": "float32", "shape": [1, 2, 1]}
    text = constants.line(row | {"ns": {"0": 2.0, "4096": 1.0}})
    assert text.endswith("0: 2.000   4096: 1.000*") and text.startswith("kAhead ")


def test_a_part_keeps_the_rest_of_the_file(tmp_path):
    path = tmp_path / "constants.json"
    old = [{"constant": name, "ns": {"0": 1.0}} for name in ("stored", "kAhead", "kGone")]
    assert constants.together(old[:2], path) == old[:2]
    constants.report.save({"rows": old}, path)
    new = [{"constant": "kAhead", "ns": {"0": 2.0}}]
    assert constants.together(new, path) == [old[0], *new]


def test_an_unknown_constant_is_refused(capsys):
    with pytest.raises(SystemExit):
        constants.main(["--only", "kNothing"])
    assert "known constants are stored, streamed" in capsys.readouterr().err
