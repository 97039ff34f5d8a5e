"""CUDA's softmax: the CPU kernels' table of tests, in every regime of csrc/cuda/softmax_deal.cu.

Without a device the kernels run emulated. There a clusters' and chunks' lengths can be made small, and blocks
and threads run in reverse; on a device the lengths are the true ones.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import pykernels as pk
from pykernels import cuda
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.softmax_cases import INF, KINDS, LOG_ROOM, SPECIAL, drawn, exact, units
from tests.test_softmax_kernels import options
from tests.walls import Walls
from tests.where import DEVICE, EMULATED, there

OPS = ("softmax", "log_softmax")
TRUE = (96 << 10, 208 << 10, 32768, 4096, 1024)
DEFAULT = (*TRUE, True, 227 << 10)
SMALL = {
    "clusters": (512, 2048, 512, 256, 4, True, 227 << 10),
    "no clusters": (512, 2048, 512, 256, 4, False, 227 << 10),
    "sm_80": (*TRUE, False, 163 << 10),
    "sm_89": (*TRUE, False, 99 << 10),
    "default": DEFAULT,
}
"""Arguments of ``_cuda.regimes``: bytes that a block keeps, at most, elements of a chunk of a row and of a
column, chunks; whether there are clusters, and the shared memory that a block may have."""

LANES = (1, 5, 31, 128, 129, 1000, 1024, 1025, 2049)
"""On each side of: a vector, 4, 8, 32 and 64 threads for a row (in float32; in 16 bits half as many)."""

if EMULATED:
    LENGTHS = {
        "clusters": (128, 129, 257, 513, 1025, 4096, 4097),
        "no clusters": (512, 513, 2048, 2049, 4609),
        "default": LANES,
    }
else:
    LENGTHS = {"default": (*LANES, 24_576, 24_577, 49_153, 98_305, 131_072, 262_144, 425_985, 1_000_003)}
CASES = [(regime, n) for regime, lengths in LENGTHS.items() for n in lengths]
FEW = [(regime, n) for regime, n in CASES if n in (5, 129, 513, 1025, 4097, 4609, 98_305, 1_000_003)]


@pytest.fixture(autouse=True)
def regime(request):
    """The regimes that a test names by its parameter, put back afterwards."""
    name = request.node.callspec.params.get("where", "default") if hasattr(request.node, "callspec") else ""
    if EMULATED:
        cuda._cuda.regimes(*SMALL[name or "default"])
    yield
    if EMULATED:
        cuda._cuda.regimes(*DEFAULT)


def run(x, op="softmax", dtype=None, *, temperature=1.0, softcap=None, mask=None, sink=None, safe=False):
    """The result of a row op on x [outer, n, inner], on the CPU; ``out`` starts as NaN."""
    shape = (x.shape[0], x.shape[2]) if op == "logsumexp" else x.shape
    out = torch.full(shape, math.nan, dtype=dtype or x.dtype, device=DEVICE)
    if op == "logsumexp":
        cuda.logsumexp(out, there(x), temperature)
    else:
        at = (None if t is None else there(t) for t in (mask, sink))
        getattr(cuda, op)(out, there(x), temperature, softcap, *at, safe)
    return out.cpu()


def rows(n, dtype=torch.float32):
    """One row of every kind, [kinds, n, 1]; the last is beyond what exponentials take unshifted."""
    kinds = [drawn(kind, (n,), n) for kind in KINDS]
    return torch.stack([*kinds, 10 * kinds[0] + 2e6]).unsqueeze(2).to(dtype)


def both(x):
    """The rows, and where they are no longer than two chunks of a column, the same as columns."""
    return (x, x.transpose(0, 2).contiguous()) if x.shape[1] <= 600 else (x,)


@pytest.mark.parametrize(("where", "n"), CASES)
def test_units_in_the_last_place(where, n):
    """float32: at most 3; the largest found here is 2.5."""
    x = rows(n)
    for z in both(x):
        assert units(run(z), torch.softmax(z.double(), 1)).max() <= 3
        total = torch.logsumexp(z.double(), 1)
        torch.testing.assert_close(run(z, "logsumexp").double(), total, rtol=2.0**-23, atol=LOG_ROOM)
        wanted = torch.log_softmax(z.double(), 1)
        got = run(z, "log_softmax").double()
        torch.testing.assert_close(got, wanted, rtol=2.0**-23, atol=LOG_ROOM, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=SHORT.get)
@pytest.mark.parametrize(("where", "n"), CASES)
def test_16_bits_are_rounded_once(where, n, dtype):
    x = rows(n if where == "default" else 2 * n, dtype)[:-1]  # as many bytes as in float32
    for z in both(x):
        assert units(run(z), torch.softmax(z.double(), 1)).max() <= 0.52
        for op in ("log_softmax", "logsumexp"):
            got, wanted = run(z, op).double(), getattr(torch, op)(z.double(), 1)
            rounding = 0.51 * torch.finfo(dtype).eps
            torch.testing.assert_close(got, wanted, rtol=rounding, atol=LOG_ROOM, equal_nan=True)


@pytest.mark.parametrize(
    ("where", "around"), [("default", 0), ("default", 3), ("clusters", 1500), ("no clusters", 2500)]
)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name, where, around):
    row, fill = torch.tensor(SPECIAL[name], dtype=torch.float32), torch.full((around,), -INF)
    for x in (torch.cat([fill, row]), torch.cat([row, fill])):
        for columns in (1, 3):
            z = x.view(1, -1, 1).expand(-1, -1, columns).contiguous()
            for op in OPS:
                got, wanted = run(z, op), getattr(torch, op)(z.double(), 1).float()
                room = 2e-45 if op == "softmax" else LOG_ROOM / 2
                torch.testing.assert_close(got, wanted, rtol=6e-7, atol=room, equal_nan=True)
                assert bool((got.view(torch.int32)[got.isnan()] == 0x7FC00000).all())
            wanted = torch.logsumexp(z, 1)
            torch.testing.assert_close(run(z, "logsumexp"), wanted, rtol=3e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("low", [-709.8, -8e5, -3e38])
def test_an_infinity_before_far_smaller_logits(low):
    """A thread's next batch begins its sum anew, in units that 2^0 does not fit."""
    x = torch.full((1, 128, 1), low)
    x[0, 0] = INF
    for z in (x, x.repeat(1, 3, 3)):
        assert torch.equal(run(z, "logsumexp"), torch.logsumexp(z, 1)) and bool(run(z).isnan().all())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=SHORT.get)
def test_special_values_of_16_bits(dtype):
    """Rounded to 16 bits before, which makes -inf of the least float32; NaN where torch has one."""
    for name, values in SPECIAL.items():
        x = torch.tensor(values).to(dtype).view(1, -1, 1)
        assert units(run(x), torch.softmax(x.double(), 1)).max() <= 0.52, name
        got, wanted = run(x, "log_softmax"), torch.log_softmax(x.double(), 1)
        rounding = 0.51 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=LOG_ROOM, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize(("where", "n"), FEW)
def test_bits_depend_on_the_row_alone(where, n, dtype):
    """Not on neighbours, its place among them, alignment, order of threads, or whether it is in place."""
    row, other = drawn("masked", (n,), n).to(dtype), drawn("3 randn", (7, n, 1), n).to(dtype)
    for op, turn in itertools.product(OPS, (False, True)):
        wanted = run(row.view(1, n, 1), op) if not turn else run(other[:1], op)
        for place in (0, 3, 6):
            x = other.clone()
            x[place] = row.view(n, 1) if not turn else other[0]
            assert_same_bits(run(x, op)[place].reshape(n), wanted.reshape(n))
    for shift in (1, 2, 7):
        memory = torch.zeros(n * dtype.itemsize + 64, dtype=torch.uint8)
        x = memory[shift : shift + n * dtype.itemsize].view(torch.uint8)
        x.copy_(row.view(torch.uint8))
        got = run_bytes(memory.to(DEVICE), shift, n, dtype)
        assert_same_bits(got, run(row.view(1, n, 1)).view(n))


def run_bytes(memory, shift, n, dtype):
    """softmax in place at any address, on the CPU; nothing around it may change."""
    before = memory.clone()
    job = cuda._cuda.Softmax(
        memory.data_ptr() + shift, cuda.CODES[dtype], memory.data_ptr() + shift, cuda.CODES[dtype],
        1, n, 1, 0, 0, -1, (0, 0, 0), 0, (0, 0), 1.0, 0.0, False,
    )  # fmt: skip
    device, stream = cuda.place(DEVICE if DEVICE.index is not None or EMULATED else torch.device("cuda", 0))
    scratch = torch.empty(max(1, job.scratch(device)), dtype=torch.uint8, device=DEVICE)
    job.run(device, stream, scratch.data_ptr())
    end = shift + n * dtype.itemsize
    assert torch.equal(memory[:shift], before[:shift]) and torch.equal(memory[end:], before[end:])
    return memory[shift:end].cpu().clone().view(dtype)


@pytest.mark.skipif(not EMULATED, reason="a device has an order of its own")
@pytest.mark.parametrize(("where", "n"), FEW)
def test_bits_do_not_depend_on_the_order_of_blocks(where, n):
    x = rows(n)
    for z, op in itertools.product(both(x), (*OPS, "logsumexp")):
        wanted = run(z, op)
        cuda._cuda.reverse(True)
        try:
            assert_same_bits(run(z, op), wanted)
        finally:
            cuda._cuda.reverse(False)


@pytest.mark.memory
@pytest.mark.skipif(not EMULATED, reason="walls stand in the host's memory")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize(("where", "n"), FEW)
def test_nothing_outside_is_read_or_written(where, n, at_end):
    for dtype, (outer, inner) in zip(DTYPES, ((3, 1), (1, 1), (2, 5)), strict=True):
        walls, shape = Walls(), (outer, n, inner)
        x = drawn("3 randn", shape, n).to(dtype)
        keep, sink = torch.rand(shape) < 0.7, torch.zeros(outer, inner)

        def place(t, walls=walls):
            return walls.place(t.reshape(-1), at_end=at_end).view(t.shape)

        out = place(torch.full(shape, math.nan, dtype=dtype))
        cuda.softmax(out, place(x), 2.0, 20.0, place(keep), place(sink), False)
        wanted = run(x, temperature=2.0, softcap=20.0, mask=keep, sink=sink)
        assert_same_bits(out.clone(), wanted)
        cuda.softmax_backward(out, place(x), place(wanted), 1.0)
        assert_same_bits(out.clone(), back("softmax_backward", x, wanted, dtype, 1.0))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize(
    ("where", "shape"),
    [("default", (3, 100, 1)), ("clusters", (2, 600, 1)), ("no clusters", (2, 3001, 1)),
     ("default", (2, 77, 5))],
)  # fmt: skip
def test_every_pair_of_dtypes(where, shape, dtype, out_dtype):
    x = drawn("3 randn", shape).to(dtype)
    room = 4 if out_dtype == torch.float32 else 0.52
    assert units(run(x, dtype=out_dtype), torch.softmax(x.double(), 1)).max() <= room


@pytest.mark.parametrize(
    ("where", "shape"),
    [("default", (2, 100, 1)), ("clusters", (2, 1001, 1)), ("no clusters", (2, 3001, 1)),
     ("default", (2, 30, 5)), ("clusters", (1, 300, 33))],
)  # fmt: skip
@pytest.mark.parametrize("name", options((1, 1, 1)))
def test_options(name, where, shape):
    x, chosen = drawn("3 randn", shape), dict(options(shape)[name])
    safe, sink = chosen.pop("safe", False), chosen.pop("sink", None)
    wanted, logs, _ = exact(x, 1, **chosen, sink=None if sink is None else sink.unsqueeze(1))
    got = run(x, **chosen, sink=sink, safe=safe)
    wanted = wanted.nan_to_num(0.0) if safe else wanted
    assert torch.equal(got.isnan(), wanted.isnan())
    assert units(got, wanted).max() <= 4
    if sink is None and not safe:
        got = run(x, "log_softmax", **chosen)
        torch.testing.assert_close(got.double(), logs, rtol=2.0**-23, atol=LOG_ROOM, equal_nan=True)


@pytest.mark.parametrize("far", [0.0, 3e4, 5e5])
def test_a_sink_far_from_0_beside_16_bit_results(far):
    """The quick exponentials are off by as much as z is far from 0, all by as much: the sink's as well."""
    x, sink = drawn("3 randn", (2, 100, 1)) + far, torch.full((2, 1), far + 2)
    wanted, _, _ = exact(x, 1, sink=sink.unsqueeze(1))
    assert units(run(x, dtype=torch.float16, sink=sink), wanted).max() <= 0.52


@pytest.mark.parametrize("temperature", [3.0, 0.7, 1e-30, 1e30, 2.0**-126])
def test_quotients_are_rounded_once(temperature):
    """Where the reciprocal serves, where it does not, and for what it would lose: -inf, 0, denormals."""
    values = torch.cat([drawn("3 randn", (500,)), torch.tensor([0.0, -0.0, 1e-40, 1e38, 1e-30, -INF])])
    z = values / temperature
    got = run(values.view(1, -1, 1), "log_softmax", temperature=temperature).view(-1)
    torch.testing.assert_close(
        got, run(z.view(1, -1, 1), "log_softmax").view(-1), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("inner", [1, 3])
def test_a_masked_nan_is_not_seen(inner):
    x = drawn("3 randn", (2, 50, inner))
    keep = torch.rand(x.shape) < 0.5
    assert_same_bits(run(x.where(keep, math.nan), mask=keep), run(x, mask=keep))


def test_no_elements():
    for shape in ((0, 4, 1), (3, 0, 1), (2, 0, 5), (2, 3, 0)):
        assert run(torch.empty(shape)).shape == shape
        assert back("softmax_backward", torch.empty(shape), torch.empty(shape), torch.float32).shape == shape
    for inner in (1, 20):
        assert torch.equal(run(torch.empty(3, 0, inner), "logsumexp"), torch.full((3, inner), -INF))


def back(op, grad, y, dtype, scale=0.5):
    """A gradient, on the CPU."""
    out = torch.full(y.shape, math.nan, dtype=dtype, device=DEVICE)
    getattr(cuda, op)(out, there(grad), there(y), scale)
    return out.cpu()


def close_gradient(got, op, grad, y, scale=0.5):
    """Within a few roundings of float32 of its terms, and the last rounding."""
    g, y = grad.double(), y.double()
    if op == "softmax_backward":
        parts, dot = (y, g), (g * y)
        wanted = scale * y * (g - dot.sum(1, keepdim=True))
        size = parts[0].abs() * (parts[1].abs() + dot.abs().sum(1, keepdim=True))
    else:
        wanted = scale * (g - y.exp() * g.sum(1, keepdim=True))
        size = g.abs() + y.exp() * g.abs().sum(1, keepdim=True)
    rounding = torch.finfo(got.dtype).eps / 2 * wanted.abs() + torch.finfo(got.dtype).smallest_normal
    assert bool(((got.double() - wanted).abs() <= scale * size * 2.0**-21 + rounding).all())


@pytest.mark.parametrize("out_dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize(
    ("where", "shape"),
    [("default", (3, 1, 1)), ("default", (2, 333, 1)), ("clusters", (2, 700, 1)),
     ("no clusters", (2, 5003, 1)), ("default", (2, 33, 5)), ("clusters", (1, 300, 33))],
)  # fmt: skip
@pytest.mark.parametrize("op", OPS)
def test_gradients(op, where, shape, out_dtype):
    x = drawn("3 randn", shape)
    for dtype, grad_dtype in [*zip(DTYPES, DTYPES, strict=True), *zip(DTYPES, DTYPES[::-1], strict=True)]:
        y = getattr(torch, op)(x, 1).to(dtype)
        grad = drawn("3 randn", shape, 1).to(grad_dtype)
        got = back(f"{op}_backward", grad, y, out_dtype)
        close_gradient(got, f"{op}_backward", grad, y)
        again = back(f"{op}_backward", grad[-1:].contiguous(), y[-1:].contiguous(), out_dtype)
        assert_same_bits(got[-1:].contiguous(), again)


@pytest.mark.parametrize("op", OPS)
def test_tiny_gradients_lose_no_digits(op):
    y, grad = getattr(torch, op)(drawn("3 randn", (2, 50, 1)), 1), 1e-28 * drawn("3 randn", (2, 50, 1), 1)
    close_gradient(back(f"{op}_backward", grad, y, torch.float32), f"{op}_backward", grad, y)


@pytest.mark.parametrize("op", OPS)
def test_gradients_in_place(op):
    y = getattr(torch, op)(drawn("3 randn", (2, 300, 1)), 1)
    grad = drawn("3 randn", (2, 300, 1), 1)
    wanted = back(f"{op}_backward", grad, y, torch.float32)
    for over in (0, 1):
        given = [there(grad.clone()), there(y.clone())]
        getattr(cuda, f"{op}_backward")(given[over], *given, 0.5)
        assert_same_bits(given[over].cpu(), wanted)


def test_public_ops_come_here():
    """Strides, dims, options, gradients and the operators, on tensors of the device."""
    x = there(drawn("3 randn", (4, 6, 50))).transpose(1, 2).requires_grad_()
    keep = there(torch.rand(4, 1, 6) < 0.8)
    with pk.use_backend("cuda"):
        for dim in (0, 1, -1):
            y = pk.softmax(x, dim, mask=keep, temperature=0.5, softcap=10.0, sink=0.3, safe=True)
            logs, sums = pk.log_softmax(x, dim), pk.logsumexp(x, dim, temperature=2.0)
            (y.square().sum() + logs.square().mean() + sums.sum()).backward()
            found, x.grad = x.grad, None
            there_ = x.detach().cpu().requires_grad_()
            with pk.use_backend("ref"):
                w = pk.softmax(
                    there_, dim, mask=keep.cpu(), temperature=0.5, softcap=10.0, sink=0.3, safe=True
                )
                theirs, total = pk.log_softmax(there_, dim), pk.logsumexp(there_, dim, temperature=2.0)
                (w.square().sum() + theirs.square().mean() + total.sum()).backward()
            torch.testing.assert_close(y.cpu(), w, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(logs.cpu(), theirs, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(sums.cpu(), total, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found.cpu(), there_.grad, rtol=1e-5, atol=1e-6)


def test_a_failed_launch_names_op_shape_and_error(monkeypatch):
    class Refuses:
        def __init__(self, *arguments):
            pass

        def scratch(self, device):
            return 8

        def run(self, *arguments):
            raise RuntimeError("cudaErrorLaunchFailure: unspecified launch failure")

    monkeypatch.setattr(cuda._cuda, "Softmax", Refuses)
    monkeypatch.setattr(cuda._cuda, "SoftmaxBackward", Refuses)
    x = torch.ones(3, 5, 1, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"softmax: launch on .* shape \[3, 5, 1\] failed: cudaErrorL"):
        cuda.softmax(x, x, 1.0, None, None, None, False)
    with pytest.raises(RuntimeError, match="log_softmax_backward: launch on"):
        cuda.log_softmax_backward(x, x, x, 1.0)
