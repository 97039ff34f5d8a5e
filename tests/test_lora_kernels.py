"""Our matrix products under LoRA's linear layers: bounds at every edge, the same bits on every machine."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pykernels.ref.lora_linear import Factors
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.lora_layers import assert_backward, assert_forward, kept_of, layer
from tests.walls import Walls

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
lora_linear_cpu = pytest.importorskip("pykernels.lora_linear_cpu")
products = pytest.importorskip("pykernels.products")
ISAS = native.isas()
HALF = round(0.4 * 65536)
KEY = 2**63 + 5
# Sides of: dot products (3), tiles of rows (6, 12), a batch of widened rows (32), a block of a skinny product
# (96), a panel (8, 16, 32), a tile of sums (128 columns, 512 rows), a chain (256).
SHAPES = [
    (1, 1, 1), (1, 129, 257), (2, 33, 31), (3, 128, 64), (4, 17, 256), (5, 130, 1), (7, 1, 300),
    (13, 40, 513), (32, 127, 33), (97, 65, 70), (33, 257, 128), (514, 20, 24),
]  # fmt: skip


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that this machine has, one after another."""
    with native.use_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """float32 goes through our products too, which serve it where something is dropped."""
    monkeypatch.setattr(lora_linear_cpu, "_torch_is_faster", lambda *_: False)


def nans(*shape, dtype):
    """A result that shows what was not written."""
    return torch.full(shape, math.nan, dtype=dtype)


def forward(c, threshold=65536):
    """(out, h) of the compiled kernels."""
    ranks = [a.A.shape[0] for a in c.adapters]
    out = nans(c.x.shape[0], c.weight.shape[0], dtype=c.x.dtype)
    h = nans(c.x.shape[0], max(ranks, default=0), dtype=torch.float32)
    lora_linear_cpu.lora_linear(out, h, *c[:5], threshold, KEY)
    return out, h


def backward(c, h, threshold=65536):
    """All gradients of the compiled kernels, as one list."""
    like = [c.x, c.weight, *(a.A for a in c.adapters), *(a.B for a in c.adapters)]
    x, weight, *low = (nans(*t.shape, dtype=t.dtype) for t in like)
    half = len(c.adapters)
    given = (c.grad, h, c.x, c.weight, c.adapters, c.index, threshold, KEY)
    lora_linear_cpu.lora_linear_backward(x, weight, low[:half], low[half:], *given)
    return [x, weight, *low]


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_bound(shape, dtype, isa):
    if isa == "baseline" and math.prod(shape) > 250_000:
        pytest.skip("fused multiply-adds are made by hand there")
    for rank, threshold, low in ((1, 65536, None), (17, HALF, torch.float32)):
        c = layer(*shape, [rank], dtype, low=low, bias=rank > 1)
        out, h = forward(c, threshold)
        assert_forward(out, c, kept := kept_of(c.x, threshold, KEY))
        assert_backward(backward(c, h, threshold), c, kept)


@pytest.mark.parametrize("rank", [2, 8, 64, 129, 257, 512])
def test_any_rank(rank):
    for m in (2, 9):
        c = layer(m, 40, 48, [rank], torch.bfloat16)
        out, h = forward(c, HALF)
        assert_forward(out, c, kept := kept_of(c.x, HALF, KEY))
        assert_backward(backward(c, h, HALF), c, kept)


# Sides of what one row needs no panel for: ranks of 16, up to a chain (256), columns in eights and sixteens.
@pytest.mark.parametrize("rank", [15, 16, 32, 256, 272])
@pytest.mark.parametrize("n", [7, 8, 24, 129, 152])
def test_few_rows_give_the_bits_of_many(n, rank, isa):
    """What is added to one row or three without a panel is what a panel gives four rows together."""
    c = layer(4, n, 40, [rank], torch.bfloat16)
    low = c.x.float() @ c.adapters[0].A.float().t()
    rows, high = torch.tensor([3, 1, 0, 2]), (low, c.adapters[0].B.t(), 0.3)
    whole, parts = nans(4, n, dtype=torch.bfloat16), nans(4, n, dtype=torch.bfloat16)
    products.product(whole, c.x, c.weight.t(), rows, [(0, 4)], [high], c.bias)
    products.product(parts, c.x, c.weight.t(), rows, [(0, 1), (1, 4)], [high] * 2, c.bias)
    assert_same_bits(parts, whole)
    out, _ = forward(c)
    assert_forward(out, c, None)


@pytest.mark.parametrize("m", [128, 129, 385, 513])
def test_many_rows_give_the_bits_of_few(m, isa):
    """Rows go through a block of k in pieces of up to 128, and through the product by 512."""
    c = layer(m, 24, 300, [1], torch.bfloat16)
    whole, parts = nans(m, 24, dtype=torch.bfloat16), nans(m, 24, dtype=torch.bfloat16)
    products.product(whole, c.x, c.weight.t(), None, [], [], None)
    for first in range(0, m - 5, 60):
        some = slice(first, m if first + 65 > m else first + 60)
        products.product(parts[some], c.x[some], c.weight.t(), None, [], [], None)
    assert_same_bits(parts, whole)


def test_what_is_made_by_the_way_is_the_same():
    """A product that makes ``low`` itself, and one after the call that makes it."""
    c = layer(70, 50, 300, [4, 1, 33, 7], torch.bfloat16, grouped=True)
    rows, segments = lora_linear_cpu._sorted(c.index, 4, 70)
    factors = [a.A.t() for a in c.adapters]
    found = []
    for together in (True, False):
        h, out = torch.zeros(70, 33), nans(70, 50, dtype=torch.bfloat16)
        up = [(h, a.B.t(), a.scaling) for a in c.adapters]
        if not together:
            products.shrink(h, c.x, rows, segments, factors)
        made = factors if together else ()
        products.product(out, c.x, c.weight.t(), rows, segments, up, c.bias, factors=made)
        found.append((h, out))
    for one, other in zip(*found, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("m", [1, 2, 40, 300])
def test_each_row_its_adapter(m, dtype, isa):
    c = layer(m, 50, 70, [4, 1, 33, 7], dtype, grouped=True, seed=m)
    out, h = forward(c)
    assert_forward(out, c, None)
    assert_backward(backward(c, h), c, None)


def test_adapters_without_rows_and_rows_without_adapters():
    c = layer(9, 20, 30, [3, 5, 2], torch.bfloat16, grouped=True)
    for index in ([-1] * 9, [1] * 9, [2, -1, 2, 2, 0, 0, 0, 0, 0]):
        case = c._replace(index=torch.tensor(index))
        out, h = forward(case)
        assert_forward(out, case, None)
        assert_backward(backward(case, h), case, None)
    none = c._replace(adapters=[], index=torch.full((9,), -1))
    out, h = forward(none)
    assert_forward(out, none, None)
    assert_backward(backward(none, h), none, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("m", [1, 3, 4, 40])
def test_bits_depend_neither_on_lanes_nor_on_threads(m, dtype):
    c = layer(m, 144, 270, [32, 3], dtype, grouped=True)
    everything = []
    for name, threads in itertools.product(ISAS, (1, 2, 3)):
        with native.use_isa(name), native.use_threads(threads):
            out, h = forward(c, HALF)
            everything.append([out, forward(c)[0], *backward(c, h, HALF)])
    for other in everything[1:]:
        for got, wanted in zip(other, everything[0], strict=True):
            assert_same_bits(got, wanted)


def test_a_row_does_not_depend_on_the_others():
    c = layer(530, 70, 300, [9], torch.bfloat16)
    whole = forward(c)[0]
    for rows in (slice(0, 4), slice(100, 140), slice(505, 530)):
        part = c._replace(x=c.x[rows], grad=c.grad[rows])
        assert_same_bits(forward(part)[0], whole[rows].contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_any_strides(dtype):
    for m, n, k in ((2, 30, 40), (20, 30, 40)):
        c = layer(m, n, k, [5], dtype)
        out, h = forward(c, HALF)
        a, b, s = c.adapters[0]
        wide = nans(m, 2 * k, dtype=dtype)
        wide[:, ::2] = c.x
        turned = [c.x.t().contiguous().t(), wide[:, ::2]]
        for x in turned:
            other = c._replace(
                x=x,
                weight=c.weight.t().contiguous().t(),
                adapters=[Factors(a.t().contiguous().t(), b.t().contiguous().t(), s)],
                grad=c.grad.t().contiguous().t(),
            )
            got, low = forward(other, HALF)
            kept = kept_of(c.x, HALF, KEY)
            assert_forward(got, c, kept)
            assert_backward(backward(other, low, HALF), c, kept)
        assert h.isfinite().all() and out.isfinite().all()


def test_special_values_come_through():
    c = layer(6, 40, 50, [3], torch.bfloat16)
    c.x[1, 7], c.x[2, 3], c.bias[5] = math.nan, math.inf, -math.inf
    out, _ = forward(c)
    assert out[1].isnan().all() and bool((out[1].view(torch.int16) == 0x7FC0).all())
    assert not out[2].isfinite().any()
    for row in (0, 3, 4, 5):
        assert out[row, 5] == -math.inf and out[row, :5].isfinite().all()


def test_what_is_dropped_is_gone():
    c = layer(5, 30, 200, [3], torch.bfloat16)
    kept = kept_of(c.x, HALF, KEY)
    x = torch.where(kept, c.x, math.nan)
    low = forward(c._replace(x=x), HALF)[1]
    assert_same_bits(low, forward(c, HALF)[1])
    assert bool((forward(c, 0)[1] == 0).all())


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("shape", [(2, 33, 41), (3, 24, 41), (7, 33, 41), (7, 128, 256)], ids=str)
def test_nothing_outside_is_read_or_written(shape, at_end, isa):
    walls = Walls()

    def place(tensor):
        return walls.place(tensor.reshape(-1), at_end=at_end).view(tensor.shape)

    for dtype, ranks, kept in ((torch.bfloat16, [5, 3], HALF), (torch.float16, [5, 3], HALF),
                               (torch.bfloat16, [16, 32], 65536)):  # fmt: skip
        c = layer(*shape, ranks, dtype, grouped=True)
        low = [Factors(place(a.A), place(a.B), a.scaling) for a in c.adapters]
        x, weight, bias, grad = (place(t) for t in (c.x, c.weight, c.bias, c.grad))
        inside = c._replace(x=x, weight=weight, adapters=low, bias=bias, grad=grad, index=place(c.index))
        wanted, h = forward(c, kept)
        out, low_out = place(nans(*wanted.shape, dtype=dtype)), place(nans(*h.shape, dtype=torch.float32))
        lora_linear_cpu.lora_linear(out, low_out, *inside[:5], kept, KEY)
        assert_same_bits(out.clone(), wanted)
        for got, want in zip(backward(inside, low_out, kept), backward(c, h, kept), strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("shift", [1, 3, 31])
def test_any_byte_alignment(shift):
    def moved(tensor):
        memory = torch.zeros(tensor.nbytes + 128, dtype=torch.uint8)
        start = -memory.data_ptr() % 64 + shift
        memory[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
        view = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start)
        return view.view(tensor.shape)

    for m in (2, 9):
        c = layer(m, 40, 300, [4], torch.bfloat16)
        a, b, s = c.adapters[0]
        other = c._replace(x=moved(c.x), weight=moved(c.weight), adapters=[Factors(moved(a), moved(b), s)])
        assert_same_bits(forward(other)[0], forward(c)[0])
