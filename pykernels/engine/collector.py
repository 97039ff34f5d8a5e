"""Python's collector, kept from walking what cannot be garbage: it would take a fifth of a short merge."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """No collections inside: for the making of large tables that hold no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def frozen() -> Iterator[None]:
    """Collections inside look at new objects only, not at the hundred thousands that torch's import made."""
    if gc.get_freeze_count():
        yield  # the caller has done so, and thawing would undo it
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
