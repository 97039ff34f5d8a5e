"""Compiled softmax on every instruction set: units in the last place, special values, the same bits always.

Lengths stand on each side of every choice in csrc/cpu/softmax_jobs.h: stripes, blocks of 4096 (rows of more
are stored or read twice), rows that options make (65536), 16-bit rows (131072), pieces of 65536, sixteen
columns, fewer than 8. Rows that go together or past the cache are in test_softmax_forms.py.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.softmax_cases import INF, KINDS, SPECIAL, drawn, units

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
ISAS = native.isas()
LENGTHS = (1, 5, 32, 33, 100, 129, 1000, 4096, 4097, 65536, 65537, 131_073)
KERNELS = {"softmax": torch.softmax, "log_softmax": torch.log_softmax}
OFFSETS = (1, 3, 16)


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that this machine has, one after another."""
    with native.use_isa(request.param):
        yield request.param


def run(x, name="softmax", dtype=None, *, temperature=1.0, softcap=None, mask=None, sink=None, safe=False):
    """The compiled result of a row op on x [outer, n, inner]; ``out`` starts as NaN."""
    if name == "logsumexp":
        out = torch.full((x.shape[0], x.shape[2]), math.nan, dtype=dtype or x.dtype)
        native.logsumexp(out, x, temperature)
    else:
        out = torch.full(x.shape, math.nan, dtype=dtype or x.dtype)
        getattr(native, name)(out, x, temperature, softcap, mask, sink, safe)
    return out


def back(name, grad, y, dtype, scale=0.5):
    """The compiled gradient."""
    out = torch.full(y.shape, math.nan, dtype=dtype)
    getattr(native, name)(out, grad, y, scale)
    return out


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", [*KINDS, "beyond 1e6"])
def test_units_in_the_last_place(kind, n, isa):
    """float32: at most 4; the largest found here is 3.3."""
    x = 10 * drawn("3 randn", (n,), n) + 2e6 if kind == "beyond 1e6" else drawn(kind, (n,), n)
    for shape in ((1, n, 1), (1, n // 3, 3)):
        z = x[: math.prod(shape)].view(shape)
        assert not z.numel() or units(run(z), torch.softmax(z.double(), 1)).max() <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_units_in_the_last_place_of_a_million(kind):
    x = drawn(kind, (1, 1_000_003, 1))
    assert units(run(x), torch.softmax(x.double(), 1)).max() <= 4


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=SHORT.get)
@pytest.mark.parametrize("n", LENGTHS)
def test_16_bits_are_rounded_once(n, dtype, isa):
    for kind in ("3 randn", "30 randn", "masked"):
        x = drawn(kind, (1, n, 1), n).to(dtype)
        assert units(run(x), torch.softmax(x.double(), 1)).max() <= 0.52


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_logarithms(kind, n, isa):
    x = drawn(kind, (1, n, 1), n)
    total, room = torch.logsumexp(x.double(), 1), 2.0**-22
    torch.testing.assert_close(run(x, "logsumexp").double(), total, rtol=2.0**-23, atol=room)
    wanted = torch.log_softmax(x.double(), 1)
    torch.testing.assert_close(run(x, "log_softmax").double(), wanted, rtol=room, atol=room, equal_nan=True)


@pytest.mark.parametrize("around", [0, 3, 5000, 70_000])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name, around, isa):
    row, fill = torch.tensor(SPECIAL[name], dtype=torch.float32), torch.full((around,), -INF)
    for x in (torch.cat([fill, row]), torch.cat([row, fill])):
        for columns in (1, 3, 20) if around <= 5000 else (1,):
            z = x.view(1, -1, 1).expand(-1, -1, columns).contiguous()
            for op, theirs in KERNELS.items():
                got, wanted = run(z, op), theirs(z.double(), 1).float()
                torch.testing.assert_close(got, wanted, rtol=6e-7, atol=2e-45, equal_nan=True)
                assert bool((got.view(torch.int32)[got.isnan()] == 0x7FC00000).all())
            wanted = torch.logsumexp(z, 1)
            torch.testing.assert_close(run(z, "logsumexp"), wanted, rtol=3e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("n", [*LENGTHS, 200_000])
def test_bits_depend_on_the_row_alone(n, dtype):
    """Not on the instruction set, threads, neighbours, alignment, the dimension or whether it is in place."""
    column = drawn("masked", (n,), n).to(dtype)
    inputs = {k: drawn("3 randn", (1, n, k), n).to(dtype) for k in ((3, 9) if n > 70_000 else (3, 9, 40))}
    for op in KERNELS:
        with native.use_isa(ISAS[0]), native.use_threads(1):
            wanted = run(column.view(1, n, 1), op).view(n)
        for name in ISAS:
            for threads, (inner, x) in zip((1, 2, 3), inputs.items(), strict=False):
                with native.use_isa(name), native.use_threads(threads):
                    assert_same_bits(run(column.view(1, n, 1), op).view(n), wanted)
                    x[0, :, inner - 1] = column
                    assert_same_bits(run(x, op)[0, :, inner - 1].contiguous(), wanted)
                    rows = x.transpose(1, 2).reshape(inner, n, 1).contiguous()
                    assert_same_bits(run(rows, op)[-1].reshape(n), wanted)
                    memory = torch.zeros(n + 16, dtype=dtype)
                    shifted = memory[OFFSETS[threads - 1] :][:n].copy_(column).view(1, n, 1)
                    getattr(native, op)(shifted, shifted, 1.0, None, None, None, False)
                    assert_same_bits(shifted.reshape(n), wanted)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize(
    "shape", [(3, 100, 1), (2, 77, 5), (2, 50, 37), (1, 140_000, 1), (1, 5000, 17)], ids=str
)
def test_every_pair_of_dtypes(shape, dtype, out_dtype, isa):
    x = drawn("3 randn", shape).to(dtype)
    room = 4 if out_dtype == torch.float32 else 0.52
    assert units(run(x, dtype=out_dtype), torch.softmax(x.double(), 1)).max() <= room


def logits(x, temperature=1.0, softcap=None, mask=None):
    """What kernels round their logits to, step by step."""
    z = x.float()
    if softcap is not None:
        z = (softcap * torch.tanh(z.double() / softcap)).float()
    z = z / temperature
    if mask is None:
        return z
    return z.masked_fill(~mask, -INF) if mask.dtype == torch.bool else z + mask.float()


def options(shape):
    """Options by name, for x of such a shape."""
    g = torch.Generator().manual_seed(5)
    outer, _, inner = shape
    keep, added = torch.rand(shape, generator=g) < 0.7, torch.randn(shape, generator=g)
    sink = torch.randn(outer, inner, generator=g)
    return {
        "temperature": {"temperature": 0.3},
        "softcap": {"softcap": 5.0},
        "bool mask": {"mask": keep},
        "padding": {"mask": keep[:1, :, :1].expand(shape)},
        "float32 mask": {"mask": added},
        "bfloat16 mask": {"mask": added.bfloat16()},
        "float16 mask": {"mask": added.half()[:, :, :1].expand(shape)},
        "masked": {"mask": torch.zeros(shape, dtype=torch.bool)},
        "safe": {"mask": torch.zeros(shape, dtype=torch.bool), "safe": True},
        "sink": {"sink": sink},
        "sink far above": {"sink": torch.full((outer, inner), 3e6)},
        "sink of one column": {"sink": sink[:, :1].expand(outer, inner)},
        "sink of nothing": {"sink": torch.full((outer, inner), -INF)},
        "sink alone": {"mask": torch.zeros(shape, dtype=torch.bool), "sink": sink},
        "all": {"temperature": 2.0, "softcap": 30.0, "mask": keep, "sink": sink},
    }


@pytest.mark.parametrize(
    "shape", [(2, 100, 1), (2, 5000, 1), (2, 70_000, 1), (2, 30, 5), (2, 5000, 18)], ids=str
)
@pytest.mark.parametrize("name", options((1, 1, 1)))
def test_options(name, shape, isa):
    x, chosen = drawn("3 randn", shape), options(shape)[name]
    z = logits(x, **{k: v for k, v in chosen.items() if k not in ("sink", "safe")}).double()
    extra = [chosen["sink"].double().unsqueeze(1)] if "sink" in chosen else []
    wanted = torch.softmax(torch.cat([z, *extra], 1), 1)[:, : shape[1]]
    wanted = wanted.nan_to_num(0.0) if chosen.get("safe") else wanted
    with native.use_threads(2):
        got = run(x, **chosen)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert units(got, wanted).max() <= 5


@pytest.mark.parametrize("inner", [1, 3, 20])
def test_a_masked_nan_is_not_seen(inner, isa):
    x = drawn("3 randn", (2, 50, inner))
    keep = torch.rand(x.shape) < 0.5
    dirty = x.where(keep, math.nan)
    assert_same_bits(run(dirty, mask=keep), run(x, mask=keep))


def test_no_elements(isa):
    for shape in ((0, 4, 1), (3, 0, 1), (2, 0, 5), (2, 3, 0)):
        assert run(torch.empty(shape)).shape == shape
    assert torch.equal(run(torch.empty(3, 0, 1), "logsumexp"), torch.full((3, 1), -INF))
    assert torch.equal(run(torch.empty(2, 0, 20), "logsumexp"), torch.full((2, 20), -INF))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (2, 333, 1), (1, 70_001, 1), (2, 33, 5), (2, 4500, 18)], ids=str
)
@pytest.mark.parametrize("op", KERNELS)
def test_gradients_are_the_same_bits_everywhere(op, shape, out_dtype):
    y = KERNELS[op](drawn("3 randn", shape), 1).to(out_dtype)
    for grad_dtype in DTYPES:
        grad = drawn("3 randn", shape, 1).to(grad_dtype)
        with native.use_isa(ISAS[0]), native.use_threads(1):
            wanted = back(f"{op}_backward", grad, y, out_dtype)
        rows = [t.transpose(1, 2).reshape(-1, shape[1], 1) for t in (grad, y)]
        for name in ISAS:
            with native.use_isa(name), native.use_threads(2):
                assert_same_bits(back(f"{op}_backward", grad, y, out_dtype), wanted)
                turned = back(f"{op}_backward", *rows, out_dtype).view(shape[0], shape[2], shape[1])
                assert_same_bits(turned.transpose(1, 2).contiguous(), wanted)


@pytest.mark.parametrize(("name", "bound"), [("kExp6", 6e-9), ("kExp4", 3.5e-6), ("kMinus1", 1.2e-10)])
def test_polynomials_keep_their_bounds(name, bound):
    header = (Path(__file__).parent.parent / "csrc" / "math" / "exp.h").read_text()
    [text] = re.findall(rf"{name}\[\] = \{{(.*?)\}};", header, re.DOTALL)
    coefficients = [float.fromhex(number.strip().removesuffix("f")) for number in text.split(",")]
    t = torch.linspace(-0.36, 0.36, 100_000, dtype=torch.float64)
    first, wanted = (1, t.exp()) if name != "kMinus1" else (0, t.expm1())
    found = sum(c * t**power for power, c in enumerate(coefficients, 1)) + first
    assert float(((found - wanted) / wanted).abs().max()) <= bound
