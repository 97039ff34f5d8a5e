"""What holds for every shape, stride, dimension and mask of softmax, on examples that hypothesis finds."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import pykernels as pk
from pykernels import backends
from pykernels.ref import softmax as truth
from tests.bounds import assert_same_bits
from tests.cases import DTYPES
from tests.softmax_cases import INF, KINDS, LOG_ROOM, NAN, SPECIAL, drawn, units
from tests.test_properties import moved

settings.register_profile("softmax", max_examples=150, deadline=None, derandomize=True)
settings.load_profile("softmax")

shapes = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)
lengths = st.one_of(st.integers(1, 300), st.sampled_from([4095, 4096, 4097, 8193, 65_535, 65_537, 70_001]))
dtypes = st.sampled_from(DTYPES)
kinds = st.sampled_from(KINDS)
numbers = st.one_of(
    st.floats(width=32),
    st.sampled_from(sorted({v for row in SPECIAL.values() for v in row if v == v})),
    st.floats(-120, 10, width=32),
)


@st.composite
def strided(draw):
    """A tensor of any shape, order of dimensions, steps and offset, filled with logits."""
    shape = draw(shapes)
    steps = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    order = draw(st.permutations(range(len(shape))))
    whole = drawn(draw(kinds), tuple(n * s for n, s in zip(shape, steps, strict=True)))
    view = whole[tuple(slice(None, None, s) for s in steps)].permute(order)
    stretched = draw(st.sampled_from(range(-1, len(shape))))
    if stretched >= 0 and view.shape[stretched]:
        view = view.narrow(stretched, 0, 1).expand(view.shape)
    return view.to(draw(dtypes)) if draw(st.booleans()) else view


def every(x, dim, **options):
    """One result of every op."""
    yield pk.softmax(x, dim, **options)
    yield pk.log_softmax(x, dim, **options)
    yield pk.logsumexp(x, dim)


@given(strided(), st.data())
def test_strides_do_not_matter(x, data):
    dim = data.draw(st.integers(-x.dim(), x.dim() - 1))
    plain = x.clone(memory_format=torch.contiguous_format)
    for got, wanted in zip(every(x, dim), every(plain, dim), strict=True):
        assert got.is_contiguous()
        assert_same_bits(got, wanted)


@given(strided(), st.data())
def test_dimensions_are_all_alike(x, data):
    """The middle dimension gives what the last one gives, but for a few units: not the same sums."""
    dim = data.draw(st.integers(0, x.dim() - 1))
    assume(x.numel())
    for got, last in zip(every(x, dim), every(x.movedim(dim, -1), -1), strict=True):
        if got.dim() == x.dim():
            got = got.movedim(dim, -1)
        room = 2 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(got, last, rtol=room, atol=room, equal_nan=True)


@given(lengths, dtypes, kinds, st.integers(0, 127))
def test_addresses_do_not_matter(n, dtype, kind, shift):
    x = drawn(kind, (2, n)).to(dtype)
    there = moved(x.view(-1), shift).view(2, n)
    for got, wanted in zip(every(there, 1), every(x, 1), strict=True):
        assert_same_bits(got, wanted)
    out = moved(torch.full_like(x, NAN).view(-1), shift).view(2, n)
    pk.softmax(x, 1, out=out)
    assert_same_bits(out, pk.softmax(x, 1))


@settings(max_examples=50)
@given(lengths, dtypes, kinds, st.integers(1, 9), st.booleans())
def test_threads_do_not_matter(n, dtype, kind, rows, last):
    assume(backends.missing("cpu") is None)
    from pykernels import native

    x = drawn(kind, (rows, n) if last else (n, rows)).to(dtype).requires_grad_()

    def results(threads):
        with native.use_threads(threads):
            yield from every(x, int(last))
            for op in (pk.softmax, pk.log_softmax, pk.logsumexp):
                yield torch.autograd.grad(op(x, int(last)).float().square().sum(), [x])[0]

    alone = list(results(1))
    for threads in (2, 3, 8):
        for got, wanted in zip(results(threads), alone, strict=True):
            assert_same_bits(got.detach(), wanted.detach())


@given(lengths, st.integers(2, 40), dtypes, kinds, st.data())
def test_a_row_is_the_same_in_any_batch(n, rows, dtype, kind, data):
    assume(n * rows < 200_000)
    x = drawn(kind, (rows, n)).to(dtype)
    at = data.draw(st.integers(0, rows - 1))
    for whole, alone in zip(every(x, 1), every(x[at : at + 1].clone(), 1), strict=True):
        assert_same_bits(whole[at : at + 1], alone)


@given(lengths, dtypes, kinds)
def test_probabilities_add_up_to_1(n, dtype, kind):
    y = pk.softmax(drawn(kind, (2, n)).to(dtype), dtype=torch.float32).double()
    total = y.sum(1)
    assert bool((((total - 1).abs() < 1e-6) | total.isnan()).all())
    assert not bool(y.min() < 0) and not bool(y.max() > 1)


@given(lengths, st.integers(-64, 64), st.booleans())
def test_a_shift_changes_nothing(n, shift, log):
    """Logits that are multiples of 2**-10 and a shift that is a whole number: all sums are exact."""
    x = (drawn("3 randn", (1, n)) * 1024).round() / 1024
    op = pk.log_softmax if log else pk.softmax
    room = 2**-20 if log else 0
    torch.testing.assert_close(op(x + shift), op(x), rtol=10 * 2**-24, atol=room)


@settings(max_examples=20)
@given(lengths, kinds, st.randoms(use_true_random=False))
def test_order_matters_little(n, kind, random):
    x = drawn(kind, (1, n))
    order = list(range(n))
    random.shuffle(order)
    torch.testing.assert_close(
        pk.softmax(x)[:, order], pk.softmax(x[:, order]), rtol=10 * 2**-24, atol=2**-149, equal_nan=True
    )


@given(st.lists(numbers, min_size=1, max_size=70), st.integers(0, 300))
def test_any_numbers(row, before):
    x = torch.tensor([[-INF] * before + row], dtype=torch.float32)
    z = truth.logits(x, 1.0, None, None)
    total = truth.row_sum(z, 1)
    soft, log = truth.softmax(z, total, False), truth.log_softmax(z, total, False)
    assert units(pk.softmax(x), soft).max() <= 5
    lse, wanted = pk.logsumexp(x, keepdim=True), truth.logsumexp(total)
    assert units(lse, wanted).max() <= 1 or (lse - wanted).abs().max() <= LOG_ROOM
    got, largest = pk.log_softmax(x).double(), log.abs().nan_to_num(0, 0, 0)
    near = (got - log).abs() <= 2**-22 + 2**-23 * largest
    overflow = got.isinf() & (log < -torch.finfo(torch.float32).max)
    assert bool((near | (got == log) | (got.isnan() & log.isnan()) | overflow).all())


@given(shapes, st.data())
def test_masks_of_any_shape(shape, data):
    x = drawn("3 randn", shape)
    dim = data.draw(st.integers(0, len(shape) - 1))
    part = tuple(data.draw(st.sampled_from((1, n))) for n in shape)[data.draw(st.integers(0, len(shape))) :]
    keep = drawn("3 randn", part, 1) > data.draw(st.sampled_from([-9.0, -1.0, 9.0]))
    added = torch.where(keep, 0.0, -INF)
    if data.draw(st.booleans()) and keep.dim() > 1:
        keep = keep.transpose(0, -1).contiguous().transpose(0, -1)
    filled = x.masked_fill(~keep, -INF)
    for safe in (False, True):
        for op in (pk.softmax, pk.log_softmax):
            wanted = op(filled, dim, safe=safe)
            assert_same_bits(op(x, dim, mask=keep, safe=safe), wanted)
            assert_same_bits(op(x, dim, mask=added, safe=safe), wanted)


@given(shapes, dtypes, st.data())
def test_gradients_of_any_shape(shape, dtype, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    x = drawn("3 randn", shape).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    for ours, theirs in ((pk.softmax, torch.softmax), (pk.log_softmax, torch.log_softmax)):
        g = drawn("3 randn", shape, 1).to(dtype)
        [got] = torch.autograd.grad(ours(x, dim), [x], g)
        [wanted] = torch.autograd.grad(theirs(wide, dim), [wide], g.double())
        room = max(8 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(
            got.double(), wanted, rtol=room, atol=room * max(1, math.prod(shape)) ** 0.5
        )


@settings(max_examples=50)
@given(st.integers(1, 4), lengths, kinds)
def test_kernels_and_references_agree(rows, n, kind):
    assume(backends.missing("cpu") is None)
    x = drawn(kind, (rows, n))
    ours = list(every(x, 1, temperature=0.7))
    with pk.use_backend("ref"):
        for got, wanted in zip(ours, every(x, 1, temperature=0.7), strict=True):
            torch.testing.assert_close(got, wanted, rtol=6 * 2**-23, atol=2**-21, equal_nan=True)
