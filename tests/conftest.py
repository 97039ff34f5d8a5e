"""Refuses to test the fallback by accident, and keeps the cases that need much memory for those who ask."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pykernels import backends

collect_ignore: list[str] = []


def _emulate_cuda() -> None:
    """Without a device the CUDA kernels run on the host, thread by thread, and Triton's interpreted."""
    if torch.cuda.is_available():
        # Bounds take torch's products to be summed up in float32, parts of a split sum too.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
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


@pytest.fixture(autouse=True, scope="session")
def triton_prepared_once() -> Iterator[None]:
    """Triton's interpreter replaces its language anew, half a millisecond, at each device function's call.

    Once a launch is enough: a call inside finds the language replaced already.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang

    def once(function: Any) -> Any:
        modules = [m for m in function.__globals__.values() if m is tl or m is tl.core]
        if any(tl.core.is_builtin(module.arange) for module in modules):
            return prepare(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield


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


ON_DEVICE = re.compile(r"test_(device|cuda|triton|run_device)(_|\.)")
"""Files whose tests run a device's kernels."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the cases marked ``large`` unless PYKERNELS_LARGE=1; those marked ``long`` start first.

    On a device, whose time is short, its own tests start before those that any machine runs.
    """
    items.sort(
        key=lambda item: (
            item.get_closest_marker("long") is None,
            torch.cuda.is_available() and not ON_DEVICE.match(item.path.name),
        )
    )
    if os.environ.get("PYKERNELS_LARGE") == "1":
        return
    large = [item for item in items if item.get_closest_marker("large")]
    items[:] = [item for item in items if item not in large]
    config.hook.pytest_deselected(items=large)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A fault on the device makes every later call of the process fail: a worker ends, and another goes on.

    What the test said has been sent by then; of one that passed, the worker's end is the report.
    """
    result = yield
    if os.environ.get("PYTEST_XDIST_WORKER") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result
