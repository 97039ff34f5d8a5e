"""Products of torch's in the dtypes of their operands, whatever ``torch.autocast`` is set around a call.

An op says in which dtype it computes, and the checks have seen to its operands: a product that autocast makes
in 16 bits would lose digits that the op promises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_casts: Callable[[], bool] = torch._C._is_any_autocast_enabled


def uncast(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` without autocast."""

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> R:
        if not _casts():
            return function(*args, **named)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **named)

    return run
