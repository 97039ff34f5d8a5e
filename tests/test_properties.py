"""What holds for every shape, stride, offset and number of models, on examples that hypothesis finds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pykernels as pk
from pykernels.methods import METHODS
from pykernels.ref.philox import draws, mask_key
from tests.bounds import assert_same_bits
from tests.cases import DATA, DTYPES, make

settings.register_profile("pykernels", max_examples=200, deadline=None, derandomize=True)
settings.load_profile("pykernels")

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
dtypes = st.sampled_from(DTYPES)
sizes = st.one_of(st.integers(0, 300), st.sampled_from([4095, 4096, 4097, 65535, 65537, 70_001]))
densities = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-9, 0.5, 1.0]))
kinds = st.sampled_from(sorted(DATA))


def merges(base, tuned, density, seed=1):
    """One result of every op."""
    yield pk.linear_merge([base, *tuned], 0.5)
    yield pk.task_arithmetic(base, tuned, weight=0.7)
    yield pk.ties_merge(base, tuned, density=density)
    yield pk.ties_merge(base, tuned, density=density, tie="keep", elect="plain", normalize="count")
    yield pk.dare_merge(base, tuned, density=density, seed=seed)
    yield pk.dare_merge(
        base, tuned, density=density, seed=seed, rescale="l1", consensus="ties", elect="plain"
    )
    yield pk.trim(tuned[0], density)
    yield pk.drop_rescale(tuned[0], density, seed=seed)
    yield pk.elect_sign(tuned, 0.5)
    yield pk.kth_magnitude(base, tuned, density)


def moved(tensor: torch.Tensor, shift: int) -> torch.Tensor:
    """A copy that begins ``shift`` bytes past an aligned address."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return tensor.clone()
    memory = torch.zeros(nbytes + 192, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + shift
    copy = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return copy.copy_(tensor)


@given(shapes, dtypes, kinds, densities, st.integers(1, 5))
def test_shapes_do_not_matter(shape, dtype, data, density, models):
    base, tuned = make(data, math.prod(shape), models, dtype)
    shaped = merges(base.reshape(shape), [t.reshape(shape) for t in tuned], density)
    for got, flat in zip(shaped, merges(base, tuned, density), strict=True):
        assert_same_bits(got.reshape(flat.shape), flat)


@given(sizes, dtypes, kinds, densities, st.lists(st.integers(0, 127), min_size=3, max_size=3))
def test_addresses_do_not_matter(numel, dtype, data, density, shifts):
    base, tuned = make(data, numel, 2, dtype)
    there = [moved(x, s) for x, s in zip((base, *tuned), shifts, strict=True)]
    for got, here in zip(merges(there[0], there[1:], density), merges(base, tuned, density), strict=True):
        assert_same_bits(got, here)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.booleans(), dtypes)
def test_strides_are_refused_or_right(rows, columns, row_step, column_step, transposed, dtype):
    whole = torch.arange(rows * row_step * columns * column_step).reshape(rows * row_step, -1).to(dtype)
    view = whole[::row_step, ::column_step]
    view = view.t() if transposed else view
    if view.is_contiguous():
        assert torch.equal(pk.task_arithmetic(view, [view]), view)
    else:
        for base, tuned in ((view, view.contiguous()), (view.contiguous(), view)):
            with pytest.raises(ValueError, match="must be contiguous, got strides"):
                pk.task_arithmetic(base, [tuned])
        with pytest.raises(ValueError, match="out must be contiguous"):
            pk.linear_merge([view.contiguous()], 1.0, out=view)


@given(sizes, dtypes, kinds, densities)
def test_trim_keeps_the_k_largest(numel, dtype, data, density):
    delta = make(data, numel, 1, dtype)[1][0].nan_to_num(0.0)
    kept = pk.trim(delta, density)
    k = 0 if density == 0 else min(numel, max(1, int(density * numel)))
    chosen = kept != 0
    assert int(chosen.sum()) == min(k, int((delta != 0).sum()))
    assert torch.equal(kept[chosen], delta[chosen])
    if bool(chosen.any()) and not bool(chosen.all()):
        assert delta[~chosen].abs().max() <= delta[chosen].abs().min()
        equals = delta.abs() == delta[chosen].abs().min()
        first = torch.nonzero(equals).reshape(-1)[: int((equals & chosen).sum())]
        assert bool(chosen[first].all())
    assert not bool((chosen & (pk.trim(delta, density, tie="keep") == 0)).any())


@given(sizes, densities, st.integers(0, 2**64 - 1), st.text(max_size=20))
def test_drops_depend_on_seed_and_name_alone(numel, density, seed, name):
    kept = draws(mask_key(seed, name), 0, 0, numel) < round(density * 65536)
    for dtype in DTYPES:
        got = pk.drop_rescale(torch.ones(numel, dtype=dtype), density, seed=seed, name=name, rescale=None)
        assert torch.equal(got != 0, kept)


@given(dtypes, kinds, densities, st.permutations(range(4)))
def test_exact_sums_do_not_depend_on_the_order_of_models(dtype, data, density, order):
    base, tuned = make("integers", 1000, 4, dtype)
    weight = [1.0, 0.5, -2.0, 0.25]
    turned, turned_weight = [tuned[i] for i in order], [weight[i] for i in order]
    for options in ({"normalize": False}, {"elect": "plain"}, {"tie": "keep"}):
        assert torch.equal(
            pk.ties_merge(base, tuned, density=density, weight=weight, **options),
            pk.ties_merge(base, turned, density=density, weight=turned_weight, **options),
        )


@given(st.sampled_from([0.25, 0.5, 2.0, 64.0]), kinds, densities)
def test_a_common_factor_of_the_weights_cancels(factor, data, density):
    base, tuned = make(data, 1000, 3, torch.bfloat16)
    for options in ({}, {"elect": "plain"}):
        once = pk.ties_merge(base, tuned, density=density, weight=[1.0, 0.5, 0.7], **options)
        more = pk.ties_merge(
            base, tuned, density=density, weight=[factor, 0.5 * factor, 0.7 * factor], **options
        )
        finite = once.isfinite() & more.isfinite()
        assert torch.equal(once[finite], more[finite])


def over_chunks(method, p, base, tuned, chunks, shuffle):
    """All rounds of the statistic and then the merge, chunk by chunk in an order that ``shuffle`` makes."""
    statistic = method.statistic(p, base.numel())
    while statistic is not None and not statistic.done:
        shuffle(chunks)
        for c in chunks:
            statistic.update(base[c], [t[c] for t in tuned], c.start)
        statistic.next_round()
    out = torch.full_like(base, math.nan)
    for c in chunks:
        stats = statistic.finish() if statistic is not None else None
        method.merge(p, out[c], base[c], [t[c] for t in tuned], c.start, stats)
    return out


@given(
    st.sampled_from(sorted(METHODS)),
    kinds,
    st.sampled_from((*DTYPES, torch.float64)),
    densities,
    st.sampled_from(["index", "keep"]),
    st.sampled_from(["density", "l1"]),
    st.integers(1, 6),
    st.randoms(),
)
def test_methods_over_chunks_give_the_bits_of_the_op(
    name, data, dtype, density, tie, rescale, blocks, random
):
    numel = 5 * 4096 + 77
    base, tuned = make(data, numel, 2, dtype)
    method = METHODS[name]
    p = {
        "weight": [1.0, 0.5], "density": [density, density], "lambda": 0.7, "normalize": True, "tie": tie,
        "elect": "weighted", "rescale": rescale, "seed": 1, "name": "w",
    }  # fmt: skip
    chunks = [slice(s, min(numel, s + 4096 * blocks)) for s in range(0, numel, 4096 * blocks)]
    out = over_chunks(method, p, base, tuned, chunks, random.shuffle)
    options = {"weight": p["weight"], "normalize": True}
    dare = {"density": density, "seed": 1, "name": "w", "lambda_": 0.7, "rescale": rescale}
    wanted = {
        "linear": lambda: pk.linear_merge(tuned, **options),
        "passthrough": lambda: tuned[0],
        "task_arithmetic": lambda: pk.task_arithmetic(base, tuned, lambda_=0.7, **options),
        "ties": lambda: pk.ties_merge(base, tuned, density=density, lambda_=0.7, tie=tie, **options),
        "dare_linear": lambda: pk.dare_merge(base, tuned, **dare, **options),
        "dare_ties": lambda: pk.dare_merge(base, tuned, consensus="ties", **dare, **options),
    }[name]()
    assert_same_bits(out, wanted)


def test_a_float64_cut_whose_first_digits_are_zero():
    g = torch.Generator().manual_seed(0)
    delta = torch.randint(1, 2**31, (8192,), generator=g).view(torch.float64).clone()  # subnormals
    delta[::10] = 1.0
    p = {
        "weight": [1.0],
        "density": [0.5],
        "lambda": 1.0,
        "normalize": True,
        "tie": "index",
        "elect": "weighted",
    }
    base, chunks = torch.zeros_like(delta), [slice(0, 4096), slice(4096, 8192)]
    merged = over_chunks(METHODS["ties"], p, base, [delta], chunks, list.reverse)
    assert_same_bits(merged, pk.ties_merge(base, [delta], density=0.5))
