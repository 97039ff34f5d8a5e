"""What a merge runs per tensor, wherever it runs: all of it at once, or statistics first and chunks then."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, reduce

import torch

from pykernels.engine.files import TORCH_DTYPE
from pykernels.engine.units import Adapted, Output, Plan, Source
from pykernels.methods import METHODS, Method, Params, Statistic

BLOCK = 4096
"""Elements; chunks start at multiples of it: statistics and random draws are defined on such blocks."""


def merge_whole(
    method: Method,
    p: Params,
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: list[torch.Tensor],
    statistic: Statistic | None = None,
) -> None:
    """A whole tensor at once: in the method's fused form where it has one, else statistic, then merge."""
    statistic = statistic or method.statistic(p, out.numel())
    if statistic is None:
        method.merge(p, out, base, tuned, 0, None)
    elif not method.whole(p, out, base, tuned):
        while not statistic.done:
            statistic.update(base, tuned, 0)
            statistic.next_round()
        method.merge(p, out, base, tuned, 0, statistic.finish())


def model_statistic(plan: Plan) -> Statistic | None:
    """Scope "model": the statistic that must see all of ``plan.segment()`` before the first merge."""
    segment = plan.segment() if plan.scope == "model" else []
    if not segment:
        return None
    return METHODS[plan.method].statistic(segment[0].params, sum(out.numel for out in segment))


def common_dtype(sources: tuple[Source, ...]) -> torch.dtype:
    """The smallest dtype that holds every value of all sources exactly."""
    return _promoted(frozenset(source.dtype for source in sources))


@cache
def _promoted(codes: frozenset[str]) -> torch.dtype:
    return reduce(torch.promote_types, (TORCH_DTYPE[code] for code in sorted(codes)))


def is_adapted(out: Output) -> bool:
    """Whether adapters change one of its inputs: then they are computed, and not just there."""
    return any(isinstance(source, Adapted) for source in out.sources)


def input_width(out: Output) -> int:
    """Bytes that all inputs together have per element of ``out``."""
    return sum(TORCH_DTYPE[source.dtype].itemsize for source in out.sources)


def chunks(numel: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, count) of every ``step`` elements."""
    for first in range(0, numel, step):
        yield first, min(step, numel - first)
