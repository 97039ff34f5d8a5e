"""The references against numbers worked out by hand and formulas written down on their own."""

from __future__ import annotations

import math

import pytest
import torch

from pykernels.cut import KEEP_ALL_EQUALS, Cut
from pykernels.ref.dot_products import dot_products
from pykernels.ref.elect_sign import elect_sign
from pykernels.ref.kth_magnitude import kth_magnitude
from pykernels.ref.l1_norms import l1_norms
from pykernels.ref.linear_merge import linear_merge
from pykernels.ref.task_arithmetic import task_arithmetic
from pykernels.ref.ties_merge import ties_merge
from pykernels.ref.trim import trim
from tests.cases import make

BASE = torch.tensor([10.0, 20.0, 30.0, 40.0])
DELTAS = [
    torch.tensor([4.0, -3.0, 0.5, 1.0]),
    torch.tensor([2.0, 5.0, -0.5, -6.0]),
    torch.tensor([-1.0, -4.0, 3.0, 2.0]),
]  # half of each kept: [4, -3, 0, 0], [0, 5, 0, -6], [0, -4, 3, 0]
TUNED = [BASE + d for d in DELTAS]
WEIGHT = [1.0, 2.0, 0.5]
ONES = [1.0] * 3
ALL = Cut([0] * 3, [KEEP_ALL_EQUALS] * 3)
NAN, INF = math.nan, math.inf


def half() -> Cut:
    """Two of four kept per model."""
    return kth_magnitude(BASE, TUNED, [2, 2, 2])


def test_cut_by_hand():
    bits = {3.0: 0x40400000, 5.0: 0x40A00000}
    assert half() == Cut([bits[3.0], bits[5.0], bits[3.0]], [1, 1, 2])


@pytest.mark.parametrize(
    ("vote", "share", "elect", "mean"),
    [
        (
            ONES,
            ONES,
            "plain",
            [4.0, -2.5, 1.5, -12.0],
        ),  # PEFT: plain votes, weighted values, divided by the count
        (None, WEIGHT, "weighted", [4.0, 5.0, 3.0, -6.0]),  # mergekit: weighted votes, divided by the weights
        (None, ONES, "weighted", [4.0, 10.0, 1.5, -12.0]),
        (None, None, "weighted", [4.0, 10.0, 1.5, -12.0]),
        (ONES, WEIGHT, "plain", [4.0, -5 / 1.5, 3.0, -6.0]),
        (ONES, None, "plain", [4.0, -5.0, 1.5, -12.0]),
        (None, None, None, [4.0, 5.0, 1.5, -12.0]),
    ],
    ids=["peft", "mergekit", "weighted-count", "weighted-sum", "plain-weights", "plain-sum", "no-election"],
)
def test_ties_by_hand(vote, share, elect, mean):
    for base, tuned in ((BASE, TUNED), (None, DELTAS)):
        got = ties_merge(base, tuned, half(), WEIGHT, vote, share, 0.5, elect)
        start = BASE.double() if base is not None else torch.zeros(4, dtype=torch.float64)
        torch.testing.assert_close(
            got, start + 0.5 * torch.tensor(mean, dtype=torch.float64), rtol=1e-7, atol=0
        )


def test_ties_of_the_paper_by_hand():
    got = ties_merge(None, DELTAS, half(), ONES, ONES, ONES, 1.0, "plain")
    assert got.tolist() == [4.0, -3.5, 3.0, -6.0]


def one(value: float) -> torch.Tensor:
    """A single element."""
    return torch.tensor([value])


@pytest.mark.parametrize(
    ("deltas", "weight", "share", "result"),
    [
        ([2.0, -2.0], [1.0, 1.0], [1.0, 1.0], 2.0),  # a draw elects the positive side
        (
            [2.0, -3.0],
            [1.0, -1.0],
            [1.0, -1.0],
            5.0,
        ),  # a negative weight flips the vote; a divisor of 0 becomes 1
        ([-2.0, -1.0], [-1.0, -3.0], [-1.0, -3.0], -1.25),  # a negative divisor divides
        ([0.0, 0.0], [1.0, 1.0], [1.0, 1.0], 0.0),  # zeros agree with nobody
        ([0.0, 4.0], [1.0, 1.0], [1.0, 1.0], 4.0),
        ([INF, -INF], [1.0, 1.0], [1.0, 1.0], INF),
        ([NAN, 1.0], [1.0, 1.0], [1.0, 1.0], NAN),
    ],
)
def test_election_corners(deltas, weight, share, result):
    cut = Cut([0, 0], [KEEP_ALL_EQUALS] * 2)
    got = ties_merge(None, [one(d) for d in deltas], cut, weight, None, share, 1.0, "weighted")
    assert got.tolist() == [result] or (math.isnan(result) and bool(got.isnan()))


def test_votes_are_float32_sums_in_model_order():
    # Positive mass: 2**24 + 1 + 1 is 2**24 in float32 when added one by one, 2**24 + 2 in any wider sum.
    deltas = [one(2.0**24), one(1.0), one(1.0), one(-(2.0**24) - 2)]
    assert elect_sign(deltas, [1.0] * 4, "weighted").tolist() == [-1.0]
    assert elect_sign([deltas[1], deltas[2], deltas[0], deltas[3]], [1.0] * 4, "weighted").tolist() == [1.0]
    # The vote of the delta 1 + 2**-23 with weight 1 + 2**-23 is rounded to 1 + 2**-22 before it is counted.
    up, down = one(1 + 2**-23), one(-(1 + 2**-22))
    assert elect_sign([up, down], [1 + 2**-23, 1.0], "weighted").tolist() == [1.0]


def test_elected_signs_by_hand():
    assert elect_sign(DELTAS, WEIGHT, "weighted").tolist() == [1, 1, 1, -1]
    assert elect_sign(DELTAS, WEIGHT, "plain").tolist() == [1, -1, 1, -1]
    assert elect_sign([one(NAN), one(-1.0)], ONES[:2], "weighted").tolist() == [-1]
    assert elect_sign([one(NAN), one(NAN)], ONES[:2], "plain").tolist() == [1]


def test_ties_between_equals():
    delta = torch.tensor([1.0, -1.0, 1.0, 0.0, 1.0])
    cut = kth_magnitude(None, [delta], [2])
    assert cut == Cut([0x3F800000], [1])
    assert trim(delta, cut).tolist() == [1, -1, 0, 0, 0]
    assert trim(delta, Cut(cut.key, [KEEP_ALL_EQUALS])).tolist() == [1, -1, 1, 0, 1]
    assert trim(delta[2:], cut, offset=2).tolist() == [0, 0, 0]
    assert trim(delta[1:], cut, offset=1).tolist() == [-1, 0, 0, 0]


def test_none_and_all():
    delta = torch.tensor([NAN, -INF, 3.0])
    assert kth_magnitude(None, [delta], [0]) == Cut([0xFFFFFFFF], [-1])
    assert kth_magnitude(None, [delta.double()], [0]) == Cut([2**63 - 1], [-1])
    assert kth_magnitude(None, [delta], [3]) == kth_magnitude(None, [delta], [7]) == Cut([0], [2])
    assert kth_magnitude(None, [delta], [1]).last == [0], "NaN ranks above Inf"
    assert kth_magnitude(None, [delta], [2]) == Cut([0x7F800000], [1])
    nothing = trim(delta, Cut([0xFFFFFFFF], [-1]))
    assert bool(nothing[0].isnan()) and nothing[1:].tolist() == [0, 0]


def test_float64_deltas_are_cut_in_float64():
    delta = torch.tensor([1.0, 1 + 2**-50, 1 + 2**-51, -1 - 2**-50], dtype=torch.float64)
    cut = kth_magnitude(None, [delta], [2])
    assert cut == Cut([0x3FF0000000000004], [3])
    assert trim(delta, cut).tolist() == [0, 1 + 2**-50, 0, -1 - 2**-50]


def test_official_ties_keeps_one_more_than_asked():
    # The authors' code thresholds at the (P - int(P * K))-th smallest magnitude and keeps all that reach it.
    delta = make("gaussian", 1000, 1, torch.float32)[1][0]
    official = delta.abs() >= delta.abs().kthvalue(1000 - int(1000 * 0.2)).values
    assert int(official.sum()) == 201
    cut = kth_magnitude(None, [delta], [201])
    ours = trim(delta, Cut(cut.key, [KEEP_ALL_EQUALS]))
    assert torch.equal(ours != 0, official)


def test_keeping_all_equals_can_keep_far_more_than_asked():
    # bf16 deltas are multiples of coarse quanta: about 37 % instead of 20 % at this scale of fine-tuning.
    g = torch.Generator().manual_seed(0)
    base = (torch.randn(10**6, generator=g) * 0.02).bfloat16()
    tuned = (base.float() + torch.randn(10**6, generator=g) * 1e-4).bfloat16()
    delta = tuned.float() - base.float()
    cut = kth_magnitude(base, [tuned], [200_000])
    assert int((trim(delta, cut) != 0).sum()) == 200_000
    assert int((trim(delta, Cut(cut.key, [KEEP_ALL_EQUALS])) != 0).sum()) == pytest.approx(371_000, rel=0.01)


def test_weighted_ties_is_the_formula_of_mergekit():
    base, tuned = make("gaussian", 1000, 3, torch.float32)
    weight, lambda_ = torch.tensor([0.5, 0.3, 0.9]), 0.8
    stacked = torch.stack(tuned) - base
    for d in stacked:
        d[d.abs() < d.abs().topk(300).values[-1]] = 0
    stacked = stacked * weight[:, None]
    mask = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    divisor = (weight[:, None] * mask).sum(0)
    divisor[divisor == 0] = 1
    wanted = base + lambda_ * ((stacked * mask).sum(0) / divisor)
    cut = kth_magnitude(base, tuned, [300] * 3)
    got = ties_merge(base, tuned, cut, weight.tolist(), None, weight.tolist(), lambda_, "weighted")
    torch.testing.assert_close(got.float(), wanted, rtol=1e-6, atol=1e-8)


def test_identities():
    base, tuned = make("integers", 500, 3, torch.float32)
    nothing = ties_merge(base, tuned, ALL, WEIGHT, None, WEIGHT, 0.0, "weighted")
    assert torch.equal(nothing, base.double())
    cut = Cut([0], [KEEP_ALL_EQUALS])
    assert torch.equal(
        ties_merge(base, tuned[:1], cut, [1.0], None, [1.0], 1.0, "weighted"), tuned[0].double()
    )
    assert torch.equal(task_arithmetic(base, tuned[:1], [1.0]), tuned[0].double())
    merged = task_arithmetic(base, tuned, ONES).float()
    taken_away = task_arithmetic(merged, [merged + base - t for t in tuned], ONES)
    assert torch.equal(taken_away, base.double())
    assert torch.equal(linear_merge(None, [base] * 4, [0.25] * 4), base.double())


def test_linear_by_hand():
    assert linear_merge(None, TUNED, [0.5, 0.25, 0.25]).tolist() == [12.25, 18.75, 30.875, 39.5]
    assert linear_merge(BASE, TUNED, WEIGHT).tolist() == [17.5, 25.0, 31.0, 30.0]
    assert torch.equal(linear_merge(None, DELTAS, WEIGHT), linear_merge(BASE, TUNED, WEIGHT) - BASE)


def test_deltas_are_rounded_to_float32_and_products_are_not():
    base, tuned = one(1.0), one(2.0**-30)  # 2**-30 - 1 is -1 in float32
    assert linear_merge(base, [tuned], [1.0]).tolist() == [0.0]
    assert linear_merge(base.double(), [tuned.double()], [1.0]).tolist() == [2.0**-30]
    third = torch.tensor(1 / 3)
    assert linear_merge(None, [one(3.0)], [1 / 3]).tolist() == [3 * third.double().item()]


def sums_by_hand(terms):
    """Python floats added as the fixed tree adds: sixteen lanes per block of 4096, then neighbours."""
    sums = []
    for start in range(0, len(terms), 4096):
        lanes = [0.0] * 16
        for i, x in enumerate(terms[start : start + 4096]):
            lanes[i % 16] += x
        while len(lanes) > 1:
            lanes = [lanes[i] + lanes[i + 1] for i in range(0, len(lanes), 2)]
        sums.append(lanes[0])
    return sums


def test_l1_norms_add_in_the_fixed_order():
    base, [tuned] = make("wide", 4096 + 100, 1, torch.float32)
    sums = sums_by_hand((tuned - base).abs().tolist())
    got = l1_norms(base, [tuned, tuned], [65536, 0], [0, 1], 1)
    assert got[:, 0].tolist() == [[s, s] for s in sums]
    assert got[:, 1].tolist() == [[s, 0.0] for s in sums]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dot_products_add_in_the_fixed_order(dtype):
    base, tuned = make("wide", 4096 + 100, 2, dtype)
    base, grad = tuned[0] / 3, tuned[1].flip(0).to(torch.float16).nan_to_num()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    deltas = [(t.to(wide) - base.to(wide)).tolist() for t in tuned]
    wanted = [sums_by_hand([g * x for g, x in zip(grad.tolist(), d, strict=True)]) for d in deltas]
    assert dot_products(grad, base, tuned).T.tolist() == wanted
    alone = sums_by_hand([g * x for g, x in zip(grad.tolist(), tuned[0].tolist(), strict=True)])
    assert dot_products(grad, None, tuned)[:, 0].tolist() == alone
