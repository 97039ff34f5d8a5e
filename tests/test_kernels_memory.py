"""What kernels do to memory: nothing outside, any alignment; the same bits for any threads and chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pykernels.cut import Cut
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, EDGES, SHORT, Case, make, weights
from tests.walls import Walls

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
Place = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(params=native.isas())
def isa(request):
    """Every instruction set that this machine has, one after another."""
    with native.use_isa(request.param):
        yield request.param


def every_kernel(numel: int, dtype: torch.dtype, place: Place, out_place: Place) -> dict[str, torch.Tensor]:
    """Every compiled function, run on inputs and outputs put where the places say."""
    base, tuned = make("ties", numel, 2, dtype)
    base, tuned = place(base), [place(t) for t in tuned]
    weight, k = weights(2), [numel // 3, numel]
    masks = ([30_000] * 2, [0, 5], 99)

    def out(kind: torch.dtype = dtype) -> torch.Tensor:
        return out_place(torch.full((numel,), math.nan if kind.is_floating_point else 77, dtype=kind))

    results = {
        "linear": out(),
        "ties": out(),
        "fused": out(),
        "dare": out(),
        "elect": out(torch.int8),
        "wide": out(torch.float32),
    }
    cut = native.kth_magnitude(base, tuned, k)
    native.linear_merge(results["linear"], base, tuned, weight)
    native.linear_merge(results["wide"], None, tuned, weight)
    native.ties_merge(results["ties"], base, tuned, cut, weight, None, weight, 1.0, "weighted")
    native.ties_fused(results["fused"], base, tuned, k, "index", weight, [1.0, 1.0], None, 1.0, "plain")
    native.dare_merge(results["dare"], base, tuned, *masks, weight, None, weight, 1.0, "weighted", 4096)
    native.elect_sign(results["elect"], tuned, weight, "weighted")
    results["kth"] = torch.tensor([*cut.key, *cut.last])
    results["l1"] = native.l1_norms(base, tuned, *masks, 4096)
    results["dots"] = native.dot_products(tuned[1], base, tuned)
    results["bins"] = native.magnitude_histogram(base, tuned, 16, None)
    results["nonfinite"] = torch.tensor(native.count_nonfinite(base))
    return results


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where the allocator puts it."""
    return tensor.clone()


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("numel", [n for n in EDGES if n > 2] + [70_001])
def test_nothing_outside_is_read_or_written(numel, at_end, isa):
    dtype, walls = DTYPES[numel % 3], Walls()
    wanted = every_kernel(numel, dtype, plain, plain)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return walls.place(tensor, at_end=at_end)

    got = every_kernel(numel, dtype, place, place)
    for name, result in got.items():
        assert_same_bits(result.clone(), wanted[name])


def shifted(shift: int) -> Place:
    """Copies that begin ``shift`` bytes past an aligned address, among bytes that must stay as they are."""

    def place(tensor: torch.Tensor) -> torch.Tensor:
        nbytes = tensor.numel() * tensor.element_size()
        memory = torch.full((nbytes + 256,), 0xA5, dtype=torch.uint8)
        start = -memory.data_ptr() % 64 + 64 + shift
        memory[start : start + nbytes] = tensor.view(torch.uint8)
        view = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start)
        view.canaries = (memory[:start], memory[start + nbytes :])
        return view

    return place


@pytest.mark.parametrize("shift", [1, 2, 3, 5, 31, 32, 63])
@pytest.mark.parametrize("numel", [33, 129, 4097, 70_001])
def test_any_byte_alignment(numel, shift, isa):
    dtype = DTYPES[(numel + shift) % 3]
    wanted = every_kernel(numel, dtype, plain, plain)
    got = every_kernel(numel, dtype, shifted(shift), shifted((shift * 7) % 64))
    for name, result in got.items():
        assert_same_bits(result.clone(), wanted[name])
        for bytes_ in getattr(result, "canaries", ()):
            assert bool((bytes_ == 0xA5).all()), f"{name} wrote outside"


def test_streamed_results_at_any_alignment(isa):
    base, tuned = make("gaussian", 2**19 + 130, 2, torch.float32)
    wanted = torch.empty_like(base)
    native.linear_merge(wanted, base, tuned, weights(2))
    for shift in (0, 1, 4, 32):
        out = shifted(shift)(torch.full_like(base, math.nan))
        native.linear_merge(out, base, tuned, weights(2))
        assert_same_bits(out.clone(), wanted)
        assert all(bool((c == 0xA5).all()) for c in out.canaries)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_bits_do_not_depend_on_threads(dtype, threads, isa):
    numel = 65536 * 5 + 131
    with native.use_threads(1):
        wanted = every_kernel(numel, dtype, plain, plain)
    with native.use_threads(threads):
        for name, result in every_kernel(numel, dtype, plain, plain).items():
            assert_same_bits(result, wanted[name])


@pytest.mark.parametrize("step", [4096, 3 * 4096, 65536, 65536 + 4096])
@pytest.mark.parametrize(
    "case", [Case("ties_merge", "ties"), Case("dare_merge"), Case("dare_merge", elect="plain")], ids=str
)
def test_bits_do_not_depend_on_chunks(case, step, isa):
    numel = 65536 * 3 + 4096 + 77
    base, tuned = make(case.data, numel, case.models, case.dtype)
    cut = native.kth_magnitude(base, tuned, [numel // 3] * case.models)
    whole, parts = torch.full_like(base, math.nan), torch.full_like(base, math.nan)
    for out, width in ((whole, numel), (parts, step)):
        for start in reversed(range(0, numel, width)):
            part = slice(start, start + width)
            inputs = (out[part], base[part], [t[part] for t in tuned])
            if case.op == "ties_merge":
                native.ties_merge(*inputs, cut, *case.combine(), start)
            else:
                native.dare_merge(*inputs, *case.masks(), *case.combine(), start)
    assert_same_bits(parts, whole)


def test_l1_norms_and_histograms_add_up_over_chunks(isa):
    numel = 65536 * 2 + 4096 + 77
    base, tuned = make("gaussian", numel, 2, torch.float16)
    masks, step = ([30_000] * 2, [0, 5], 99), 5 * 4096
    parts = [slice(s, s + step) for s in range(0, numel, step)]
    norms = [native.l1_norms(base[p], [t[p] for t in tuned], *masks, p.start) for p in parts]
    assert torch.equal(torch.cat(norms), native.l1_norms(base, tuned, *masks, 0))
    bins = [native.magnitude_histogram(base[p], [t[p] for t in tuned], 16, None) for p in parts]
    assert torch.equal(sum(bins), native.magnitude_histogram(base, tuned, 16, None))


def test_a_cut_falls_right_in_a_chunk_that_starts_anywhere(isa):
    d = torch.ones(5 * 4096)
    for last in (-1, 0, 4095, 4096, 10_000, 5 * 4096 - 1):
        got = torch.full_like(d, math.nan)
        for start in range(0, len(d), 4096):
            native.trim(got[start : start + 4096], d[start : start + 4096], Cut([0x3F800000], [last]), start)
        assert int(got.sum()) == last + 1 and bool(got[: last + 1].all())


@pytest.mark.large
def test_more_elements_than_an_int32_counts():
    numel = 2**31 + 4096 + 7
    tuned = torch.ones(numel, dtype=torch.bfloat16)
    tuned[-5:] = -3
    out = torch.empty_like(tuned)
    native.linear_merge(out, None, [tuned], [0.5])
    assert bool((out[-5:] == -1.5).all()) and bool((out[-4200:-5] == 0.5).all()) and float(out[0]) == 0.5
    assert native.kth_magnitude(None, [tuned], [6]) == Cut([0x3F800000], [0])
    native.trim(out, tuned, Cut([0x3F800000], [2**31 + 1]))
    assert float(out[2**31 + 1]) == 1 and not out[2**31 + 2 : -5].any() and bool((out[-5:] == -3).all())
    native.drop_rescale(out, tuned, 0, 1, 1.0)
    assert not out[-(2**20) :].any()
    del out
    signs = torch.zeros(numel, dtype=torch.int8)
    native.elect_sign(signs, [tuned], [1.0], "plain")
    assert bool((signs[-5:] == -1).all()) and bool((signs[-4200:-5] == 1).all())
