"""The public ops against formulas written down here in float64, in every variant, dtype and backend."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import pykernels as pk
from pykernels.ref.philox import draws, mask_key
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT, make, weights

ALL = (*DTYPES, torch.float64)
NUMEL = 3001
CLOSE = {"rtol": 1e-5, "atol": 1e-9}


@pytest.fixture(params=["default", "ref"])
def backend(request):
    """What a user gets, and the references forced."""
    if request.param == "default":
        yield
    else:
        with pk.use_backend(request.param):
            yield


def mean_formula(deltas, weight, normalize, elect):
    """Elect and average [n, numel] deltas: votes and agreement by sign, in float64."""
    w = torch.tensor(weight, dtype=torch.float64)[:, None]
    votes = deltas * w if elect == "weighted" else deltas
    agree = votes.sign() == torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    total = (deltas * w * agree).sum(0)
    share = {True: w, "count": torch.ones_like(w), False: torch.zeros_like(w)}[normalize]
    divisor = (share * agree).sum(0)
    return total / divisor.where(divisor != 0, 1)


def trim_formula(delta, density, tie):
    """The k largest of one delta, by a stable sort."""
    k = max(1, int(density * delta.numel())) if density else 0
    order = delta.abs().sort(descending=True, stable=True)
    kept = torch.zeros_like(delta, dtype=torch.bool)
    kept[order.indices[:k]] = True
    if tie == "keep" and k:
        kept = delta.abs() >= order.values[k - 1]
    return delta.where(kept, 0.0)


def masks(density, seed, name, numel):
    """Keep masks and realised densities per model, by the draws."""
    threshold = [round(d * 65536) for d in density]
    return [
        (draws(mask_key(seed, name), m, 0, numel) < t, max(t, 1) / 65536) for m, t in enumerate(threshold)
    ]


@pytest.mark.parametrize(
    ("elect", "normalize", "tie", "density"),
    [
        (elect, normalize, tie, density)
        for elect, normalize, tie in itertools.product(
            ("weighted", "plain"), (True, False, "count"), ("index", "keep")
        )
        for density in (0.3, [0.1, 0.0, 1.0])
    ],
)
@pytest.mark.parametrize("data", ["gaussian", "ties"])
def test_ties_merge(data, elect, normalize, tie, density, backend):
    base, tuned = make(data, NUMEL, 3, torch.float32)
    per_model = density if isinstance(density, list) else [density] * 3
    deltas = torch.stack(
        [trim_formula(t.double() - base.double(), d, tie) for t, d in zip(tuned, per_model, strict=True)]
    )
    wanted = 0.7 * mean_formula(deltas, weights(3), normalize, elect)
    options = {"density": density, "weight": weights(3), "lambda_": 0.7, "normalize": normalize}
    got = pk.ties_merge(base, tuned, **options, elect=elect, tie=tie)
    torch.testing.assert_close(got, (base + wanted).float(), **CLOSE)
    vectors = [(t.double() - base.double()).float() for t in tuned]
    got = pk.ties_merge(None, vectors, **options, elect=elect, tie=tie)
    torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rescale", ["density", "l1", None])
@pytest.mark.parametrize(
    ("consensus", "normalize", "elect"),
    [
        (None, False, "weighted"),
        (None, True, "weighted"),
        *itertools.product(["ties"], [True, False, "count"], ["weighted", "plain"]),
    ],
)
def test_dare_merge(consensus, normalize, elect, rescale, backend):
    base, tuned = make("gaussian", NUMEL, 3, torch.float32)
    density, weight = [0.5, 0.25, 1.0], weights(3)
    deltas = []
    for t, (kept, keep) in zip(tuned, masks(density, 11, "w", NUMEL), strict=True):
        delta = t.double() - base.double()
        factor = {"density": 1 / keep, "l1": float(delta.abs().sum() / delta[kept].abs().sum()), None: 1.0}[
            rescale
        ]
        deltas.append(factor * delta.where(kept, 0.0))
    if consensus:
        mean = mean_formula(torch.stack(deltas), weight, normalize, elect)
    else:
        mean = sum(w * d for w, d in zip(weight, deltas, strict=True)) / (sum(weight) if normalize else 1)
    options = {"weight": weight, "lambda_": 1.5, "rescale": rescale, "consensus": consensus, "elect": elect}
    got = pk.dare_merge(base, tuned, density=density, seed=11, name="w", normalize=normalize, **options)
    torch.testing.assert_close(got, (base + 1.5 * mean).float(), **CLOSE)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
def test_linear_and_task_arithmetic(dtype, normalize, backend):
    base, tuned = make("gaussian", NUMEL, 3, dtype)
    weight = [0.5, -0.25, 1.5]
    divisor = sum(weight) if normalize else 1.0
    wide, close = [t.double() for t in tuned], {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-7}
    wanted = sum(w * t for w, t in zip(weight, wide, strict=True)) / divisor
    torch.testing.assert_close(pk.linear_merge(tuned, weight, normalize=normalize), wanted.to(dtype), **close)
    wanted = (
        base.double()
        + 0.5 * sum(w * (t - base.double()) for w, t in zip(weight, wide, strict=True)) / divisor
    )
    got = pk.task_arithmetic(base, tuned, weight=weight, lambda_=0.5, normalize=normalize)
    torch.testing.assert_close(got, wanted.to(dtype), **close)


@pytest.mark.parametrize("tie", ["index", "keep"])
@pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.3, 1.0])  # 0.3 is 19660.8 / 65536
def test_stages_on_their_own(density, dtype, tie, backend):
    base, [tuned] = make("ties", NUMEL, 1, dtype)
    delta = tuned - base
    assert torch.equal(pk.trim(delta, density, tie=tie).double(), trim_formula(delta.double(), density, tie))
    [(kept, keep)] = masks([density], 3, "v", NUMEL)
    got = pk.drop_rescale(delta, density, seed=3, name="v")
    torch.testing.assert_close(got, (delta.double().where(kept, 0.0) / keep).to(dtype), rtol=0.008, atol=0)
    assert torch.equal(
        pk.drop_rescale(delta, density, seed=3, name="v", rescale=None), delta.where(kept, 0.0)
    )


def test_l1_rescale_of_one_delta(backend):
    delta = make("student", NUMEL, 1, torch.float32)[1][0]
    got = pk.drop_rescale(delta, 0.1, seed=3, rescale="l1")
    assert float(got.double().abs().sum()) == pytest.approx(float(delta.double().abs().sum()), rel=1e-6)
    tiny = delta * 1e-12  # either norm below 1e-7: no rescale
    assert torch.equal(
        pk.drop_rescale(tiny, 0.1, seed=3, rescale="l1"), pk.drop_rescale(tiny, 0.1, seed=3, rescale=None)
    )
    assert not pk.drop_rescale(delta, 0.0, seed=3, rescale="l1").any()


@pytest.mark.parametrize("elect", ["weighted", "plain"])
@pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
def test_elect_sign(dtype, elect, backend):
    deltas = [t - 1 for t in make("gaussian", NUMEL, 4, dtype)[1]]
    wide = torch.stack([d.double() for d in deltas])
    weight = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()[:, None]
    votes = wide * weight if elect == "weighted" else wide[:3]
    wanted = torch.where(votes.sum(0) >= 0, 1, -1).to(torch.int8)
    got = pk.elect_sign(deltas, [1.0, -2.0, 0.5, 0.0], elect=elect)
    assert got.dtype == torch.int8 and torch.equal(got, wanted)


def test_kth_magnitude(backend):
    for dtype in ALL:
        base, tuned = make("student", 100, 3, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        deltas = [(t.to(wide) - base.to(wide)).abs().sort(descending=True).values for t in tuned]
        got = pk.kth_magnitude(base, tuned, [0.29, 1e-9, 0.5])  # int(0.29 * 100) is 28
        assert got.dtype == wide and got.tolist() == [
            float(deltas[0][27]),
            float(deltas[1][0]),
            float(deltas[2][49]),
        ]
        assert pk.kth_magnitude(base, tuned, 0.0).tolist() == [math.inf] * 3
    special = torch.tensor([math.nan, -math.inf, 2.0, 1.0])
    assert pk.kth_magnitude(None, [special] * 3, [0.5, 0.75, 1.0])[:2].tolist() == [math.inf, 2.0]
    assert bool(pk.kth_magnitude(None, [special], 0.25).isnan())


def test_kth_magnitude_of_density_one_is_the_smallest(backend):
    base, tuned = make("gaussian", NUMEL, 2, torch.float32)
    kth = pk.kth_magnitude(base, tuned, 1.0)
    assert kth.tolist() == [float((t - base).abs().min()) for t in tuned]


@pytest.mark.parametrize("numel", [0, 1])
@pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
def test_no_elements_and_one(numel, dtype, backend):
    base, delta = torch.ones(numel, 1, dtype=dtype), torch.full((numel, 1), 2.0, dtype=dtype)
    results = (
        pk.linear_merge([base, base], 1.0),
        pk.task_arithmetic(base, [base]),
        pk.ties_merge(base, [base, base], density=0.5),
        pk.dare_merge(base, [base], density=0.5, seed=1, rescale="l1"),
    )
    assert all(r.shape == (numel, 1) and bool((r == 1).all()) for r in results)
    assert torch.equal(pk.trim(delta, 0.1), delta) and pk.elect_sign([delta]).shape == (numel, 1)
    assert pk.drop_rescale(delta, 0.5, seed=1, rescale="l1").shape == (numel, 1)
    assert pk.kth_magnitude(None, [delta], 0.5).tolist() == [2.0 * numel]


def test_models_of_weight_0_take_no_part(backend):
    base, tuned = make("gaussian", NUMEL, 3, torch.float32)
    poison = torch.full_like(base, math.nan)
    with_poison, weight = [tuned[0], poison, tuned[2]], [0.5, 0.0, 2.0]
    rest = [tuned[0], tuned[2]]
    assert torch.equal(pk.linear_merge(with_poison, weight), pk.linear_merge(rest, [0.5, 2.0]))
    for normalize, tie in itertools.product((True, False, "count"), ("index", "keep")):
        options = {"normalize": normalize, "tie": tie}
        assert torch.equal(
            pk.ties_merge(base, with_poison, density=[0.5, 0.1, 0.2], weight=weight, **options),
            pk.ties_merge(base, rest, density=[0.5, 0.2], weight=[0.5, 2.0], **options),
        )
    # The index of a model counts for its mask, whether others take part or not.
    got = pk.dare_merge(base, with_poison, density=0.5, seed=1, weight=weight)
    clean = pk.dare_merge(base, [tuned[0], base, tuned[2]], density=0.5, seed=1, weight=[0.5, 1.0, 2.0])
    assert torch.equal(got, clean)
    none = {"weight": 0.0, "out_dtype": torch.float64}
    for result in (
        pk.task_arithmetic(base, tuned, **none),
        pk.ties_merge(base, tuned, density=0.5, **none),
        pk.ties_merge(base, tuned, density=1.0, **none),
        pk.dare_merge(base, tuned, density=0.5, seed=1, rescale="l1", **none),
    ):
        assert torch.equal(result, base.double())
    assert not pk.linear_merge(tuned, **none).any() and not pk.task_arithmetic(None, tuned, **none).any()
    assert bool((pk.elect_sign(tuned, 0.0) == 1).all())


def test_divisor_of_zero_and_below(backend):
    x, y = torch.tensor([3.0]), torch.tensor([5.0])
    assert pk.linear_merge([x, y], [1.0, -1.0]).tolist() == [-2.0]
    assert pk.linear_merge([x, y], [1.0, -3.0]).tolist() == [6.0]
    assert pk.task_arithmetic(None, [x, y], weight=[1.0, -1.0], normalize=True).tolist() == [-2.0]
    assert pk.dare_merge(None, [x, y], density=1.0, seed=0, weight=[1.0, -3.0], normalize=True).tolist() == [
        6.0
    ]
    assert pk.ties_merge(None, [x, -y], density=1.0, weight=[1.0, -1.0]).tolist() == [8.0]


@pytest.mark.parametrize("models", [1, 2, 7, 8, 9, 33, 64])
def test_one_to_64_models(models, backend):
    base, tuned = make("gaussian", 257, models, torch.bfloat16)
    deltas = torch.stack([trim_formula(t.double() - base.double(), 0.5, "index") for t in tuned])
    wanted = base.double() + mean_formula(deltas, weights(models), True, "weighted")
    got = pk.ties_merge(base, tuned, density=0.5, weight=weights(models), out_dtype=torch.float32)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)


def test_nan_and_inf_are_where_the_reference_has_them():
    for dtype in DTYPES:
        base, tuned = make("special", NUMEL, 3, dtype)
        for run in (
            lambda b, t: pk.linear_merge([b, *t], [0.5, 0.25, 0.25, 1.0]),
            lambda b, t: pk.task_arithmetic(b, t, weight=0.5),
            lambda b, t: pk.ties_merge(b, t, density=0.3),
            lambda b, t: pk.ties_merge(b, t, density=0.3, tie="keep", elect="plain", normalize="count"),
            lambda b, t: pk.dare_merge(b, t, density=0.3, seed=1),
            lambda b, t: pk.dare_merge(b, t, density=0.3, seed=1, rescale="l1", consensus="ties"),
            lambda b, t: pk.trim(t[0], 0.3),
            lambda b, t: pk.drop_rescale(t[0], 0.3, seed=1, rescale="l1"),
        ):
            got = run(base, tuned)
            with pk.use_backend("ref"):
                wanted = run(base, tuned)
            assert torch.equal(got.isnan(), wanted.isnan())
            infinite = wanted.isinf() & (got.double().abs() < torch.finfo(dtype).max)
            assert torch.equal(got[infinite], wanted[infinite])


def test_float64_goes_to_the_reference_with_float64_deltas():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    tuned = base + torch.tensor([3.0, 1.0, 2.0, 0.0], dtype=torch.float64) * 2**-50
    got = pk.ties_merge(base, [tuned], density=0.5)
    assert torch.equal(got, torch.tensor([tuned[0], 1.0, tuned[2], 1.0], dtype=torch.float64))
    assert pk.task_arithmetic(base, [tuned], weight=3.0)[1] == 1 + 3 * 2.0**-50
    merged = pk.dare_merge(base, [tuned], density=1.0, seed=1, consensus="ties")
    assert_same_bits(merged, tuned)


def test_weights_that_cancel_divide_by_one():
    x = torch.ones(4)
    cancel = [0.1, 0.2, -0.3]  # 0 in float32, 5.6e-17 in float64
    wanted = torch.full((4,), -0.4)
    for got in (
        pk.linear_merge([x, 2 * x, 3 * x], cancel),
        pk.task_arithmetic(None, [x, 2 * x, 3 * x], weight=cancel, normalize=True),
    ):
        torch.testing.assert_close(got, wanted)


def test_a_base_alone_is_rounded_once():
    base = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    got = pk.task_arithmetic(base, [base], weight=0.0, out_dtype=torch.bfloat16)
    assert got.item() == 1.0078125


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_graph_is_recorded(dtype):
    x = torch.nn.Parameter(torch.ones(5, dtype=dtype))
    assert not pk.linear_merge([x], 1.0).requires_grad
    assert not pk.task_arithmetic(x, [x], weight=0.0).requires_grad


def test_float64_outputs_of_narrow_inputs():
    x = torch.randn(300_001)
    torch.testing.assert_close(pk.linear_merge([x], 1.0, out_dtype=torch.float64), x.double(), rtol=0, atol=0)


def test_bits_do_not_depend_on_the_threads_float_mode():
    x = torch.full((1 << 19,), 1e-40)
    pk.linear_merge([x], 1.0)  # the pool has started
    torch.set_flush_denormal(True)
    try:
        got = pk.linear_merge([x], 1.0)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, x)


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5)])
def test_scalars_of_other_libraries(value):
    x = torch.arange(4.0)
    assert torch.equal(pk.linear_merge([x], value, normalize=False), x / 2)


@pytest.mark.parametrize("value", ["12", {1: 2, 3: 4}, True])
def test_what_is_no_weight(value):
    with pytest.raises(TypeError, match="weight must be a number or one per model"):
        pk.linear_merge([torch.ones(2)] * 2, value)
