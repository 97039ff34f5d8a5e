"""Rows of LoRA's benchmarks made small."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from pykernels.bench.cases import Case
from pykernels.bench.inputs import Spec

SHAPE = (40, 48)


def small(case: Case) -> Case:
    """The same row on a small layer and few rows of x."""
    options = {**case.options, "rows": min(case.options["rows"], 33)}
    options |= {"rows": 6, "adapters": 6} if "adapters" in options else {}
    return replace(case, spec=Spec(SHAPE, case.spec.dtype, 1), options=options)


def compile_without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's front alone: what it traces, the tests see; code takes ten seconds a row."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
