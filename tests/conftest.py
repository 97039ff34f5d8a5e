"""Refuses to test the fallback by accident, and keeps the cases that need much memory for those who ask."""

from __future__ import annotations

import os

import pytest

from pykernels import backends


def pytest_configure(config: pytest.Config) -> None:
    """A run without the compiled module must say so: PYKERNELS_BACKEND=ref.

    PYKERNELS_TEST_EXTENSION names another build of the module, to be tested behind walls (make sanitize).
    """
    if path := os.environ.get("PYKERNELS_TEST_EXTENSION"):
        from tests import walls

        walls.install(path)
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
