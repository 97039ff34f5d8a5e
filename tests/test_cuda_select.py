"""The exact k-th magnitude on a device: every way to the cut, against sorted keys."""

from __future__ import annotations

import pytest
import torch

from pykernels import cuda
from pykernels.ref.delta import delta, key
from tests.bounds import assert_same_bits
from tests.cases import DATA, DTYPES, EDGES, SHORT, make, one_nan
from tests.test_kernels_select import cut_by_hand, ranks
from tests.where import EMULATED, there

SAMPLE = 16384
"""As in csrc/cuda/kth_magnitude.cu: up to here everything is sampled."""


def assert_cuts(base, tuned, k):
    """The kernel's cuts are those of sorted keys."""
    base, tuned = one_nan(base, tuned)
    cut = cuda.kth_magnitude(there(base), there(tuned), k)
    got = list(zip(cut.key.tolist(), cut.last.tolist(), strict=True))
    for m, (count, tensor) in enumerate(zip(k, tuned, strict=True)):
        wanted = cut_by_hand(key(delta(base, tensor)), count)
        assert got[m] == wanted, f"model {m}, k {count}"


@pytest.mark.parametrize("numel", [n for n in EDGES if n > 1] + [SAMPLE - 1, SAMPLE, SAMPLE + 1, 150_001])
@pytest.mark.parametrize("data", ["gaussian", "ties"])
def test_kth_magnitude_is_exact(data, numel):
    base, tuned = make(data, numel, 2, DTYPES[numel % 3])
    for k in ranks(numel):
        assert_cuts(base, tuned, [k, numel - k])


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("data", DATA)
def test_kth_magnitude_of_every_kind_of_data(data, dtype):
    numel, models = 70_003, 9
    k = [1, 0, numel, numel - 1, 20_000, 50_000, 60_000, 77, 25_001]
    assert_cuts(*make(data, numel, models, dtype), k)


def test_no_elements_and_no_base():
    empty = there(torch.empty(0))
    cut = cuda.kth_magnitude(empty, [empty], [0])
    assert (cut.key.tolist(), cut.last.tolist()) == ([0xFFFFFFFF], [-1])
    cut = cuda.kth_magnitude(None, [there(torch.tensor([1.0, -3.0, 2.0]))], [2])
    assert (cut.key.tolist(), cut.last.tolist()) == ([0x40000000], [2])


def sampled(numel: int) -> torch.Tensor:
    """Flat indices [16384] of the sample that the kernel takes."""
    i = torch.arange(SAMPLE)
    word = 0xFFFFFFFF
    h = i * 0x9E3779B9 & word
    h = (h ^ h >> 16) * 0x85EBCA6B & word
    h = (h ^ h >> 13) * 0xC2B2AE35 & word
    h = h ^ h >> 16
    begin, end = i * numel // SAMPLE, (i + 1) * numel // SAMPLE
    return begin + (h * (end - begin) >> 32)


def hidden(seen: torch.Tensor, rest: float, numel: int) -> torch.Tensor:
    """A delta that holds ``seen`` where the sample looks and ``rest`` elsewhere."""
    x = torch.full((numel,), rest)
    x[sampled(numel)] = seen
    return x


def test_the_sample_lies_where_this_test_believes():
    numel = 100_003
    x = hidden(torch.arange(1.0, SAMPLE + 1), 0.0, numel)
    assert len(sampled(numel).unique()) == SAMPLE
    assert_cuts(None, [x], [8000])


@pytest.mark.parametrize("case", ["larger", "smaller", "many between"])
def test_a_bracket_that_missed_is_searched_anew(case):
    numel = 100_003
    g = torch.Generator().manual_seed(3)
    if case == "larger":  # all that is large was not seen: the wanted key lies above the bracket
        x = hidden(torch.rand(SAMPLE, generator=g), 5.0, numel)
    elif case == "smaller":
        x = hidden(1 + torch.rand(SAMPLE, generator=g), 0.25, numel)
    else:  # the bracket holds more than there is room for
        x = hidden((torch.arange(SAMPLE) % 2) * 2 + 1.0, 2.0, numel)
        x[sampled(numel)[0]] = 2.5
    assert_cuts(None, [x, x.flip(0)], [numel // 2, numel // 3])


@pytest.mark.skipif(not EMULATED, reason="a device runs blocks and threads in an order of its own")
def test_the_order_of_blocks_and_threads_does_not_show():
    base, tuned = make("student", 70_003, 3, torch.bfloat16)
    out, backwards = torch.empty_like(base), torch.empty_like(base)
    k, rest = [7000, 30_000, 69_000], ([1.0, 2.0, 0.5], None, [1.0] * 3, 1.0, "weighted")
    cuda.ties_fused(out, base, tuned, k, "index", *rest)
    cuda._cuda.reverse(True)
    try:
        cuda.ties_fused(backwards, base, tuned, k, "index", *rest)
    finally:
        cuda._cuda.reverse(False)
    assert_same_bits(backwards, out)


@pytest.mark.skipif(EMULATED, reason="needs a device")
def test_a_graph_replays_selection_and_merge():
    base, tuned = (there(x) for x in make("student", 300_003, 3, torch.bfloat16))
    out, again = torch.empty_like(base), torch.empty_like(base)
    arguments = (base, tuned, [30_000] * 3, "index", [1.0] * 3, None, [1.0] * 3, 1.0, "weighted")
    cuda.ties_fused(out, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.ties_fused(again, *arguments)
    again.zero_()
    graph.replay()
    assert_same_bits(again.cpu(), out.cpu())
