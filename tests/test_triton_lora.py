"""LoRA in Triton: layers and merges against float64, at each edge of a tile and on each side of each choice.

On a device where there is one, else interpreted, where operands of products are exact in float32. Bounds are
those of float32 sums in any order, as for the CPU's kernels.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import pykernels as pk
from pykernels import grouping
from pykernels.kernels import launch, lora_linear, lora_shapes, merge_lora
from pykernels.ref.lora_linear import Factors
from pykernels.ref.philox import draws
from pykernels.ref.rounding import NAN
from tests.bounds import assert_same_bits, assert_within_sum
from tests.cases import DTYPES
from tests.lora_cases import adapter, assert_merged, split, truth, weight
from tests.lora_layers import assert_backward, assert_forward, kept_of, layer
from tests.walls import Walls
from tests.where import DEVICE, EMULATED, rows_of, there

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, at Inf and NaN
kernels = rows_of("triton")
ALL, HALF, KEY = 65536, round(0.4 * 65536), 2**63 + 5
HALVES, WIDE = torch.bfloat16, torch.float32


def nans(*shape, dtype):
    """A result that shows what was not written."""
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def moved(c):
    """A case on the device."""
    low = [Factors(there(a.A), there(a.B), a.scaling) for a in c.adapters]
    return type(c)(there(c.x), there(c.weight), low, there(c.index), there(c.bias), there(c.grad))


def forward(c, threshold=ALL):
    """(out, h) of the kernels."""
    c = moved(c)
    out = nans(c.x.shape[0], c.weight.shape[0], dtype=c.x.dtype)
    h = nans(c.x.shape[0], max((a.A.shape[0] for a in c.adapters), default=0), dtype=WIDE)
    kernels.lora_linear(out, h, *c[:5], threshold, KEY)
    return out.cpu(), h


def backward(c, h, threshold=ALL):
    """All gradients of the kernels, as one list."""
    c = moved(c)
    like = [c.x, c.weight, *(a.A for a in c.adapters), *(a.B for a in c.adapters)]
    x, by_weight, *low = (nans(*t.shape, dtype=t.dtype) for t in like)
    half, given = len(c.adapters), (c.grad, h, c.x, c.weight, c.adapters, c.index, threshold, KEY)
    kernels.lora_linear_backward(x, by_weight, low[:half], low[half:], *given)
    return [t.cpu() for t in (x, by_weight, *low)]


def check(c, threshold=ALL):
    """Values and all gradients within their bounds."""
    out, h = forward(c, threshold)
    kept = kept_of(c.x, threshold, KEY)
    assert_forward(out, c, kept, ours=False)
    assert_backward(backward(c, h, threshold), c, kept, ours=False)


CASES = {
    "one row": ((1, 70, 300), [3], HALVES, None, ALL),
    "few rows, even": ((32, 64, 128), [16], HALVES, None, ALL),
    "a row more": ((33, 130, 130), [17], HALVES, None, ALL),
    "even tiles, dropped by calls": ((33, 128, 128), [16], HALVES, None, HALF),
    "wide factors, dropped by halves": ((65, 130, 256), [5], HALVES, WIDE, HALF),
    "dropped one by one": ((18, 24, 200), [2], torch.float16, WIDE, HALF),
    "float16": ((40, 20, 70), [33], torch.float16, None, ALL),
    "float32": ((65, 129, 40), [17], WIDE, None, ALL),
    "float32, dropped": ((5, 20, 128), [3], WIDE, None, HALF),
}


@pytest.mark.parametrize("name", CASES)
def test_one_adapter(name):
    shape, ranks, dtype, low, threshold = CASES[name]
    check(layer(*shape, ranks, dtype, low=low, bias=threshold == ALL), threshold)


@pytest.mark.parametrize(
    ("m", "dtype", "low"),
    [(3, HALVES, None), (70, HALVES, WIDE), (40, torch.float16, None), (20, WIDE, None)],
    ids=["few", "many", "f16", "f32"],
)
def test_each_row_its_adapter(m, dtype, low):
    check(layer(m, 50, 70, [4, 1, 33, 7], dtype, low=low, grouped=True, seed=m))


def test_adapters_without_rows_rows_without_adapters_and_mixed_dtypes():
    c = layer(9, 20, 30, [3, 5, 2], HALVES, grouped=True)
    mixed = [a if i else Factors(a.A.float(), a.B.float(), a.scaling) for i, a in enumerate(c.adapters)]
    for index in ([-1] * 9, [2, -1, 2, 2, 0, 0, 0, 0, 0]):
        check(c._replace(adapters=mixed, index=torch.tensor(index)))
    check(c._replace(adapters=[], index=torch.full((9,), -1)))


def test_a_high_rank():
    check(layer(2, 12, 10, [129], HALVES))
    c = layer(2, 12, 10, [512], HALVES)
    assert_forward(forward(c)[0], c, None, ours=False)


def test_what_names_no_adapter_becomes_nan_and_adds_nothing():
    c = layer(6, 20, 30, [3, 5], HALVES, grouped=True)
    for bad, other in ((2, -2), (2**40 + 1, -(2**63))):
        index = torch.tensor([0, bad, 1, -1, other, 0])
        out, h = forward(c._replace(index=index))
        good = (index != bad) & (index != other)
        fine = c._replace(index=torch.where(good, index, -1))
        wanted, low = forward(fine)
        assert out[~good].isnan().all()
        assert_same_bits(out[good], wanted[good])
        x, _, *factors = backward(c._replace(index=index), h)
        truth_x, _, *others = backward(fine, low)
        assert x[~good].isnan().all()
        assert_same_bits(x[good], truth_x[good])
        for got, want in zip(factors, others, strict=True):
            assert_same_bits(got, want)


def test_what_is_dropped_is_gone():
    for k in (128, 200):
        c = layer(5, 30, k, [3], HALVES)
        x = torch.where(kept_of(c.x, HALF, KEY), c.x, math.nan)
        assert_same_bits(forward(c._replace(x=x), HALF)[1], forward(c, HALF)[1])
        assert bool((forward(c, 0)[1] == 0).all())


def test_the_mask_is_the_references():
    """Of factors of ones and x of powers of two: h tells which of 16 elements were kept."""
    for k, low in ((128, None), (256, WIDE), (144, None)):
        x = torch.zeros(40, k, dtype=HALVES)
        first = k - 48
        x[:, first : first + 16] = 2.0 ** torch.arange(16)
        ones = Factors(torch.ones(1, k, dtype=low or HALVES), torch.ones(8, 1, dtype=low or HALVES), 1.0)
        c = layer(40, 8, k, [1], HALVES, low=low)._replace(x=x, adapters=[ones])
        h = forward(c, HALF)[1].cpu()
        wanted = (draws(KEY, 0, 0, x.numel()) < HALF).view(x.shape)[:, first : first + 16]
        assert torch.equal(h[:, 0].long(), (wanted * 2 ** torch.arange(16)).sum(1))


def test_the_same_bits_again_and_sums_in_parts(monkeypatch):
    c = layer(33, 12, 520, [3], HALVES)
    out, h = forward(c)
    again, low = forward(c)
    assert_same_bits(again, out)
    monkeypatch.setattr("pykernels.kernels.lora_reduce.LEAST_ROWS", 16)
    found = backward(c, h)
    assert_backward(found, c, None, ours=False)
    for one, other in zip(backward(c, low), found, strict=True):
        assert_same_bits(one, other)
    monkeypatch.setattr(lora_shapes, "PROGRAMS", 1)
    assert not torch.equal(forward(c)[1], h)  # one sum in place of two parts: it is rounded elsewhere


def test_any_strides_and_negated_views():
    c = layer(9, 40, 48, [5], HALVES)
    a, b, s = c.adapters[0]
    wide = torch.full((9, 96), math.nan, dtype=HALVES)
    wide[:, ::2] = c.x
    other = c._replace(
        x=wide[:, ::2],
        weight=torch._neg_view(-c.weight.t().contiguous().t()),
        adapters=[Factors(torch._neg_view(-a.t().contiguous().t()), b.t().contiguous().t(), s)],
        bias=torch._neg_view(-c.bias),
        grad=c.grad.t().contiguous().t(),
    )
    wanted, h = forward(c)
    got, low = forward(other)
    assert_same_bits(got, wanted)
    for one, want in zip(backward(other, low)[::2], backward(c, h)[::2], strict=True):
        assert_same_bits(one, want)


def test_only_what_is_asked_for():
    c = moved(layer(4, 6, 8, [2, 1], HALVES, grouped=True))
    h = forward(c)[1]
    everything = backward(c, h)
    for i in (0, 1, 3, 4):
        found = [nans(*t.shape, dtype=t.dtype) if j == i else None for j, t in enumerate(everything)]
        given = (c.grad, h, c.x, c.weight, c.adapters, c.index)
        kernels.lora_linear_backward(found[0], found[1], found[2:4], found[4:], *given)
        assert_same_bits(found[i].cpu(), everything[i])


def test_the_ops_reach_the_kernels():
    c = layer(5, 20, 30, [4], HALVES)
    a, b, s = c.adapters[0]
    x, w, a, b, bias = map(there, (c.x, c.weight, a, b, c.bias))
    with pk.use_backend("triton"):
        y = pk.lora_linear(x, w, a, b, scaling=s, bias=bias)
        assert_same_bits(y.cpu(), forward(c)[0])
        leaf = a.clone().requires_grad_()
        found = torch.autograd.grad(pk.lora_linear(x, w, leaf, b, scaling=s), leaf, there(c.grad))[0]
        assert_same_bits(found.cpu(), backward(c, forward(c)[1])[2])
        merged = pk.merge_lora(w, [pk.LoRA(a, b, s)])
    assert_same_bits(merged.cpu(), run_merge(c.weight, [pk.LoRA(*c.adapters[0])], False))


def test_more_rows_than_are_numbered_are_refused():
    c = layer(1, 4, 4, [2], HALVES)
    x = c.x.expand(2**31, 4)
    with pytest.raises(ValueError, match="x must have at most 2147483647 rows in Triton, got 2147483648"):
        lora_linear.lora_linear(x, x, x, c.weight, c.adapters, None, None)


def test_special_values_come_through():
    c = layer(6, 40, 50, [3], HALVES)
    c.x[1, 7], c.x[2, 3], c.bias[5] = math.nan, math.inf, -math.inf
    out = forward(c)[0]
    assert bool((out[1].view(torch.int16) == 0x7FC0).all()) and not out[2].isfinite().any()
    for row in (0, 3, 4, 5):
        assert out[row, 5] == -math.inf and out[row, :5].isfinite().all()


def run_merge(w, adapters, fan, dtype=None):
    """The merged weight; ``out`` starts as NaN."""
    out = nans(*w.shape, dtype=dtype or w.dtype)
    A, B, scaling, magnitude = split(adapters)
    magnitude = [None if m is None else there(m) for m in magnitude]
    kernels.merge_lora(out, there(w), there(A), there(B), scaling, magnitude, fan)
    return out.cpu()


MERGES = [
    ((1, 1), (1,), "", HALVES, WIDE),
    ((63, 127), (16,), "", torch.float16, HALVES),
    ((65, 129), (17, 3), "", WIDE, WIDE),
    ((64, 128), (2, 2, 2), "", HALVES, torch.float16),
    ((33, 136), (3, 4), "01", HALVES, HALVES),
    ((40, 20), (3, 4, 2), "1", WIDE, WIDE),
]
"""Shapes of weights, ranks, which adapters have magnitudes, dtypes of the weight and of the factors."""


@pytest.mark.parametrize("fan", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("case", MERGES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_merges_within_the_bound(case, fan):
    (rows, cols), ranks, dora, dtype, low = case
    out, into = (cols, rows) if fan else (rows, cols)
    w = weight(out, into, dtype, fan_in_fan_out=fan)
    adapters = [
        adapter(out, into, rank, 10 * i, dora=str(i) in dora, dtype=low) for i, rank in enumerate(ranks)
    ]
    assert_merged(run_merge(w, adapters, fan), w, adapters, fan)


def test_merges_of_mixed_dtypes_of_strided_factors_and_to_other_dtypes():
    w = weight(20, 40, HALVES)
    adapters = [adapter(20, 40, 3, 0, dtype=HALVES), adapter(20, 40, 2, 10, dtype=torch.float16)]
    wanted = run_merge(w, adapters, False)
    assert_merged(wanted, w, adapters)
    strided = [a._replace(A=a.A.t().contiguous().t(), B=torch._neg_view(-a.B)) for a in adapters]
    assert_same_bits(run_merge(w, strided, False), wanted)
    wide = run_merge(w, adapters, False, WIDE)
    assert_same_bits(wide.to(HALVES), wanted)
    assert_same_bits(run_merge(w, adapters, False, torch.float64), wide.double())


def test_a_group_of_merges_is_one_launch(monkeypatch):
    launches, outs, real = [], [], merge_lora.run
    monkeypatch.setattr(
        merge_lora, "run", lambda op, kernel, *a, **k: (launches.append(kernel), real(op, kernel, *a, **k))
    )
    cases = [((70, 40), (3,)), ((5, 200), (2, 17)), ((64, 128), (1, 2, 3))]
    given = [(weight(*s, HALVES), [adapter(*s, r, i) for i, r in enumerate(ranks)]) for s, ranks in cases]
    with grouping.grouped():
        for w, adapters in given:
            out = nans(*w.shape, dtype=HALVES)
            A, B, scaling, magnitude = split(adapters)
            kernels.merge_lora(out, there(w), there(A), there(B), scaling, magnitude, False)
            outs.append(out)
        assert not launches
    assert len(launches) == 1
    for out, (w, adapters) in zip(outs, given, strict=True):
        assert_same_bits(out.cpu(), run_merge(w, adapters, False))


def test_merging_in_place_and_special_values():
    for dtype in DTYPES:
        w, a = weight(8, 20, dtype), adapter(8, 20, 2, 0)
        w[1, 2], w[3, 4], w[5, 6] = math.nan, math.inf, -math.inf
        wanted, here = run_merge(w, [a], False), there(w.clone())
        kernels.merge_lora(here, here, [there(a.A)], [there(a.B)], [a.scaling], [None], False)
        assert_same_bits(here.cpu(), wanted)
        bits, canonical = NAN[dtype]
        assert int(wanted.isnan().sum()) == 1 and int(wanted.view(bits)[1, 2]) == canonical
        assert wanted[3, 4] == math.inf and wanted[5, 6] == -math.inf


@pytest.mark.skipif(not EMULATED, reason="walls stand in the host's memory")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_nothing_outside_is_read_or_written(at_end):
    walls = Walls()

    def place(tensor):
        return walls.place(tensor.reshape(-1), at_end=at_end).view(tensor.shape)

    c = layer(9, 33, 41, [5, 3], HALVES, grouped=True)
    low = [Factors(place(a.A), place(a.B), a.scaling) for a in c.adapters]
    x, w, bias, grad = (place(t) for t in (c.x, c.weight, c.bias, c.grad))
    inside = c._replace(x=x, weight=w, adapters=low, bias=bias, grad=grad, index=place(c.index))
    wanted, h = forward(c)
    out, to = place(nans(*wanted.shape, dtype=HALVES)), place(nans(*h.shape, dtype=WIDE))
    lora_linear.lora_linear(out, to, *inside[:5])
    assert_same_bits(out.clone(), wanted)
    for got, want in zip(backward(inside, to), backward(c, h), strict=True):
        assert_same_bits(got, want)
    merged = place(nans(33, 41, dtype=HALVES))
    factors = [a.A for a in low], [a.B for a in low], [a.scaling for a in low], [None, None]
    merge_lora.merge_lora(merged, w, *factors, False)
    assert_merged(merged.clone(), c.weight, [pk.LoRA(*a) for a in c.adapters])


def test_weights_at_any_byte():
    memory = torch.zeros(2 * 20 * 41 + 64, dtype=torch.uint8)
    w, a = weight(20, 41, HALVES), adapter(20, 41, 3, 0)
    odd = torch.frombuffer(memory.numpy(), dtype=HALVES, count=w.numel(), offset=1).view(w.shape)
    if not EMULATED:
        pytest.skip("tensors of a device lie at multiples of their elements")
    odd.copy_(w)
    assert_same_bits(run_merge(odd, [a], False), run_merge(w, [a], False))


def test_norms():
    for fan in (False, True):
        w, a = weight(40, 150, HALVES, fan_in_fan_out=fan), adapter(40, 150, 3, 0)
        norms = merge_lora.row_norms(there(w), there(a.A), there(a.B), a.scaling, fan).cpu()
        exact = torch.linalg.vector_norm(truth(w, [a], fan), dim=0 if fan else 1)
        size = w.double().abs().sum(0 if fan else 1)
        assert_within_sum(norms, exact, size, 10)


def test_the_norm_takes_rows_or_columns_and_any_other_layout():
    w, a = weight(40, 150, HALVES), adapter(40, 150, 3, 0)
    turned, apart = w.t().contiguous().t(), torch.cat([w, w], 1)[:, ::2]
    assert not (turned.is_contiguous() or apart.is_contiguous() or apart.t().is_contiguous())
    for given in (w, turned, apart):
        norm = kernels.dora_norm(there(given), there(a.A), there(a.B), a.scaling)
        exact = torch.linalg.vector_norm(truth(given, [a], False), dim=1)
        assert norm.dtype == WIDE
        assert_within_sum(norm.cpu(), exact, given.double().abs().sum(1), 10)


def test_a_table_is_filled_on_its_own_device(monkeypatch):
    """Triton launches on the current device, which need not be that of the tensors."""
    here, packed = [None], []

    @contextmanager
    def current(device):
        here.append(device)
        yield
        here.pop()

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(launch, "pack", lambda rows, words: packed.append(here[-1]))
    launch.fill(SimpleNamespace(device=torch.device("cuda:1")), [0] * 40, alone=True)
    assert packed == [torch.device("cuda:1")]


def test_what_is_drawn_element_by_element_takes_a_small_tile(monkeypatch):
    monkeypatch.setattr(lora_shapes, "_shared_memory", lambda device: lora_shapes.LARGE_TILE)
    shapes = [lora_shapes.product(4096, HALVES, torch.device("cuda"), False, s) for s in (False, True)]
    assert shapes == [lora_shapes.MANY_ROWS, lora_shapes.SOME_ROWS]
