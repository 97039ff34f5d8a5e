"""The references as a backend: the same as the truth, rounded once, in blocks, without large temporaries."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pykernels.ref import blocks
from pykernels.ref.dare_merge import dare_merge
from pykernels.ref.delta import delta, key
from pykernels.ref.dot_products import dot_products
from pykernels.ref.drop_rescale import drop_rescale
from pykernels.ref.elect_sign import elect_sign
from pykernels.ref.kth_magnitude import kth_magnitude
from pykernels.ref.l1_norms import l1_norms
from pykernels.ref.linear_merge import linear_merge
from pykernels.ref.magnitude_histogram import magnitude_histogram
from pykernels.ref.rounding import NAN, round_once
from pykernels.ref.ties_merge import ties_merge
from pykernels.ref.trim import trim
from tests.bounds import assert_same_bits
from tests.cases import DATA, DTYPES, SHORT, Case, make

ALL = (*DTYPES, torch.float64)
TRUTH = {"linear_merge": linear_merge, "ties_merge": ties_merge, "dare_merge": dare_merge}
NUMEL = 30_001


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8192 elements over all models and no sorting, so that small tensors go the long way."""
    monkeypatch.setattr(blocks, "LARGEST", 8192)
    monkeypatch.setattr(blocks, "SORTED", 0)


@pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
@pytest.mark.parametrize("op", TRUTH)
@pytest.mark.parametrize("out_dtype", ALL, ids=lambda d: f"to_{SHORT[d]}")
def test_blocks_are_the_truth_rounded_once(op, dtype, out_dtype, small_blocks):
    case = Case(op, "special", dtype=dtype, numel=NUMEL)
    out = torch.full((NUMEL,), math.nan, dtype=out_dtype)
    getattr(blocks, op)(out, *case.arguments())
    assert_same_bits(out, round_once(TRUTH[op](*case.arguments()), out_dtype))


def test_a_tensor_may_be_merged_into_itself(small_blocks):
    for op in TRUTH:
        case = Case(op, numel=NUMEL)
        base, tuned, *rest = case.arguments()
        wanted = torch.empty_like(base)
        getattr(blocks, op)(wanted, base, tuned, *rest)
        for i in range(-1, 3):
            copies = [base.clone(), *(t.clone() for t in tuned)]
            getattr(blocks, op)(copies[i + 1], copies[0], copies[1:], *rest)
            assert_same_bits(copies[i + 1], wanted)


def test_shapes_are_kept():
    base = torch.randn(3, 5, 7)
    out = torch.empty(3, 5, 7)
    blocks.task_arithmetic(out, base, [base + 1], [1.0])
    torch.testing.assert_close(out, base + 1)


@pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
@pytest.mark.parametrize("data", DATA)
def test_radix_finds_what_sorting_finds(data, dtype, small_blocks):
    base, tuned = make(data, NUMEL, 2, dtype)
    for k in (1, 17, 6000, 15_000, NUMEL - 1, NUMEL, 0):
        got = blocks.kth_magnitude(base, tuned, [k, NUMEL - k])
        assert got == kth_magnitude(base, tuned, [k, NUMEL - k])


def test_radix_of_close_float64_deltas(small_blocks):
    d = 1 + torch.randperm(NUMEL, generator=torch.Generator().manual_seed(1)).double() * 2**-52
    for k in (1, 9000, NUMEL - 1):
        assert blocks.kth_magnitude(None, [d], [k]) == kth_magnitude(None, [d], [k])


def test_small_tensors_are_sorted():
    base, tuned = make("ties", 65536, 2, torch.float16)
    with LargestStorage([base, *tuned]) as seen:
        assert blocks.kth_magnitude(base, tuned, [0, 9000]) == kth_magnitude(base, tuned, [0, 9000])
    assert seen.elements == 65536


@pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
def test_histogram_by_hand(dtype, small_blocks):
    base, tuned = make("student", NUMEL, 2, dtype)
    shift = 48 if dtype == torch.float64 else 16
    top = blocks.magnitude_histogram(base, tuned, shift, None)
    keys = [key(delta(base, t)).tolist() for t in tuned]
    digit = int(top[0].argmax())
    assert int(top[0, digit]) == sum(k >> shift == digit for k in keys[0])
    below = blocks.magnitude_histogram(base, tuned, shift - 16, [digit, 0])
    assert int(below[0].sum()) == int(top[0, digit])
    last = next(k for k in keys[0] if k >> shift == digit)
    wanted = sum(k >> (shift - 16) == last >> (shift - 16) for k in keys[0])
    assert int(below[0, last >> (shift - 16) & 0xFFFF]) == wanted
    assert torch.equal(below, magnitude_histogram(base, tuned, shift - 16, [digit, 0]))


def test_stages_over_blocks(small_blocks):
    delta = make("ties", NUMEL, 1, torch.float32)[1][0]
    got = torch.full_like(delta, math.nan)
    cut = kth_magnitude(None, [delta], [NUMEL // 2])
    blocks.trim(got, delta, cut.at(-4096), 4096)
    assert torch.equal(got.double(), trim(delta, cut))
    blocks.drop_rescale(got, delta, 20_000, 5, 2.0, 4096)
    assert torch.equal(got.double(), drop_rescale(delta, 20_000, 5, 2.0, 4096))


def test_norms_and_signs_over_blocks(small_blocks):
    base, tuned = make("gaussian", NUMEL, 3, torch.bfloat16)
    masks = ([20_000, 0, 65536], [4, 1, 0], 2**63 + 1)
    assert torch.equal(blocks.l1_norms(base, tuned, *masks, 8192), l1_norms(base, tuned, *masks, 8192))
    assert blocks.l1_norms(base[:0], [t[:0] for t in tuned], *masks).shape == (0, 3, 2)
    assert torch.equal(blocks.dot_products(tuned[0], base, tuned), dot_products(tuned[0], base, tuned))
    assert blocks.dot_products(base[:0], None, [t[:0] for t in tuned]).shape == (0, 3)
    signs = torch.zeros(NUMEL, dtype=torch.int8)
    blocks.elect_sign(signs, tuned, [1.0, 0.5, -1.0], "weighted")
    assert torch.equal(signs.double(), elect_sign(tuned, [1.0, 0.5, -1.0], "weighted"))


class LargestStorage(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operation made anew."""

    elements = 0

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, t.numel())
        return result


def test_no_temporary_is_larger_than_a_block(small_blocks):
    base, tuned = make("gaussian", 5 * 65536, 2, torch.bfloat16)
    out = torch.empty_like(base)
    for run in (
        lambda: blocks.kth_magnitude(base, tuned, [1000, 100_000]),
        lambda: blocks.linear_merge(out, base, tuned, [1.0, 1.0]),
        lambda: blocks.dare_merge(out, base, tuned, [9] * 2, [0, 1], 5, [1.0] * 2, None, None, 1.0, None),
    ):
        with LargestStorage([base, out, *tuned]) as seen:
            run()
        assert 0 < seen.elements <= 65536  # the bins of a digit; blocks are smaller


def test_rounding_is_done_once():
    tie = 1 + 2.0**-8 + 2.0**-40  # float32 first would make it a tie, and even
    assert round_once(torch.tensor([tie], dtype=torch.float64), torch.bfloat16).tolist() == [1 + 2.0**-7]
    assert round_once(torch.tensor([1 + 2.0**-8], dtype=torch.float64), torch.bfloat16).tolist() == [1.0]
    half = 1 + 2.0**-11
    exact = torch.tensor([half, half + 2.0**-40, half - 2.0**-40, -half - 2.0**-40], dtype=torch.float64)
    up = 1 + 2.0**-10
    assert round_once(exact, torch.float16).tolist() == [1.0, up, 1.0, -up]
    edges = torch.tensor(
        [65519.99999999, 65520.0, 1e300, -1e300, 2.0**-25, 2.0**-25 + 2.0**-60, -0.0], dtype=torch.float64
    )
    assert round_once(edges, torch.float16).tolist() == [65504, math.inf, math.inf, -math.inf, 0, 2.0**-24, 0]
    assert bool(round_once(edges, torch.float16)[-1:].signbit())


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_rounding_to_nearest_even(dtype):
    g = torch.Generator().manual_seed(2)
    bits, least = {torch.float32: (24, -126), torch.bfloat16: (8, -126), torch.float16: (11, -14)}[dtype]
    exponent = torch.randint(least - bits - 2, 14, (20_000,), generator=g)
    sparse = torch.randint(0, 2 ** (bits + 2), (20_000,), generator=g).double() / 2 ** (bits + 1)
    exact = torch.ldexp(1 + sparse % 1 + (torch.randint(-1, 2, (20_000,), generator=g) * 2.0**-50), exponent)
    quantum = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent.clamp(min=least + 1) - bits)
    wanted = torch.round(exact / quantum) * quantum  # both exact: powers of two
    assert torch.equal(round_once(exact, dtype).double(), wanted)


@pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
def test_every_nan_becomes_the_canonical_one(dtype):
    exact = torch.tensor([0x7FF0000000000001, -1, 0x7FF8000000000000]).view(torch.float64)
    bits, canonical = NAN[dtype]
    assert round_once(exact, dtype).view(bits).tolist() == [canonical] * 3
