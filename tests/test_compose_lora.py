"""compose_lora: exact where it can be, the nearest of its rank where not, and PEFT beside it."""

from __future__ import annotations

import pytest
import torch

import pykernels as pk
from pykernels import LoRA
from pykernels.ops import low_rank_svd
from pykernels.ref.compose_lora import summed, summed_apart, truncated
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.lora_cases import random, split

WEIGHTS = [0.5, -1.3, 0.8]
OPTIONS = {
    "ties": {"density": 0.4},
    "magnitude_prune": {"density": 0.4},
    "dare_ties": {"density": 0.5, "seed": 3},
    "dare_linear": {"density": 0.5, "seed": 3},
}


def adapters(ranks=(4, 2, 3), out=30, into=50, dtype=torch.float32) -> list[LoRA]:
    """Adapters whose scalings differ."""
    return [
        LoRA(random(r, into, seed=i, dtype=dtype), random(out, r, seed=i + 50, dtype=dtype), 1.0 + i)
        for i, r in enumerate(ranks)
    ]


def dense(a: LoRA) -> torch.Tensor:
    """scaling * B @ A, float64."""
    return a.scaling * (a.B.double() @ a.A.double())


def exact(given: list[LoRA], weights=WEIGHTS) -> torch.Tensor:
    """The weighted sum of the deltas."""
    A, B, scaling, _ = split(given)
    return summed(A, B, scaling, weights)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, in Frobenius' norm."""
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=SHORT.get)
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_the_sum_at_a_rank_that_suffices(method, dtype):
    given = adapters(dtype=dtype)
    result = pk.compose_lora(given, WEIGHTS, method=method, **({"rank": 9} if method == "svd" else {}))
    assert result.A.shape == (9, 50) and result.B.shape == (30, 9) and result.A.dtype == dtype
    assert result.scaling == 1.0 and result.magnitude is None
    assert error(dense(result), exact(given)) < 10 * torch.finfo(dtype).eps


def test_a_rank_beyond_the_sum_is_filled_with_zeros():
    given = adapters()
    result = pk.compose_lora(given, WEIGHTS, method="svd", rank=12)
    assert result.A.shape == (12, 50) and not result.A[9:].any() and not result.B[:, 9:].any()
    assert error(dense(result), exact(given)) < 1e-6


@pytest.mark.parametrize("rank", [None, 1, 5])
def test_svd_is_the_nearest_of_its_rank(rank):
    given = adapters()
    result, wanted = pk.compose_lora(given, WEIGHTS, method="svd", rank=rank), exact(given)
    best = truncated(wanted, rank or 4)
    assert len(result.A) == (rank or 4)  # the largest of the adapters
    assert error(dense(result), best) < 1e-5
    torch.testing.assert_close(result.A.norm(dim=1), result.B.norm(dim=0))  # neither factor is the larger


def hard(kind: str) -> list[LoRA]:
    """Adapters by what Gram matrices in float32 would make of them."""
    one, two = adapters((6, 6), out=60, into=80)
    even = [one._replace(scaling=1.0), two._replace(scaling=1.0)]
    changed = {
        "well conditioned": even,
        "one size, another scale": [one._replace(B=one.B * 1e-12, A=one.A * 1e12), two],
        "the same B twice": [one, two._replace(B=one.B)],
        "nearly the same B": [one, two._replace(B=one.B + 1e-3 * two.B)],
        "the same A twice": [one, two._replace(A=one.A)],
        "nothing in B": [one, two._replace(B=torch.zeros_like(two.B))],
        "nothing at all": [one._replace(A=torch.zeros_like(one.A)), two._replace(A=torch.zeros_like(two.A))],
        "values that fall": [one, two._replace(scaling=1e-6)],
        "squares too large": [a._replace(A=a.A * 1e20) for a in even],
        "squares too small": [a._replace(B=a.B * 1e-19) for a in even],
    }
    return changed[kind]


KINDS = (
    "well conditioned",
    "one size, another scale",
    "the same B twice",
    "nearly the same B",
    "the same A twice",
    "nothing in B",
    "nothing at all",
    "values that fall",
    "squares too large",
    "squares too small",
)
SQUARED = {
    "well conditioned": (6, 12),
    "one size, another scale": (6, 12),
    "the same A twice": (6,),
    "values that fall": (6,),
}
"""Kinds and ranks that Gram matrices serve; the others are left to QR."""


@pytest.mark.parametrize("rank", [6, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_svd_keeps_its_digits(kind, rank, monkeypatch):
    given, ways = hard(kind), []
    by_gram = low_rank_svd._by_gram
    monkeypatch.setattr(low_rank_svd, "_by_gram", lambda *g: ways.append(by_gram(*g)) or ways[-1])
    result = pk.compose_lora(given, [1.0, 1.0], method="svd", rank=rank)
    assert (ways[0] is not None) == (rank in SQUARED.get(kind, ()))
    truth = exact(given, [1.0, 1.0])
    left = float((dense(result) - truth).norm()), float((truncated(truth, rank) - truth).norm())
    assert left[0] <= left[1] + 3e-6 * float(truth.norm())
    assert len(result.A) == rank and result.A.isfinite().all() and result.B.isfinite().all()


def test_svd_of_more_ranks_than_the_matrix_has():
    given = adapters((20, 20), out=12, into=15)
    result = pk.compose_lora(given, 1.0, method="svd")
    assert len(result.A) == 12 and error(dense(result), exact(given, [1.0, 1.0])) < 1e-6


def composed(method: str, deltas: list[torch.Tensor]) -> torch.Tensor:
    """The dense result of a method by this package's ops, which are tested elsewhere."""
    options = OPTIONS[method]
    if method == "magnitude_prune":
        return sum(w * pk.trim(d, options["density"]) for w, d in zip(WEIGHTS, deltas, strict=True))
    rules = {} if method == "dare_linear" else {"elect": "plain", "normalize": "count"}
    if method == "dare_ties":
        rules["consensus"] = "ties"
    op = pk.ties_merge if method == "ties" else pk.dare_merge
    return op(None, deltas, weight=WEIGHTS, **options, **rules)


@pytest.mark.parametrize("method", OPTIONS)
def test_dense_methods_act_on_the_delta(method):
    given = adapters()
    wanted = composed(method, [dense(a).float() for a in given]).double()
    full = pk.compose_lora(given, WEIGHTS, method=method, rank=30, **OPTIONS[method])
    assert error(dense(full), wanted) < 1e-5
    few = pk.compose_lora(given, WEIGHTS, method=method, **OPTIONS[method])
    assert len(few.A) == 4 and error(dense(few), truncated(wanted, 4)) < 1e-3
    again = pk.compose_lora(given, WEIGHTS, method=method, **OPTIONS[method])
    assert_same_bits(again.A, few.A)


@pytest.mark.parametrize("kind", ["ties", "few", "flat"])
def test_large_deltas_are_within_a_hundredth_of_the_best(kind, monkeypatch):
    monkeypatch.setattr(low_rank_svd, "EXACT", 8)
    given = adapters((8, 8, 8), out=200, into=300)
    delta = {
        "ties": composed("ties", [dense(a).float() for a in given]),
        "few": exact(given).float(),
        "flat": random(200, 300, seed=1),
    }[kind]
    for rank in (4, 24):
        A, B = low_rank_svd.truncate(delta, rank)
        assert A.shape == (rank, 300) and B.shape == (200, rank)
        best = float((truncated(delta, rank) - delta.double()).norm())
        assert float((B.double() @ A.double() - delta.double()).norm()) <= 1.01 * best + 1e-5 * float(
            delta.norm()
        )


def test_no_graph_is_recorded():
    a = LoRA(torch.ones(1, 4, requires_grad=True), torch.ones(3, 1), 1.0)
    for method in ("cat", "svd", "peft_linear"):
        assert not pk.compose_lora([a], 1.0, method=method).A.requires_grad


def with_element(value: float, factor: str) -> list[LoRA]:
    """Three adapters, the second with ``value`` at [1, 1] of a factor."""
    given = adapters(dtype=torch.float32)
    getattr(given[1], factor)[1, 1] = value
    return given


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_elements_that_are_no_numbers_are_named(factor, value):
    given = with_element(value, factor)
    with pytest.raises(ValueError) as error:
        pk.compose_lora(given, WEIGHTS, method="svd")
    wanted = f"compose_lora: adapters[1].{factor} must be finite with method 'svd', got {value} at [1, 1]"
    assert str(error.value) == wanted
    for method, options in OPTIONS.items():
        with pytest.raises(ValueError, match=r"the delta of adapters\[1\] must be finite with method"):
            pk.compose_lora(given, WEIGHTS, method=method, **options)
    for method in ("cat", "peft_linear"):  # no decomposition: an element that is no number stays one
        handed = pk.compose_lora([given[1]] * 2, [1.0, 1.0], method=method)
        assert not getattr(handed, factor).isfinite().all()


def test_sums_beyond_float32_are_named():
    huge = LoRA(torch.full((2, 5), 1e30), torch.full((4, 2), 1e30), 1.0)
    drawn = LoRA(1e30 * random(8, 50, seed=1), 1e30 * random(40, 8, seed=2), 1.0)
    for given in (huge, drawn):  # LAPACK gives NaN for the one and an error for the other
        with pytest.raises(ValueError, match="the sum must have singular values that float32 holds"):
            pk.compose_lora([given], 1.0, method="svd")
    with pytest.raises(ValueError, match=r"the delta of adapters\[0\] must be finite .* got inf at \[0, 0\]"):
        pk.compose_lora([huge], 1.0, method="ties", density=0.5)
    with pytest.raises(ValueError, match=r"adapters\[0\]\.A times weight and scaling must be finite"):
        pk.compose_lora([huge], 1e9, method="svd")
    large = LoRA(torch.full((2, 5), 1e19), torch.full((4, 2), 1e18), 1.0)
    with pytest.raises(ValueError, match=r"the merged delta must be finite with method 'magnitude_prune'"):
        pk.compose_lora([large, large], 16.0, method="magnitude_prune", density=1.0)


def peft_layer(given: list[LoRA]):
    """A model of PEFT of one layer with these adapters."""
    peft = pytest.importorskip("peft")
    out, into = len(given[0].B), given[0].A.shape[1]
    config = [
        peft.LoraConfig(r=len(a.A), lora_alpha=a.scaling * len(a.A), target_modules=["0"]) for a in given
    ]
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(into, out, bias=False)), config[0], "0")
    for i, c in enumerate(config[1:], 1):
        model.add_adapter(str(i), c)
    layer = model.base_model.model[0]
    for i, a in enumerate(given):
        layer.lora_A[str(i)].weight.data, layer.lora_B[str(i)].weight.data = a.A.clone(), a.B.clone()
    return model, layer


def by_peft(given: list[LoRA], weights: list[float], kind: str, **options) -> torch.Tensor:
    """The delta of ``add_weighted_adapter``, float64."""
    model, layer = peft_layer(given)
    names = [str(i) for i in range(len(given))]
    model.add_weighted_adapter(names, weights, "sum", combination_type=kind, **options)
    scaling = layer.scaling["sum"]
    return scaling * (layer.lora_B["sum"].weight.double() @ layer.lora_A["sum"].weight.double()).detach()


@pytest.mark.parametrize("method", ["cat", "svd", "ties", "magnitude_prune"])
def test_peft_agrees_where_it_acts_on_the_delta(method):
    given, options = adapters(), OPTIONS.get(method, {})
    kind = method if method in ("cat", "svd") else f"{method}_svd"
    theirs = by_peft(given, WEIGHTS, kind, **options, **({} if method == "cat" else {"svd_rank": 9}))
    ours = pk.compose_lora(
        given, WEIGHTS, method=method, **options, **({} if method == "cat" else {"rank": 9})
    )
    assert error(dense(ours), theirs) < 1e-4


def test_peft_linear_is_that_of_peft():
    given = adapters((4, 4, 4))
    ours = dense(pk.compose_lora(given, WEIGHTS, method="peft_linear"))
    A, B, scaling, _ = split(given)
    assert error(ours, by_peft(given, WEIGHTS, "linear")) < 1e-6
    assert error(ours, summed_apart(A, B, scaling, WEIGHTS)) < 1e-6


def test_factors_added_apart_are_far_from_the_sum():
    """PEFT's "linear" misses the sum of two random adapters by about its own size, cat and svd hit it."""
    given = adapters((8, 8), out=200, into=200)
    wanted = exact(given, [1.0, 1.0])
    theirs = by_peft(given, [1.0, 1.0], "linear")
    assert error(theirs, wanted) > 0.8
    for method, options in (("cat", {}), ("svd", {"rank": 16})):
        assert error(dense(pk.compose_lora(given, 1.0, method=method, **options)), wanted) < 1e-6


def test_trimming_factors_apart_is_far_from_trimming_the_delta():
    given = adapters((8, 8), out=100, into=100)
    wanted = pk.ties_merge(
        None, [dense(a).float() for a in given], density=0.5, elect="plain", normalize="count"
    )
    best = error(truncated(wanted, 8), wanted.double())
    ours = dense(pk.compose_lora(given, 1.0, method="ties", density=0.5, rank=8))
    theirs = by_peft(given, [1.0, 1.0], "ties", density=0.5)
    assert error(ours, wanted.double()) < 1.001 * best
    assert error(theirs, wanted.double()) > 1.1 * best
