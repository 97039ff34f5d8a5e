"""Refuses to test the fallback by accident, and keeps the cases that need much memory for those who ask."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch

from pykernels import backends

collect_ignore: list[str] = []


def _emulate_cuda() -> None:
    """Without a device the CUDA kernels run on the host, thread by thread, and Triton's interpreted."""
    if torch.cuda.is_available():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        sys.modules["pykernels._cuda"] = importlib.import_module("pykernels._cuda_emulated")
    except ImportError as error:
        collect_ignore.extend(["test_cuda.py", "test_cuda_select.py"])
        if os.environ.get("PYKERNELS_WITHOUT_CUDA") != "1":
            raise pytest.UsageError(
                f"the emulated CUDA kernels are not built ({error}): PYKERNELS_EMULATED=1 pip install -e . "
                "first, or PYKERNELS_WITHOUT_CUDA=1 to leave their tests out"
            ) from None


def pytest_configure(config: pytest.Config) -> None:
    """A run without the compiled module must say so: PYKERNELS_BACKEND=ref.

    PYKERNELS_TEST_EXTENSION names another build of the module, to be tested behind walls (make sanitize).
    """
    if path := os.environ.get("PYKERNELS_TEST_EXTENSION"):
        from tests import walls

        walls.install(path)
    _emulate_cuda()
    why = backends.missing("cpu")
    if why and os.environ.get("PYKERNELS_BACKEND") != "ref":
        raise pytest.UsageError(f"{why}: pip install -e . first, or PYKERNELS_BACKEND=ref for the references")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the cases marked ``large`` unless PYKERNELS_LARGE=1."""
    if os.environ.get("PYKERNELS_LARGE") == "1":
        return
    large = [item for item in items if item.get_closest_marker("large")]
    items[:] = [item for item in items if item not in large]
    config.hook.pytest_deselected(items=large)
