"""The selection of the Triton backend: every way to the cut, against sorted keys and the TIES of the CPU."""

from __future__ import annotations

import functools
import math

import pytest
import torch

pytest.importorskip("triton")

from pykernels import grouping, native
from pykernels.kernels import launch, selection
from pykernels.kernels.kth_magnitude import kth_magnitude, magnitude_histogram
from pykernels.kernels.ties_merge import ties_fused
from pykernels.ref import magnitude_histogram as ref_histogram
from pykernels.ref.delta import delta, key
from tests.bounds import assert_same_bits
from tests.cases import DATA, DTYPES, EDGES, SHORT, make, one_nan, weights
from tests.test_kernels_select import cut_by_hand
from tests.where import nans, there

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, at Inf and NaN


@pytest.fixture
def long_way(monkeypatch):
    """Small tensors take the way of large ones, through a small sample."""
    monkeypatch.setattr(selection, "SMALL", 0)
    monkeypatch.setattr(selection, "SAMPLE", 1024)


@functools.lru_cache(maxsize=4)
def sorted_keys(data: str, numel: int, models: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Keys of every model in index order."""
    base, tuned = make(data, numel, models, dtype)
    return [key(delta(base, t)) for t in tuned]


def assert_cuts(base, tuned, k) -> None:
    """The cuts are those of sorted keys, and int64 tensors where the inputs are."""
    base, tuned = one_nan(base, tuned)
    cut = kth_magnitude(there(base), there(tuned), k)
    assert all(part.dtype == torch.int64 and part.device.type == launch_device() for part in cut)
    wanted = [cut_by_hand(key(delta(base, t)), count) for t, count in zip(tuned, k, strict=True)]
    assert list(zip(cut.key.tolist(), cut.last.tolist(), strict=True)) == wanted


def launch_device() -> str:
    """Where these tests run."""
    return there(torch.empty(0)).device.type


@pytest.mark.parametrize("numel", [n for n in EDGES if n > 1])
def test_small_selections_are_exact(numel):
    for data, dtype in (("gaussian", DTYPES[numel % 3]), ("ties", DTYPES[(numel + 1) % 3])):
        assert_cuts(*make(data, numel, 4, dtype), [1, numel // 2, numel, 0])


@pytest.mark.parametrize("numel", [n for n in EDGES if n > 1 and n not in (31, 33, 63, 65, 255, 257)])
def test_long_selections_are_exact(numel, long_way):
    for data, dtype in (("gaussian", DTYPES[numel % 3]), ("ties", DTYPES[(numel + 1) % 3])):
        assert_cuts(*make(data, numel, 2, dtype), [numel // 3, numel - 1])


@pytest.mark.parametrize("data", DATA)
def test_selections_of_every_kind_of_data(data):
    numel, dtype = 100_003, DTYPES[len(data) % 3]
    assert_cuts(*make(data, numel, 3, dtype), [1, 20_000, 90_000])
    assert_cuts(*make(data, numel, 3, dtype), [0, numel, numel - 1])


def test_no_elements_and_no_base():
    empty = there(torch.empty(0))
    assert [part.tolist() for part in kth_magnitude(empty, [empty], [0])] == [[0xFFFFFFFF], [-1]]
    three = there(torch.tensor([1.0, -3.0, 2.0]))
    assert [part.tolist() for part in kth_magnitude(None, [three], [2])] == [[0x40000000], [2]]


NUMEL = 70_001


def sampled() -> torch.Tensor:
    """Which elements of NUMEL the sample of 1024 takes."""
    seen = torch.zeros(NUMEL, dtype=torch.bool)
    seen[torch.arange(1024) * NUMEL // 1024] = True
    return seen


def misleading(case: str) -> torch.Tensor:
    """Magnitudes of which the sample gives a wrong picture."""
    noise = 0.5 + 0.5 * torch.rand(NUMEL, generator=torch.Generator().manual_seed(3))
    if case == "larger":
        return torch.where(sampled(), 100 * noise, noise)
    if case == "smaller":
        return torch.where(sampled(), noise, 100 * noise)
    place = torch.arange(NUMEL)
    crowd = (place >= 20_000) & (place < 27_000) & ~sampled()  # one tile's keys lie around the median
    return torch.where(crowd, 0.75 + 0.0005 * (noise - 0.75), noise)


@pytest.mark.parametrize("case", ["larger", "smaller", "crowded"])
def test_a_sample_that_misleads_is_found_out(case, long_way, monkeypatch):
    monkeypatch.setattr(selection, "CAPACITY", launch.TILE // 4)  # the band of a small sample is wide
    d = misleading(case)
    k = NUMEL // 2
    _, high, low = selection.ranks([k], NUMEL)
    ordered = d[sampled()].sort(descending=True).values
    kth = float(d.sort(descending=True).values[k - 1])
    inside = (d >= ordered[low - 1]) & (d <= ordered[high - 1])
    held = float(ordered[low - 1]) <= kth <= float(ordered[high - 1])
    assert held == (case == "crowded")
    if held:
        per_tile = torch.nn.functional.pad(inside, (0, -NUMEL % launch.TILE)).view(-1, launch.TILE).sum(1)
        assert int(per_tile.max()) > selection.CAPACITY > int(per_tile.min())
    assert_cuts(None, [d, d], [k, k + 1])


def test_heavy_ties_and_missing_numbers():
    g = torch.Generator().manual_seed(7)
    d = torch.randn(100_003, generator=g)
    d[torch.rand(100_003, generator=g) < 0.5] = math.nan
    d[torch.rand(100_003, generator=g) < 0.5] = -math.inf
    assert_cuts(None, [d.bfloat16()] * 3, [10_000, 60_000, 90_000])
    moved = torch.zeros(2**17 + 5)
    moved[::10] = torch.arange(1.0, len(moved[::10]) + 1)
    count = len(moved[::10])
    assert_cuts(None, [moved] * 3, [count + 3000, count, count - 1])
    ones = torch.ones(2**17 + 5)
    assert_cuts(None, [ones] * 3, [1, 70_000, 2**17 + 4])
    halves = torch.randint(1, 3, (2**17 + 77,), generator=g).to(torch.float16)
    twos = int((halves == 2).sum())
    assert_cuts(None, [halves] * 3, [twos - 1, twos, twos + 1])


def assert_fused(base, tuned, k, tie, elect, out_dtype=None, over=None) -> None:
    """The bits of the CPU's one-pass TIES."""
    rest = (weights(len(tuned)), [1.0] * len(tuned) if elect == "plain" else None)
    rest = (*rest, weights(len(tuned)) if elect else None, 0.7, elect)
    wanted = torch.empty_like(tuned[0], dtype=out_dtype)
    native.ties_fused(wanted, base, tuned, k, tie, *rest)
    inputs = [there(x).clone() for x in tuned]
    out = nans(len(wanted), wanted.dtype) if over is None else inputs[over]
    ties_fused(out, there(base), inputs, k, tie, *rest)
    assert_same_bits(out.cpu(), wanted)


@pytest.mark.parametrize("elect", ["weighted", "plain", None])
@pytest.mark.parametrize("tie", ["index", "keep"])
def test_fused_ties_gives_the_bits_of_the_cpu(tie, elect):
    for data, dtype, numel in zip(
        ("gaussian", "ties", "special"), DTYPES, (40_001, 70_001, 9_001), strict=True
    ):
        assert_fused(*make(data, numel, 3, dtype), [numel // 5, numel // 2, 0], tie, elect)


@pytest.mark.parametrize("numel", [1, 2, 127, 4097, 16_384, 16_385])
def test_fused_ties_at_every_edge(numel):
    base, tuned = make("ties", numel, 2, DTYPES[numel % 3])
    assert_fused(base, tuned, [numel // 2, numel], "index", "weighted")
    assert_fused(base, tuned, [max(1, numel // 3), 1], "index", "weighted", torch.float64)
    assert_fused(base, tuned, [max(1, numel // 3), 1], "keep", "weighted", over=1)


def test_a_group_of_selections_takes_few_launches(monkeypatch):
    launches = []
    real = launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda self, *a, **k: (launches.append(1), real(self, *a, **k)))
    sizes = (1, 4097, 40_001, 0, 17_000, 300)
    groups = [(make("gaussian", n, 3, torch.bfloat16), [max(1, n // 5), n, 0]) for n in sizes]
    rest = (weights(3), None, weights(3), 1.0, "weighted")
    for tie, few in (("index", 10), ("keep", 9)):
        outs = [nans(n, torch.bfloat16) for n in sizes]
        launches.clear()
        with grouping.grouped():
            for ((base, tuned), k), out in zip(groups, outs, strict=True):
                if len(out):
                    ties_fused(out, there(base), there(tuned), k, tie, *rest)
            assert not launches
        assert len(launches) == 2 + few + 1  # the small ones: select, merge; the large ones: ..., merge
        for ((base, tuned), k), out in zip(groups, outs, strict=True):
            wanted = torch.empty_like(base)
            if len(out):
                native.ties_fused(wanted, base, tuned, k, tie, *rest)
            assert_same_bits(out.cpu(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize(("shift", "prefix"), [(16, None), (0, [0x3A00, 0, 0x3C80])])
def test_histograms_are_equal(shift, prefix, dtype):
    for data, numel in (("special", 4999), ("ties", 40_001), ("gaussian", 0)):
        base, tuned = one_nan(*make(data, numel, 3, dtype))
        got = magnitude_histogram(there(base), there(tuned), shift, prefix)
        assert torch.equal(got.cpu(), ref_histogram.magnitude_histogram(base, tuned, shift, prefix))
