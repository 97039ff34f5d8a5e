"""Compiled merges against the truth, on every instruction set: decisions to the bit, averages in bounds."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from pykernels.cut import Cut
from pykernels.ref.dare_merge import dare_merge
from pykernels.ref.delta import delta
from pykernels.ref.dot_products import dot_products
from pykernels.ref.drop_rescale import dropped
from pykernels.ref.elect_sign import elect_sign
from pykernels.ref.l1_norms import l1_norms
from pykernels.ref.linear_merge import linear_merge
from pykernels.ref.rounding import NAN, round_once
from pykernels.ref.ties_merge import ties_merge
from pykernels.ref.trim import keep, kept, trim
from tests import cases
from tests.bounds import Terms, assert_same_bits, assert_within, consensus_terms, linear_terms
from tests.cases import DTYPES, EDGES, Case, make

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
TRUTH = {"linear_merge": linear_merge, "ties_merge": ties_merge, "dare_merge": dare_merge}
ISAS = native.isas()


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that this machine has, one after another."""
    with native.use_isa(request.param):
        yield request.param


@functools.lru_cache(maxsize=4)
def truth(case: Case) -> tuple[torch.Tensor, Terms]:
    """The float64 result of a case, and what its bound is made of."""
    arguments = case.arguments()
    base, tuned = arguments[:2]
    deltas = [delta(base, t) for t in tuned]
    if case.op == "linear_merge":
        terms = linear_terms(base, deltas, case.weight())
    else:
        if case.op == "ties_merge":
            masks = [kept(d, k, last, case.offset) for d, k, last in zip(deltas, *arguments[2], strict=True)]
            deltas = [keep(d, m) for d, m in zip(deltas, masks, strict=True)]
        else:
            threshold, model, key = case.masks()
            deltas = [
                dropped(d, t, m, key, case.offset) for d, t, m in zip(deltas, threshold, model, strict=True)
            ]
        terms = consensus_terms(base, deltas, *case.combine())
    return TRUTH[case.op](*arguments), terms


def run(case: Case) -> torch.Tensor:
    """The compiled result; ``out`` starts as NaN."""
    out = torch.full((case.numel,), math.nan, dtype=case.out_dtype or case.dtype)
    getattr(native, case.op)(out, *case.arguments())
    return out


@pytest.mark.parametrize("case", cases.table() + cases.large(), ids=str)
def test_merges(case, isa):
    out = run(case)
    assert_within(out, *truth(case))
    if out.dtype in DTYPES:
        nan = out.isnan()
        bits, canonical = NAN[out.dtype]
        assert bool((out.view(bits)[nan] == canonical).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.SHORT.get)
@pytest.mark.parametrize("op", TRUTH)
def test_small_integers_are_exact(op, dtype, isa):
    case = Case(op, "integers", dtype=dtype, numel=5001, lambda_=0.5, normalize=False, density=0.5)
    assert torch.equal(run(case), round_once(truth(case)[0], dtype))


@pytest.mark.parametrize("case", cases.table() + cases.large(), ids=str)
def test_every_instruction_set_gives_the_same_bits(case):
    first, *rest = ISAS
    with native.use_isa(first):
        wanted = run(case)
    for name in rest:
        with native.use_isa(name):
            assert_same_bits(run(case), wanted)


def edges(dtype: torch.dtype) -> torch.Tensor:
    """float32 values at, just below and just above every midpoint of two neighbours in ``dtype``."""
    exact = torch.arange(65536).to(torch.int16).view(dtype).float()
    bits = exact[exact.isfinite()].view(torch.int32)
    half = 0x8000 if dtype == torch.bfloat16 else 0x1000
    normal = torch.cat([bits + half * step + nudge for step in (0, 1) for nudge in (-1, 0, 1)])
    tiny = torch.arange(-(2**12), 2**12) * 2.0**-26  # the midpoints of subnormal halves are elsewhere
    return torch.cat([normal.view(torch.float32), tiny, torch.tensor([65519.996, 65520.0, 3.4e38, math.inf])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.SHORT.get)
def test_results_are_rounded_to_nearest_even(dtype, isa):
    values = torch.cat([edges(dtype), -edges(dtype)])
    out = torch.zeros(len(values), dtype=dtype)
    native.linear_merge(out, None, [values], [1.0])
    wanted = round_once(values.double() + 0.0, dtype)  # the sum starts at +0
    assert_same_bits(out, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.SHORT.get)
def test_every_16_bit_value_is_read_right(dtype, isa):
    values = torch.arange(65536).to(torch.int16).view(dtype)
    out = torch.zeros(65536)
    native.linear_merge(out, None, [values], [1.0])
    assert_same_bits(out, round_once(values.double() + 0.0, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.SHORT.get)
@pytest.mark.parametrize("data", cases.DATA)
@pytest.mark.parametrize("tie", ["index", "keep"])
def test_trim_keeps_the_same_entries(data, dtype, tie, isa):
    case = Case("ties_merge", data, models=1, dtype=dtype, with_base=False, tie=tie, numel=4999)
    [d] = case.inputs()[1]
    cut = case.cut()
    out = torch.full_like(d, math.nan)
    native.trim(out, d, cut)
    assert torch.equal(out.nan_to_num(9), trim(d, cut).to(dtype).nan_to_num(9))


@pytest.mark.parametrize("numel", EDGES)
def test_drop_keeps_the_same_entries(numel, isa):
    dtype = DTYPES[numel % 3]
    d = torch.ones(numel, dtype=dtype)
    out = torch.full_like(d, math.nan)
    native.drop_rescale(out, d, 30000, 2**63 + 12345, 2.0, 2**36 + 4096)
    assert torch.equal(out, 2 * dropped(d, 30000, 0, 2**63 + 12345, 2**36 + 4096))


@pytest.mark.parametrize("case", [c for c in cases.table() if c.op == "dare_merge"], ids=str)
def test_l1_norms_are_the_same_bits(case, isa):
    base, tuned = case.inputs()
    threshold, model, key = case.masks()
    got = native.l1_norms(base, tuned, threshold, model, key, case.offset)
    wanted = l1_norms(base, tuned, threshold, model, key, case.offset)
    assert got.shape == (-(-case.numel // 4096), case.models, 2)
    assert torch.equal(got.nan_to_num(-1), wanted.nan_to_num(-1))


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=cases.SHORT.get)
@pytest.mark.parametrize("case", [c for c in cases.table() if c.op == "linear_merge"], ids=str)
def test_dot_products_are_the_same_bits(case, grad_dtype, isa):
    base, tuned = case.inputs()
    grad = make("wide", case.numel, 1, grad_dtype)[1][0]
    got = native.dot_products(grad, base, tuned)
    assert got.shape == (-(-case.numel // 4096), case.models)
    assert torch.equal(got.nan_to_num(-1), dot_products(grad, base, tuned).nan_to_num(-1))


@pytest.mark.parametrize("elect", ["weighted", "plain"])
@pytest.mark.parametrize("data", cases.DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.SHORT.get)
def test_elected_signs_are_equal(dtype, data, elect, isa):
    base, tuned = make(data, 4999, 5, dtype)
    deltas = [t - base for t in tuned]
    out = torch.zeros(4999, dtype=torch.int8)
    native.elect_sign(out, deltas, cases.weights(5), elect)
    assert torch.equal(out, elect_sign(deltas, cases.weights(5), elect).to(torch.int8))


@pytest.mark.parametrize("numel", EDGES)
@pytest.mark.parametrize("models", [1, 64])
def test_elected_signs_at_every_edge(numel, models, isa):
    models = min(models, (1 << 19) // max(numel, 1))  # the largest by fewer: the reference takes its time
    base, tuned = make("ties", numel, models, DTYPES[numel % 3])
    deltas = [t - base for t in tuned]
    out = torch.zeros(numel, dtype=torch.int8)
    native.elect_sign(out, deltas, cases.weights(models), "weighted")
    assert torch.equal(out, elect_sign(deltas, cases.weights(models), "weighted").to(torch.int8))


def test_a_nan_that_is_trimmed_still_reaches_the_result(isa):
    for dtype in DTYPES:
        base = torch.zeros(300, dtype=dtype)
        tuned = [torch.full((300,), float(m + 1), dtype=dtype) for m in range(3)]
        tuned[1][::7] = math.nan
        out = torch.zeros(300, dtype=dtype)
        none = Cut([0xFFFFFFFF] * 3, [-1] * 3)
        for elect, vote in (("weighted", None), ("plain", [1.0] * 3), (None, None)):
            native.ties_merge(out, base, tuned, none, [1.0] * 3, vote, None, 1.0, elect)
            assert out[::7].isnan().all() and not out[1:7].any()
            native.dare_merge(out, base, tuned, [0] * 3, [0, 1, 2], 5, [1.0] * 3, vote, None, 1.0, elect)
            assert out[::7].isnan().all() and not out[1:7].any()


def test_subnormals_are_not_flushed(isa):
    for dtype in (torch.float32, torch.bfloat16):
        base = torch.zeros(200, dtype=dtype)
        tuned = [torch.full((200,), 2.0**-130, dtype=dtype)] * 2
        out = torch.zeros(200, dtype=dtype)
        native.task_arithmetic(out, base, tuned, [0.5, 0.5])
        assert bool((out == 2.0**-130).all())
    assert float(torch.tensor(2.0**-140) * 0.5) == 2.0**-141  # and the caller's thread was left as it was
