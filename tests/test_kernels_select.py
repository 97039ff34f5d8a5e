"""The exact k-th magnitude and one-pass TIES: every way to the cut, against sorted keys and two passes."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from pykernels.cut import KEEP_ALL_EQUALS, Cut
from pykernels.ref.delta import delta, key
from pykernels.ref.kth_magnitude import kth_magnitude
from pykernels.ref.magnitude_histogram import magnitude_histogram
from tests.bounds import assert_same_bits
from tests.cases import DATA, DTYPES, EDGES, SHORT, make, weights

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
SAMPLED = 65537  # the least size at which the cut is found through a sample


@pytest.fixture(params=native.isas())
def isa(request):
    """Every instruction set that this machine has, one after another."""
    with native.use_isa(request.param):
        yield request.param


@functools.lru_cache(maxsize=2)
def sorted_keys(data: str, numel: int, models: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Keys of every model, in index order, to cut by hand."""
    base, tuned = make(data, numel, models, dtype)
    return [key(delta(base, t)) for t in tuned]


def cut_by_hand(keys: torch.Tensor, k: int) -> tuple[int, int]:
    """Sort by key, then by index; the k-th in that order is the last one kept. None is, where k is 0."""
    if k == 0:
        return 0xFFFFFFFF, -1
    order = torch.sort(keys, descending=True, stable=True)
    return int(order.values[k - 1]), int(order.indices[k - 1])


def ranks(numel: int) -> list[int]:
    """Ranks at both ends and between."""
    return sorted({k for k in (1, 2, numel // 100, numel // 5, numel // 2, numel - 1) if 0 < k < numel})


@pytest.mark.parametrize("numel", [n for n in EDGES if n > 1] + [SAMPLED + 4095, 150_001])
@pytest.mark.parametrize("data", ["gaussian", "ties"])
def test_kth_magnitude_is_exact(data, numel, isa):
    dtype = DTYPES[numel % 3]
    for k in ranks(numel):
        got = native.kth_magnitude(*make(data, numel, 2, dtype), [k, numel - k])
        wanted = [
            cut_by_hand(s, n) for s, n in zip(sorted_keys(data, numel, 2, dtype), (k, numel - k), strict=True)
        ]
        assert list(zip(*got, strict=True)) == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("data", DATA)
def test_kth_magnitude_of_every_kind_of_data(data, dtype, isa):
    numel, models = 100_003, 9  # more models than share one counting pass
    k = [1, 0, numel, numel - 1, 20_000, 50_000, 90_000, 77, 25_001]
    got = native.kth_magnitude(*make(data, numel, models, dtype), k)
    for m, count in enumerate(k):
        wanted = (0xFFFFFFFF, -1) if count == 0 else (0, numel - 1)
        if 0 < count < numel:
            wanted = cut_by_hand(sorted_keys(data, numel, models, dtype)[m], count)
        assert (got.key[m], got.last[m]) == wanted, f"model {m}, k {count}"


def test_no_elements_and_no_base(isa):
    empty = torch.empty(0)
    assert native.kth_magnitude(empty, [empty], [0]) == Cut([0xFFFFFFFF], [-1])
    assert native.kth_magnitude(None, [torch.tensor([1.0, -3.0, 2.0])], [2]) == Cut([0x40000000], [2])


@functools.lru_cache(maxsize=1)
def hidden() -> tuple[list[torch.Tensor], list[int]]:
    """64 models, each with a cluster of 200 large entries: for some of them it lies between two samples."""
    numel, g = 2**18, torch.Generator().manual_seed(5)
    models = []
    for m in range(64):
        d = torch.randn(numel, generator=g) * 1e-3
        start = 256 * (1 + 15 * m) + 56
        d[start : start + 200] = 1 + torch.rand(200, generator=g)
        models.append(d.to(torch.bfloat16))
    return models, [160] * 64


@functools.lru_cache(maxsize=1)
def halves() -> tuple[list[torch.Tensor], list[int]]:
    """Eight models of two magnitudes, half each, cut at the border: too many candidates to hold."""
    g = torch.Generator().manual_seed(6)
    models = [torch.randint(1, 3, (2**19 + 77,), generator=g).to(torch.bfloat16) for _ in range(8)]
    return models, [int((m == 2).sum()) + (i % 3) - 1 for i, m in enumerate(models)]


@functools.lru_cache(maxsize=1)
def missing() -> tuple[list[torch.Tensor], list[int]]:
    """Mostly NaN and Inf, cut among the NaN, the Inf and the numbers."""
    g = torch.Generator().manual_seed(7)
    d = torch.randn(100_003, generator=g)
    d[torch.rand(100_003, generator=g) < 0.5] = math.nan
    d[torch.rand(100_003, generator=g) < 0.5] = -math.inf
    d = d.to(torch.bfloat16)
    return [d] * 3, [10_000, 60_000, 90_000]


@functools.lru_cache(maxsize=1)
def one_value() -> tuple[list[torch.Tensor], list[int]]:
    """One magnitude throughout, which the sample takes for the cut; ranks at both ends."""
    d = torch.ones(2**17 + 5)
    d[::3] = -1
    return [d] * 4, [1, 70_000, 2**17, 2**17 + 4]


@functools.lru_cache(maxsize=1)
def mostly_zero() -> tuple[list[torch.Tensor], list[int]]:
    """Few entries that moved, and a cut among the zeros; another just above them."""
    d = torch.zeros(2**17 + 5)
    d[::10] = torch.arange(1.0, len(d[::10]) + 1)
    moved = len(d[::10])
    return [d] * 3, [moved + 3000, moved, moved - 1]


ADVERSARIES = [hidden, halves, missing, one_value, mostly_zero]


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("threads", [1, 3])
def test_data_that_mislead_the_sample(adversary, threads, isa):
    models, k = adversary()
    with native.use_threads(threads):
        got = native.kth_magnitude(None, models, k)
    assert got == _true_cut(adversary)


@functools.lru_cache(maxsize=len(ADVERSARIES))
def _true_cut(adversary) -> Cut:
    models, k = adversary()
    return kth_magnitude(None, models, k)


@pytest.mark.parametrize("tie", ["index", "keep"])
@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda f: f.__name__)
def test_one_pass_ties_on_data_that_mislead_the_sample(adversary, tie, isa):
    models, k = adversary()
    _fused_equals_two_passes(None, models[:8], k[:8], tie, "weighted")


@pytest.mark.parametrize("tie", ["index", "keep"])
def test_one_pass_ties_whose_bracket_missed(tie, isa):
    cut = _true_cut(hidden)
    for m, d in enumerate(hidden()[0]):  # one by one: beside a model that needs a wide bracket none is used
        wanted, got = torch.empty_like(d), torch.full_like(d, math.nan)
        native.trim(wanted, d, Cut([cut.key[m]], [KEEP_ALL_EQUALS if tie == "keep" else cut.last[m]]))
        native.ties_fused(got, None, [d], [160], tie, [1.0], None, None, 1.0, "weighted")
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("elect", ["weighted", "plain", None])
@pytest.mark.parametrize("tie", ["index", "keep"])
@pytest.mark.parametrize("data", DATA)
def test_one_pass_ties_gives_the_bits_of_two_passes(data, tie, elect, isa):
    numel = 65536 * 3 + 4096 + 131
    dtype = DTYPES[len(data + tie) % 3]
    k = [numel // 5, numel // 2, numel // 100]
    _fused_equals_two_passes(*make(data, numel, 3, dtype), k, tie, elect)


@pytest.mark.parametrize("numel", [n for n in EDGES if n > 2] + [65536 + 127, 131072, 131073])
def test_one_pass_ties_at_every_edge(numel, isa):
    for tie in ("index", "keep"):
        base, tuned = make("ties", numel, 2, DTYPES[numel % 3])
        _fused_equals_two_passes(base, tuned, [numel // 2, 0], tie, "weighted")
        _fused_equals_two_passes(base, tuned, [numel, 1], tie, "weighted")


@pytest.mark.parametrize("models", [1, 2, 8, 9, 64])
def test_one_pass_ties_with_many_models(models, isa):
    numel = 65536 + 4096 + 5
    base, tuned = make("gaussian", numel, models, torch.bfloat16)
    _fused_equals_two_passes(base, tuned, [numel // 5 - 31 * m for m in range(models)], "index", "weighted")


@pytest.mark.parametrize(
    "out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=SHORT.get
)
def test_one_pass_ties_into_other_dtypes(out_dtype, isa):
    base, tuned = make("gaussian", 2**17 + 33, 3, torch.bfloat16)
    _fused_equals_two_passes(base, tuned, [30_000] * 3, "index", "weighted", out_dtype)


def _fused_equals_two_passes(base, tuned, k, tie, elect, out_dtype=None):
    n = len(tuned)
    weight, vote = weights(n), [1.0] * n if elect == "plain" else None
    rest = (weight, vote, weight if elect else None, 0.7, elect)
    cut = kth_magnitude(base, tuned, k)
    if tie == "keep":
        cut = Cut(cut.key, [last if last < 0 else KEEP_ALL_EQUALS for last in cut.last])
    wanted = torch.full_like(tuned[0], math.nan, dtype=out_dtype)
    got = wanted.clone()
    native.ties_merge(wanted, base, tuned, cut, *rest)
    for threads in (1, 3):
        got.fill_(math.nan)
        with native.use_threads(threads):
            native.ties_fused(got, base, tuned, k, tie, *rest)
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_histograms_are_equal(dtype, isa):
    base, tuned = make("special", 70_001, 2, dtype)
    top = native.magnitude_histogram(base, tuned, 16, None)
    assert torch.equal(top, magnitude_histogram(base, tuned, 16, None))
    prefix = [int(t.argmax()) for t in top]
    low = native.magnitude_histogram(base, tuned, 0, prefix)
    assert torch.equal(low, magnitude_histogram(base, tuned, 0, prefix))
    assert [int(n) for n in low.sum(1)] == [int(t.max()) for t in top]
