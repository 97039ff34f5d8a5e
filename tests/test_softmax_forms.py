"""Forms of softmax's rows on every instruction set: several together, exponentials stored, past the cache.

No bit may tell which form ran: each result is held against the same rows one at a time, as columns, in place
or at an address where nothing goes past the cache.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.softmax_cases import INF, SPECIAL, drawn, units

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
ISAS = native.isas()
BLOCK = 4096
PIECE = 65_536
STORED = 1 << 20  # Regime::stored of AVX2 and of what has no more
STREAMED = 1 << 22  # Regime::streamed of AVX2
OPS = ("softmax", "log_softmax")
ODD = {name: row for name, row in SPECIAL.items() if len(row) <= 5}


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that this machine has, one after another."""
    with native.use_isa(request.param):
        yield request.param


def run(x, op="softmax", out=None):
    """The compiled result of rows x [rows, n] on two threads; ``out`` starts as NaN."""
    out = torch.full(x.shape, math.nan, dtype=x.dtype) if out is None else out
    with native.use_threads(2):
        getattr(native, op)(out.unsqueeze(2), x.unsqueeze(2), 1.0, None, None, None, False)
    return out


def rows_among(n, dtype):
    """[2 * k, n] of logits: every other row has special values and -inf behind them."""
    x = drawn("3 randn", (2 * len(ODD), n), n)
    for i, row in enumerate(ODD.values()):
        x[2 * i] = -INF
        x[2 * i, : len(row)] = torch.tensor(row[:n])
    x[-1] = 5.0  # so that the last rows come without a neighbour to go with
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("n", [5, 64, 127, 129, 513, 4000])
def test_rows_together_are_rows_alone(n, dtype, isa):
    x = rows_among(n, dtype)
    for op in OPS:
        together = run(x, op)
        inplace = x.clone()
        assert_same_bits(run(inplace, op, inplace), together)
        alone = torch.full_like(x, math.nan)
        for row, out in zip(x, alone, strict=True):
            run(row.unsqueeze(0), op, out.unsqueeze(0))
        assert_same_bits(alone, together)


def steps(n, sizes):
    """[n] that rises or falls from block to block: 3 randn around every size in turn."""
    x = drawn("3 randn", (n,), n)
    for i, block in enumerate(x.split(BLOCK)):
        block += sizes[i % len(sizes)]
    return x


RISES = {
    "by less than room": [0.0, 12.0],
    "by more": [-40.0, 0.0, 40.0],
    "past float": [-300.0, 0.0, 500.0],
    "falls": [300.0, 0.0, -300.0],
    "from nothing": [-INF, -INF, 5.0],
    "from least": [torch.finfo(torch.float32).min, -70.0],
    "past a million": [0.0, 2e6],
}


@pytest.mark.parametrize(
    ("name", "n"),
    [*product(RISES, (BLOCK, BLOCK + 1, 3 * BLOCK)), ("by more", PIECE + 40), ("falls", PIECE + 40)],
)
def test_the_exponent_rises_between_blocks(name, n, isa):
    """In one row and in rows of threads; a column is computed from its largest element."""
    x = steps(n, RISES[name])
    for turned in (x, x.flip(0)):
        columns = torch.stack([turned, drawn("3 randn", (n,), 1), turned], 1).unsqueeze(0)
        got = torch.full_like(columns, math.nan)
        native.softmax(got, columns, 1.0, None, None, None, False)
        wanted = got[0, :, 0]
        assert units(wanted, torch.softmax(turned.double(), 0)).max() <= 4
        assert_same_bits(run(turned.unsqueeze(0))[0], wanted.contiguous())
        assert_same_bits(run(turned.expand(9, n).contiguous())[4], wanted.contiguous())


@pytest.mark.parametrize("at", [0, 7, 8, 16, 31, BLOCK - 1])
def test_the_largest_of_the_block_behind_is_found(at, isa):
    """In any lane: unseen, it would be infinite in units of the blocks before."""
    x = drawn("3 randn", (4 * BLOCK,), 3)
    x[BLOCK + at], x[3 * BLOCK + at] = 200.0, 400.0
    assert units(run(x.unsqueeze(0))[0], torch.softmax(x.double(), 0)).max() <= 4
    x[BLOCK] = math.nan
    assert run(x.unsqueeze(0)).isnan().all()


@pytest.mark.parametrize("value", [math.nan, INF, 3e6, 1e6])
def test_a_rare_row_in_place_is_read_again(value, isa):
    """The last block says that the others were in vain, when their exponentials stand somewhere."""
    x = steps(4 * BLOCK, [0.0, 30.0])
    x[-1] = value
    wanted = run(x.unsqueeze(0))
    inplace = x.clone().unsqueeze(0)
    assert_same_bits(run(inplace, out=inplace), wanted)
    exact = torch.softmax(x.double(), 0)
    assert torch.equal(wanted[0].isnan(), exact.isnan()) and units(wanted[0], exact).max() <= 4


@pytest.mark.parametrize("n", [STORED, STORED + 1], ids=["stored", "twice"])
def test_both_forms_give_the_bits_of_columns(n, isa):
    x = drawn("masked", (n,), 3)
    columns = torch.stack([x] * 2, 1).unsqueeze(0)
    got = torch.empty_like(columns)
    with native.use_threads(2):
        native.softmax(got, columns, 1.0, None, None, None, False)
    assert_same_bits(run(x.unsqueeze(0))[0], got[0, :, 1].contiguous())


SHAPES = [(32_769, 128), (1025, 4096), (257, 16_384), (4, STORED + 16), (4097, 1025)]


@pytest.fixture(scope="module")
def drawn_once():
    """Logits and gradients, as many as the largest of the shapes takes."""
    most = max(map(math.prod, SHAPES))
    return drawn("masked", (most,)), drawn("3 randn", (most,), 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_past_the_cache_are_the_same_bits(shape, drawn_once):
    """Streamed where rows start on lines; at an odd address nothing is. NaN around shows what is written."""
    numel = math.prod(shape)
    assert numel >= STREAMED
    memory = torch.empty(numel + 32)
    start = -memory.data_ptr() % 64 // 4
    x, grad = (t[:numel].view(shape) for t in drawn_once)
    odd = [torch.empty(numel + 1)[1:].view(shape) for _ in range(2)]
    for op in OPS:
        run(x, op, odd[0])
        back(op, odd[1], grad, odd[0])
        for wanted in odd:
            out = memory.fill_(math.nan)[start : start + numel].view(shape)
            if wanted is odd[0]:
                run(x, op, out)
            else:
                back(op, out, grad, odd[0])
            assert_same_bits(out, wanted)
            assert int(memory[:start].isnan().sum()) + int(memory[start + numel :].isnan().sum()) == 32


def back(op, out, grad, y):
    """The compiled gradient into ``out`` [rows, n], on two threads."""
    with native.use_threads(2):
        getattr(native, f"{op}_backward")(*(t.unsqueeze(2) for t in (out, grad, y)), 1.0)
