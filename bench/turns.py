"""Calls by turns, and what pairs of their times say: medians with their 95 % interval, and verdicts.

A machine that others use slows down for seconds at a time. Two calls of one round meet the same conditions,
so the ratio (or difference) is taken within each round, and its median over the rounds. A call finds the
machine as the one before it left it (caches, threads of torch's that wait awake), so every second round goes
backwards. A difference below a tenth is only believed after 50 rounds, and any only where the whole interval
lies on one side of the bound.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

ROUNDS = 50
"""Pairs without which a difference below :data:`CLEAR` is not resolved."""
CLEAR = 0.1

Call = Callable[[], object]
Rounds = list[dict[str, float]]
"""Seconds of every call that ran, round by round."""


class Middle(NamedTuple):
    """A median of ``pairs`` values and the interval that holds the true one in 95 of 100 cases.

    Below six values no interval does: it is all of them then.
    """

    value: float
    low: float
    high: float
    pairs: int

    def within(self, bound: float, *, least: bool) -> bool | None:
        """Whether the value is at least (or at most) ``bound``; None where that is not resolved."""
        inside = (self.low >= bound, self.high >= bound)
        few = self.pairs < ROUNDS and abs(self.value / bound - 1) <= CLEAR
        return None if few or inside[0] != inside[1] else inside[0] == least

    def record(self, name: str = "x") -> dict[str, float]:
        """As a row holds it."""
        return {name: self.value, "low": self.low, "high": self.high, "pairs": self.pairs}


def middle(values: Sequence[float]) -> Middle:
    """The median and, by the binomial distribution of how many values lie below it, its interval."""
    ranked, n = sorted(values), len(values)
    skip, tail = 0, 2.0**-n
    while tail + math.comb(n, skip + 1) * 2.0**-n <= 0.025 and skip + 1 < n / 2:
        skip += 1
        tail += math.comb(n, skip) * 2.0**-n
    return Middle(statistics.median(ranked), ranked[skip], ranked[n - 1 - skip], n)


def by_turns(
    calls: Mapping[str, Call],
    seconds: Callable[[Call], float],
    *,
    limit: float,
    rounds: int = ROUNDS,
    enough: Callable[[str, Rounds], bool] = lambda name, found: False,
) -> Rounds:
    """All calls in turns, at least once: ``rounds`` rounds, or as many as begin within ``limit`` seconds.

    A call of which there is ``enough`` sits out the rounds that follow, and the last ends when one is left.
    """
    found: Rounds = []
    end = time.monotonic() + limit
    while len(found) < rounds and (not found or time.monotonic() < end):
        taking = [name for name in calls if not found or not enough(name, found)]
        if len(taking) < 2 <= len(calls):
            break
        order = taking[::-1] if len(found) % 2 else taking
        found.append({name: seconds(calls[name]) for name in order})
    return found


def pairs(found: Rounds, first: str, second: str) -> list[tuple[float, float]]:
    """Seconds of two calls in the rounds in which both ran."""
    return [(took[first], took[second]) for took in found if first in took and second in took]


def ratio(found: Rounds, first: str, second: str) -> Middle:
    """How many times longer the first call takes."""
    return middle([a / b for a, b in pairs(found, first, second)])


def more(found: Rounds, first: str, second: str) -> Middle:
    """How many microseconds longer the first call takes."""
    return middle([(a - b) * 1e6 for a, b in pairs(found, first, second)])


def median(found: Rounds, name: str) -> float:
    """Seconds of a call."""
    return statistics.median(took[name] for took in found if name in took)


def wall(call: Call) -> float:
    """Seconds of one call by the wall's clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
