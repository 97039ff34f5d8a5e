"""softmax of very long rows: units in the last place at 10^8 elements, and results written past the cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import pykernels as pk
from tests.bounds import assert_same_bits
from tests.softmax_cases import INF, KINDS, drawn, units

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
PIECE = 10_000_000
KEPT = (1 << 22) - 1  # below Regime::streamed of AVX2
STREAMED = (1 << 23) + 5  # past kStreamed of csrc/cpu/softmax_jobs.h


def long_row(kind: str, n: int) -> torch.Tensor:
    """[n] of logits, every piece of them drawn anew."""
    x = torch.empty(n)
    for i, piece in enumerate(x.split(PIECE)):
        piece.copy_(drawn(kind, (piece.numel(),), i))
    return x


def truth(x: torch.Tensor) -> tuple[torch.Tensor, Iterator[torch.Tensor]]:
    """logsumexp and, piece by piece, softmax of a row in float64."""
    most = x.max().double()
    total = torch.stack([(p.double() - most).exp().sum() for p in x.split(PIECE)]).sum()
    return most + total.log(), ((p.double() - most).exp() / total for p in x.split(PIECE))


@pytest.mark.large
@pytest.mark.parametrize("kind", KINDS)
def test_units_in_the_last_place_of_a_hundred_million(kind):
    """At most 5. It prints what it finds (pytest -s)."""
    x = long_row(kind, 100_000_003)
    total, wanted = truth(x)
    got = pk.softmax(x)
    worst = max(float(units(g, w).max()) for g, w in zip(got.split(PIECE), wanted, strict=True))
    print(f"{kind}: {worst:.2f} units in the last place")
    assert worst <= 5
    torch.testing.assert_close(pk.logsumexp(x).double(), total, rtol=2.0**-23, atol=2.0**-22)


@pytest.mark.parametrize("n", [KEPT, STREAMED], ids=["kept", "streamed"])
def test_results_past_the_cache_are_the_same_bits(n):
    """In place and at an odd address nothing is streamed; -inf at both ends shows what is not written."""
    memory = torch.full((n + 32,), float("nan"))
    start = -memory.data_ptr() % 64 // 4
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).mul_(3)
    x[0] = x[-1] = -INF
    for op, first in ((pk.softmax, 0.0), (pk.log_softmax, -INF)):
        aligned, odd = memory[start : start + n], memory[start + 1 : start + 1 + n]
        inplace = x.clone()
        op(inplace, out=inplace)
        for out in (aligned, odd):
            memory.fill_(float("nan"))
            with native.use_threads(2):
                op(x, out=out)
            assert out[0] == out[-1] == first
            assert_same_bits(out, inplace)
            assert int(memory.isnan().sum()) == 32
