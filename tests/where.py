"""The device that tests of GPU kernels and ops run on, data that lies there, and the kernels of a backend."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pykernels import backends, native
from tests import cases
from tests.cases import Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EMULATED = DEVICE.type == "cpu"
"""Kernels run on the host: CUDA's emulated, Triton's interpreted."""


def there(value: Any) -> Any:
    """Tensors, and lists of them, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
        return [there(v) for v in value]
    return value


def make(data: str, numel: int, models: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(base, tuned) of :func:`tests.cases.make`, on the device."""
    base, tuned = cases.make(data, numel, models, dtype)
    return there(base), there(tuned)


def nans(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """An output that shows what was not written."""
    return torch.full((numel,), math.nan, dtype=dtype, device=DEVICE)


def rows_of(backend: str) -> SimpleNamespace:
    """All rows of a backend by name; skips the test where it cannot run."""
    if why := backends.missing(backend):
        pytest.skip(why)
    functions = {op: backends._function(op, backend) for op, row in backends.TABLE.items() if backend in row}
    return SimpleNamespace(backend=backend, **functions)


def run(rows: Any, case: Case) -> torch.Tensor:
    """The result of a case; ``out`` starts as NaN."""
    out = nans(case.numel, case.out_dtype or case.dtype)
    getattr(rows, case.op)(out, *map(there, case.arguments()))
    return out.cpu()


def on_cpu(case: Case) -> torch.Tensor:
    """The result of the CPU kernel."""
    out = torch.full((case.numel,), math.nan, dtype=case.out_dtype or case.dtype)
    getattr(native, case.op)(out, *case.arguments())
    return out
