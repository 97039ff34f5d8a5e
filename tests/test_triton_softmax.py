"""Softmax in Triton: rows in registers, walked tile by tile and in chunks; units in the last place, special
values, options, gradients, and bits that depend on the row alone.

On a device where there is one, else interpreted: there tiles are made small, so that rows of 1100 elements
take every way that rows of 200,000 take.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import pykernels as pk
from pykernels.kernels import exponential, row_shapes
from tests.bounds import assert_same_bits
from tests.cases import DTYPES
from tests.softmax_cases import INF, KINDS, SPECIAL, drawn, units
from tests.test_softmax_gradient import plain, within
from tests.test_softmax_kernels import logits, options
from tests.walls import Walls
from tests.where import DEVICE, EMULATED, rows_of, there

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, at Inf and NaN
kernels = rows_of("triton")
THEIRS = {"softmax": torch.softmax, "log_softmax": torch.log_softmax}
SMALL = row_shapes.Reach(whole=1024, walk=1024, each=16)
SETTINGS = {
    "whole": {"TILE": 1024},
    "walked": {"FORWARD": SMALL, "CAPPED": SMALL, "BACKWARD": SMALL},
    "chunks": {"WALKED": 64, "SPLIT_TILE": 1024},
}
SHAPES = {
    "whole": [(3, 100, 1), (1, 1024, 1), (2, 33, 3), (2, 40, 8), (1, 20, 40)],
    "walked": [(1, 1100, 1), (1, 1025, 2), (1, 70, 9)],
    "chunks": [(1, 1100, 1), (1, 1030, 9)],
}
"""Lengths on both sides of a tile; rows, few columns, a group of columns and a part of another."""
CASES = [(regime, shape) for regime in SETTINGS for shape in SHAPES[regime]]
LONG = [(regime, shape) for regime, shape in CASES if regime != "whole"]


def use(monkeypatch, regime):
    """Make rows of some lengths take the way named."""
    for name, value in SETTINGS[regime].items():
        monkeypatch.setattr(row_shapes, name, value)


def run(x, name="softmax", dtype=None, *, temperature=1.0, softcap=None, mask=None, sink=None, safe=False):
    """The result of a row op on x [outer, n, inner]; ``out`` starts as NaN."""
    shape = (x.shape[0], x.shape[2]) if name == "logsumexp" else x.shape
    out = torch.full(shape, math.nan, dtype=dtype or x.dtype, device=DEVICE)
    if name == "logsumexp":
        kernels.logsumexp(out, there(x), temperature)
    else:
        getattr(kernels, name)(out, there(x), temperature, softcap, there(mask), there(sink), safe)
    return out.cpu()


def check_all(x):
    """softmax within 4 units (the largest found here is 2.6), the logarithms within theirs."""
    wide, room = x.double(), 2.0**-22
    assert units(run(x), torch.softmax(wide, 1)).max() <= 4
    total = torch.logsumexp(wide, 1)
    torch.testing.assert_close(run(x, "logsumexp").double(), total, rtol=2.0**-23, atol=room)
    wanted = torch.log_softmax(wide, 1)
    torch.testing.assert_close(run(x, "log_softmax").double(), wanted, rtol=room, atol=room, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES["whole"], ids=str)
def test_units_in_the_last_place(shape, monkeypatch):
    """Of every kind of input, each in rows of its own."""
    use(monkeypatch, "whole")
    check_all(torch.cat([*(drawn(kind, shape, 1) for kind in KINDS), 10 * drawn("3 randn", shape) + 2e6]))


@pytest.mark.parametrize("kind", ["3 randn", "ramp", "beyond 1e6"])
@pytest.mark.parametrize(("regime", "shape"), LONG, ids=str)
def test_units_in_the_last_place_of_long_rows(regime, shape, kind, monkeypatch):
    use(monkeypatch, regime)
    x = drawn("3 randn", shape) * 10 + 2e6 if kind == "beyond 1e6" else drawn(kind, shape, 1)
    if kind == "3 randn":
        return check_all(x)
    assert units(run(x), torch.softmax(x.double(), 1)).max() <= 4


@pytest.mark.parametrize("n", [16384, 16385])
def test_lengths_on_both_sides_of_each_regime(n):
    x = drawn("3 randn", (1, n, 1), n)
    assert units(run(x), torch.softmax(x.double(), 1)).max() <= 4
    y = drawn("3 randn", (1, n, 1)).softmax(1)
    out = torch.full(y.shape, math.nan, device=DEVICE)
    kernels.softmax_backward(out, there(x), there(y), 1.0)
    wide, p = x.double(), y.double()
    dot, size = (wide * p).sum(), (wide * p).abs().sum()
    within(out.cpu(), p * (wide - dot), p * (wide.abs() + size))


def test_the_longest_sums_fit_their_integers():
    n = row_shapes.WALKED
    x = torch.full((1, n, 1), 0.3465)  # log(2) / 2: nearly the largest mantissa
    assert exponential.MOST_TERMS >= n and units(run(x), torch.softmax(x.double(), 1)).max() <= 4
    for length in (n + 1, 10**7, 2**31 + 7, 2**40):
        shape = row_shapes.shape_of(torch.Size((1, length, 1)), row_shapes.FORWARD)
        assert shape.chunk <= exponential.MOST_TERMS and shape.chunk % shape.tile == 0


def test_no_choice_depends_on_the_batch():
    for n, inner in itertools.product((1, 100, 5000, 40_000, 200_000), (1, 3, 8, 100)):
        for reach in (row_shapes.FORWARD, row_shapes.CAPPED):
            one, many = (row_shapes.shape_of(torch.Size((b, n, inner)), reach) for b in (1, 999))
            assert one._replace(groups=0) == many._replace(groups=0)


@pytest.mark.parametrize(
    ("regime", "last"), [("whole", False), ("whole", True), ("walked", False), ("chunks", True)]
)
def test_special_values(regime, last, monkeypatch):
    """All at once, each in a row of its own among -inf; half of them where a row is long."""
    use(monkeypatch, regime)
    n, chosen = 20 if regime == "whole" else 1030, list(SPECIAL.values())
    if regime != "whole":
        chosen = chosen[last::2]
    x = torch.full((len(chosen), n, 1), -INF)
    for row, values in zip(x, chosen, strict=True):
        row[n - len(values) if last else 0 :][: len(values), 0] = torch.tensor(values)
    for given in (x, x.view(-1, n, 2)) if n % 2 == 0 and regime == "whole" else (x,):
        for op, theirs in THEIRS.items():
            got, wanted = run(given, op), theirs(given.double(), 1).float()
            torch.testing.assert_close(got, wanted, rtol=6e-7, atol=2e-45, equal_nan=True)
            assert bool((got.view(torch.int32)[got.isnan()] == 0x7FC00000).all())
        got, wanted = run(given, "logsumexp"), torch.logsumexp(given, 1)
        torch.testing.assert_close(got, wanted, rtol=3e-7, atol=0, equal_nan=True)
    if regime != "whole":
        return
    safe = torch.ops.aten._safe_softmax(x, 1)
    torch.testing.assert_close(run(x, safe=True), safe, rtol=6e-7, atol=1e-37, equal_nan=True)
    logarithm = torch.log_softmax(x.double(), 1).float().where((x != -INF).any(1, keepdim=True), -INF)
    got = run(x, "log_softmax", safe=True)
    torch.testing.assert_close(got, logarithm, rtol=6e-7, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize(
    ("regime", "name"),
    [
        *(("whole", name) for name in options((1, 1, 1))),
        *itertools.product(("walked", "chunks"), ("all", "sink far above", "safe")),
    ],
)
def test_options(regime, name, monkeypatch):
    use(monkeypatch, regime)
    for shape in SHAPES[regime][:1] if regime == "chunks" else SHAPES[regime][:1] + SHAPES[regime][2:]:
        x, chosen = drawn("3 randn", shape), options(shape)[name]
        z = logits(x, **{k: v for k, v in chosen.items() if k not in ("sink", "safe")}).double()
        extra = [chosen["sink"].double().unsqueeze(1)] if "sink" in chosen else []
        wanted = torch.softmax(torch.cat([z, *extra], 1), 1)[:, : shape[1]]
        got = run(x, **chosen)
        assert units(got, wanted.nan_to_num(0.0) if chosen.get("safe") else wanted).max() <= 5


def test_a_mask_takes_out_what_is_no_number(monkeypatch):
    x = drawn("3 randn", (2, 64, 1))
    keep = torch.rand(x.shape) < 0.5
    assert_same_bits(run(x.where(keep, math.nan), mask=keep), run(x, mask=keep))


def test_masks_that_are_read_in_wide_words():
    for shape, n in (((3, 64, 1), 1), ((2, 40, 16), 2)):
        x, mask = drawn("3 randn", shape), torch.randn(shape)
        for given in (mask, mask > -1, mask.to(torch.bfloat16)):
            whole = torch.zeros(mask.numel() + 16, dtype=given.dtype)
            shifted = whole[n : n + mask.numel()].view(shape).copy_(given)
            assert_same_bits(run(x, mask=shifted), run(x, mask=given))


@pytest.mark.parametrize(("regime", "dtype"), list(zip(SETTINGS, DTYPES, strict=True)))
def test_bits_depend_on_the_row_alone(regime, dtype, monkeypatch):
    """Not on its neighbours, their number, alignment, or whether the result goes over the input."""
    use(monkeypatch, regime)
    n = 61 if regime == "whole" else 1100
    rows = drawn("masked", (3, n, 1), n).to(dtype)
    rows[1] = 1e4 if dtype == torch.float16 else 1e7  # is shifted
    for op in THEIRS:
        wanted = run(rows[:1], op)
        assert_same_bits(run(rows, op)[:1], wanted)
        assert_same_bits(run(rows.flip(0), op)[-1:], wanted)
        memory = torch.zeros(n + 3, dtype=dtype, device=DEVICE)
        shifted = memory[3:].copy_(rows[0, :, 0]).view(1, n, 1)
        getattr(kernels, op)(shifted, shifted, 1.0, None, None, None, False)
        assert_same_bits(shifted.cpu(), wanted)


@pytest.mark.parametrize("n", [61, 600])
def test_bits_do_not_depend_on_the_dimension(n, monkeypatch):
    """Of rows that stay in registers, whether the columns do or not."""
    rows = drawn("masked", (9, n, 1), n)
    rows[1] = -1e7
    for op in THEIRS:
        wanted = run(rows, op)
        for columns in (9, 3):
            x = rows[:columns].permute(2, 1, 0).contiguous()
            assert_same_bits(run(x, op).permute(2, 1, 0).contiguous(), wanted[:columns])


@pytest.mark.parametrize(("regime", "shape"), CASES, ids=str)
def test_every_pair_of_dtypes(regime, shape, monkeypatch):
    use(monkeypatch, regime)
    pairs = list(itertools.product(DTYPES, DTYPES))
    for dtype, out_dtype in pairs if regime == "whole" else pairs[4 + shape[2] % 2 :: 4]:
        x = drawn("30 randn" if dtype == torch.float16 else "3 randn", shape).to(dtype)
        room = 4 if out_dtype == torch.float32 else 0.52
        assert units(run(x, dtype=out_dtype), torch.softmax(x.double(), 1)).max() <= room


@pytest.mark.parametrize(("regime", "shape"), CASES, ids=str)
def test_gradients_against_float64(regime, shape, monkeypatch):
    use(monkeypatch, regime)
    for i, dtype in enumerate(DTYPES):
        if regime == "chunks" and i != shape[2] % 2:
            continue
        g = drawn("3 randn", shape, 1).to(dtype)
        wide, result = g.double(), DTYPES[(i + (regime == "chunks")) % 3]
        y = drawn("3 randn", shape).softmax(1).to(dtype)
        p, out = y.double(), torch.full(shape, math.nan, dtype=result, device=DEVICE)
        dot = (wide * p).sum(1, keepdim=True)
        kernels.softmax_backward(out, there(g), there(y), 0.7)
        size = 0.7 * p * (wide.abs() + (wide * p).abs().sum(1, keepdim=True))
        within(out.cpu(), 0.7 * p * (wide - dot), size)
        y = drawn("30 randn", shape).log_softmax(1).to(dtype)
        p, total = y.double().exp(), wide.sum(1, keepdim=True)
        over = there(g).clone() if dtype == result else out
        kernels.log_softmax_backward(over, over if dtype == result else there(g), there(y), 0.7)
        size = 0.7 * (wide.abs() + (2 + y.double().abs()) * p * wide.abs().sum(1, keepdim=True))
        within(over.cpu(), 0.7 * (wide - p * total), size)


@pytest.mark.parametrize("dim", [0, 1])
def test_ops_choose_the_backend(dim):
    chosen = {"temperature": 0.7, "softcap": 5.0, "mask": there(drawn("3 randn", (30, 40), 1) > -3)}
    for name in ("softmax", "log_softmax", "logsumexp"):
        given = chosen if name != "logsumexp" else {"temperature": 0.7}
        x = there(drawn("3 randn", (30, 40))).requires_grad_()
        wide = x.detach().double().requires_grad_()
        with pk.use_backend("triton"):
            y = getattr(pk, name)(x, dim, **given)
            g = there(drawn("3 randn", y.shape, 1))
            [got] = torch.autograd.grad(y, [x], g)
        wanted = plain(name, wide, dim, given)
        [gradient] = torch.autograd.grad(wanted, [wide], g.double())
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.double(), gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("regime", SETTINGS)
def test_any_byte_alignment(regime, monkeypatch):
    use(monkeypatch, regime)
    n = 61 if regime == "whole" else 1030
    for start, dtype in itertools.product((1, 2, 8), DTYPES) if regime == "whole" else [(1, DTYPES[0])]:
        if start % dtype.itemsize and not EMULATED:
            continue  # torch offers no such view on a device's tensors
        x, g = (drawn("3 randn", (1, n, 1), i).to(dtype) for i in (0, 1))
        given = []
        for tensor in (x, g, torch.zeros_like(x)):
            raw = torch.full((n * dtype.itemsize + 32,), 0xA5, dtype=torch.uint8)
            raw[start : start + n * dtype.itemsize] = tensor.view(torch.uint8).flatten()
            view = torch.frombuffer(raw.numpy(), dtype=dtype, count=n, offset=start).view(1, n, 1)
            given.append(
                view if EMULATED else there(raw)[start : start + n * dtype.itemsize].view(dtype).view(1, n, 1)
            )
        kernels.softmax(given[2], given[0], 1.0, None, None, None, False)
        assert_same_bits(given[2].cpu().clone(), run(x))
        kernels.log_softmax_backward(given[2], given[1], given[0], 0.5)
        wanted = torch.empty(x.shape, dtype=dtype, device=DEVICE)
        kernels.log_softmax_backward(wanted, there(g), there(x), 0.5)
        assert_same_bits(given[2].cpu().clone(), wanted.cpu())


@pytest.mark.memory
@pytest.mark.skipif(not EMULATED, reason="compute-sanitizer watches the device's memory (bench/device.sh)")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize(("regime", "shape"), [*CASES[:5], CASES[5], CASES[8]], ids=str)
def test_nothing_outside_is_touched(regime, shape, at_end, monkeypatch):
    use(monkeypatch, regime)
    walls, dtype = Walls(), DTYPES[shape[1] % 3]
    x, mask = drawn("3 randn", shape).to(dtype), drawn("3 randn", shape, 1) > -2
    sink, sums = torch.randn(shape[0], shape[2]), torch.zeros(shape[0], shape[2])
    g, y, out, over, m, b, lse = (
        walls.place(t.flatten(), at_end=at_end).view(t.shape)
        for t in (x, x.softmax(1), x, x, mask, sink, sums.to(dtype))
    )
    kernels.softmax(out, g, 0.7, None, m, b, False)
    assert_same_bits(out.clone(), run(x, temperature=0.7, mask=mask, sink=sink))
    kernels.logsumexp(lse, g, 1.0)
    assert_same_bits(lse.clone(), run(x, "logsumexp"))
    kernels.softmax_backward(over, g, y, 1.0)
    assert bool(over.isfinite().all())


def test_no_elements():
    for shape in ((0, 4, 1), (3, 0, 1), (2, 0, 5), (2, 3, 0)):
        assert run(torch.empty(shape)).shape == run(torch.empty(shape), "log_softmax").shape == shape
        out = torch.empty(shape, device=DEVICE)
        kernels.softmax_backward(out, out, out, 1.0)
    assert torch.equal(run(torch.empty(3, 0, 9), "logsumexp"), torch.full((3, 9), -INF))
    assert run(torch.empty(0, 4, 1), "logsumexp").shape == (0, 1)


def test_polynomials_are_those_of_the_header():
    header = (Path(__file__).parent.parent / "csrc" / "math" / "exp.h").read_text()
    for name, mine in (("kExp6", "EXP6"), ("kExp4", "EXP4"), ("kMinus1", "MINUS1")):
        [text] = re.findall(rf"{name}\[\] = \{{(.*?)\}};", header, re.DOTALL)
        wanted = tuple(float.fromhex(c.strip().removesuffix("f")) for c in text.split(","))
        assert getattr(exponential, mine).value == wanted


def test_a_failed_launch_names_op_rows_and_error():
    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError("CUDA: invalid argument")

    said = r"softmax: rows \[2, 3, 1\] of torch.float32 on .*: the launch failed: CUDA: invalid"
    with pytest.raises(RuntimeError, match=said):
        row_shapes.run("softmax", Kernel(), 1, there(torch.ones(2, 3, 1)))


@pytest.mark.skipif(EMULATED, reason="no CUDA device")
@pytest.mark.parametrize("n", [100, 40_000, 200_000])
def test_in_a_cuda_graph(n):
    x = there(drawn("3 randn", (2, n, 1)))
    out = torch.full_like(x, math.nan)
    kernels.softmax(out, x, 1.0, None, None, None, False)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.softmax(out, x, 1.0, None, None, None, False)
    x.copy_(x.flip(1))
    graph.replay()
    assert_same_bits(out.cpu(), run(x.cpu()))
