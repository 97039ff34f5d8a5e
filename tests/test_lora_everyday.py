"""The everyday calls of LoRA's layers: which they take at once, what they leave, and that nobody can tell."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import pykernels as pk
from pykernels import backends
from pykernels.ops.lora_pass import everyday, everyday_grouped
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.lora_layers import assert_scaled, layer

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
FLOAT_ROWS = native.FLOAT_ROWS
LENDS = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
pytestmark = [
    pytest.mark.skipif(not LENDS, reason="this torch does not speak DLPack's exchange protocol"),
    pytest.mark.skipif(backends._forced.get() is not None, reason="the environment has chosen a backend"),
]


class Subclass(torch.Tensor):
    """A tensor of another type."""


def both_ways(x, weight, adapters, index, bias=None):
    """(at once, the long way) of one layer with the first adapter and of the grouped one."""
    a, b, s = adapters[0][:3]
    given = [pk.LoRA(*f) for f in adapters]
    with pk.use_backend("cpu"):
        wanted = pk.lora_linear(x, weight, a, b, scaling=s, bias=bias)
        grouped = pk.lora_linear_grouped(x, weight, given, index, bias=bias)
    yield everyday(x, weight, a, b, s, bias, None), wanted
    yield everyday_grouped(x, weight, given, index, bias), grouped
    yield everyday_grouped(x, weight, tuple(given), index, bias), grouped
    yield pk.lora_linear(x, weight, a, b, scaling=s, bias=bias), wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize(
    "shape", [(7,), (1, 7), (3, 30), (2, 3, 41), (2, 1, 2, 300), (FLOAT_ROWS + 1, 40)], ids=str
)
def test_takes_layers(shape, dtype):
    """Below and above what goes to threads (2**17 multiplications); float32 of no more rows than are ours."""
    for n, ranks in ((24, [16, 3]), (1500, [8, 16])):
        c = layer(max(1, torch.Size(shape[:-1]).numel()), n, shape[-1], ranks, dtype, grouped=True)
        x, index = c.x.view(shape), c.index.view(shape[:-1]) if len(shape) > 1 else torch.tensor(1)
        for given in (c.adapters, [f._replace(A=f.A.float(), B=f.B.float()) for f in c.adapters]):
            for bias in (None, c.bias):
                for got, wanted in both_ways(x, c.weight, given, index, bias):
                    if got is None:
                        assert index.dim() == 0 or (dtype == torch.float32 and len(c.x) > FLOAT_ROWS)
                        continue
                    assert type(got) is torch.Tensor and got.is_contiguous() and got.dtype == dtype
                    assert_same_bits(got, wanted)


def test_takes_any_strides_of_memory():
    c = layer(12, 40, 56, [16, 2], torch.bfloat16, grouped=True)
    every = torch.zeros(12, 112, dtype=torch.bfloat16)
    every[:, ::2] = c.x
    batch = torch.zeros(3, 4, 60, dtype=torch.bfloat16)
    batch[..., :56] = c.x.view(3, 4, 56)
    turned = [f._replace(A=f.A.t().contiguous().t(), B=f.B.t().contiguous().t()) for f in c.adapters]
    weight = c.weight.t().contiguous().t()
    for x, index in ((every[:, ::2], c.index), (batch[..., :56], c.index.view(3, 4))):
        for w, given in ((c.weight, turned), (weight, c.adapters)):
            for got, wanted in both_ways(x, w, given, index, c.bias):
                assert_same_bits(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("m", [1, 3, 4, 40])
def test_scales_columns_and_rounds_once(m, isa, dtype):
    """Dot products of up to three rows and tiles; columns of half a group, and of two tiles and a part."""
    for n, rank in ((8, 3), (300, 16)):
        c = layer(m, n, 60, [rank], dtype)
        a, b, s = c.adapters[0]
        scale = torch.linspace(-3, 2, n + 1).view(torch.uint8)[4:].view(torch.float32)
        for bias in (None, c.bias):
            given = (c.x, c.weight, a, b, s, bias)
            with native.use_isa(isa):
                got, ones, plain = (everyday(*given, t) for t in (scale, torch.ones(n), None))
                public = pk.lora_linear(*given[:4], scaling=s, bias=bias, column_scale=scale)
            if got is None:
                assert dtype == torch.float32 and m > FLOAT_ROWS
                continue
            assert_scaled(got, c._replace(bias=bias), scale)
            assert_same_bits(ones, plain)
            assert_same_bits(public, got)


def test_a_result_of_many_pages():
    n = 1 << 19
    x, weight, a = (torch.ones(m, 1, dtype=torch.bfloat16) for m in (2, n, 1))
    got = everyday(x, weight, a, weight, 0.5, None, None)
    assert got.shape == (2, n) and bool((got == 1.5).all())


def test_takes_parameters_where_nothing_is_recorded():
    c = layer(3, 8, 16, [16], torch.bfloat16)
    a, b, s = c.adapters[0]
    wanted = everyday(c.x, c.weight, a, b, s, None, None)
    leaves = [torch.nn.Parameter(t) for t in (c.x, c.weight, a, b)]
    assert everyday(*leaves, s, None, None) is None
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_same_bits(everyday(*leaves, s, None, None), wanted)
    frozen = [torch.nn.Parameter(t, requires_grad=False) for t in (c.x, c.weight, a, b)]
    got = everyday(*frozen, s, None, None)
    assert_same_bits(got, wanted)
    assert type(got) is torch.Tensor and not got.requires_grad


def left():
    """By name: arguments (x, weight, A, B, scaling, bias, column_scale) that are left."""
    half = torch.bfloat16
    x, w, a, b, bias = (torch.ones(*s, dtype=half) for s in ((2, 3), (4, 3), (2, 3), (4, 2), (4,)))
    wide = [torch.ones(*s) for s in ((FLOAT_ROWS + 1, 3), (4, 3), (2, 3), (4, 2))]
    kinds = {
        "no tensor": 1.0,
        "subclass": x.as_subclass(Subclass),
        "gradient": x.clone().requires_grad_(),
        "float64": x.double(),
        "int64": x.long(),
        "no dimension": x[0, 0],
        "no rows": x[:0],
        "negated": torch._neg_view(x),
        "sparse": x.to_sparse(),
        "meta": x.to("meta"),
        "other width": torch.ones(2, 4, dtype=half),
        "other dtype": x.half(),
    }
    made = {f"x: {name}": (value, w, a, b, 1.0, None, None) for name, value in kinds.items()}
    return made | {
        "x: batches apart": (torch.ones(3, 2, 3, dtype=half).transpose(0, 1), w, a, b, 1.0, None, None),
        "no columns": (x[:, :0], w[:, :0], a[:, :0], b, 1.0, None, None),
        "weight: one dimension": (x, w[0], a, b, 1.0, None, None),
        "weight: float32": (x, w.float(), a, b, 1.0, None, None),
        "weight: negated": (x, torch._neg_view(w), a, b, 1.0, None, None),
        "A: another width": (x, w, a[:, :2], b, 1.0, None, None),
        "A: no rank": (x, w, a[:0], b[:, :0], 1.0, None, None),
        "A: float16": (x, w, a.half(), b.half(), 1.0, None, None),
        "A: float32 alone": (x, w, a.float(), b, 1.0, None, None),
        "B: another rank": (x, w, a, b[:, :1], 1.0, None, None),
        "B: another height": (x, w, a, b[:3], 1.0, None, None),
        "scaling: an integer": (x, w, a, b, 1, None, None),
        "scaling: infinite": (x, w, a, b, float("inf"), None, None),
        "scaling: not a number": (x, w, a, b, float("nan"), None, None),
        "scaling: huge": (x, w, a, b, 2.0**100, None, None),
        "bias: float32": (x, w, a, b, 1.0, bias.float(), None),
        "bias: another length": (x, w, a, b, 1.0, bias[:3], None),
        "bias: strided": (x, w, a, b, 1.0, torch.ones(8, dtype=half)[::2], None),
        "column_scale: bfloat16": (x, w, a, b, 1.0, None, bias),
        "column_scale: another length": (x, w, a, b, 1.0, None, torch.ones(3)),
        "column_scale: strided": (x, w, a, b, 1.0, None, torch.ones(8)[::2]),
        "column_scale: gradient": (x, w, a, b, 1.0, None, torch.ones(4, requires_grad=True)),
        "float32: many rows": (*wide, 1.0, None, None),
        "float32: columns apart": (wide[0][:2], torch.ones(3, 4).t(), *wide[2:], 1.0, None, None),
    }


@pytest.mark.parametrize("name", left())
def test_leaves_the_rest(name):
    assert everyday(*left()[name]) is None


def left_groups():
    """By name: (adapters, index) that are left beside x [2, 3] and weight [4, 3]."""
    one, rows = pk.LoRA(torch.ones(2, 3), torch.ones(4, 2), 1.0), torch.tensor([0, -1])
    return {
        "one adapter": (one, rows),
        "a set": ({1: one}.values(), rows),
        "tuples": ([tuple(one)], rows),
        "short": ([tuple.__new__(pk.LoRA, one[:3])], rows),
        "magnitude": ([one._replace(magnitude=torch.ones(4))], rows),
        "scaling": ([one._replace(scaling=1)], rows),
        "shape": ([one, one._replace(B=torch.ones(3, 2))], rows),
        "index: list": ([one], [0, -1]),
        "index: int32": ([one], rows.int()),
        "index: float32": ([one], rows.float()),
        "index: a row more": ([one], torch.tensor([0, -1, 0])),
        "index: a dimension more": ([one], rows[None]),
        "index: strided": ([one], torch.tensor([0, 0, -1, 0])[::2]),
        "index: too large": ([one], rows + 1),
        "index: too small": ([one], rows - 1),
        "index: none to name": ([], torch.tensor([0, 0])),
    }


@pytest.mark.parametrize("name", left_groups())
def test_leaves_other_groups(name):
    assert everyday_grouped(torch.ones(2, 3), torch.ones(4, 3), *left_groups()[name], None) is None


def test_rows_without_adapters():
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    got = everyday_grouped(x, weight, [], torch.tensor([-1, -1]), None)
    torch.testing.assert_close(got, x @ weight.t())


def test_leaves_a_forced_backend():
    c = layer(2, 3, 4, [1], torch.bfloat16)
    given = (c.x, c.weight, *c.adapters[0], None, None)
    for name in ("cpu", "ref"):
        with pk.use_backend(name):
            assert everyday(*given) is None
    assert everyday(*given) is not None


def test_leaves_what_is_watched():
    """Somebody who follows operators would see an empty result, or write to memory that is not there."""
    c = layer(2, 3, 4, [1], torch.bfloat16)
    a, b, s = c.adapters[0]

    def run(x):
        return pk.lora_linear(x, c.weight, a, b, scaling=s)

    wanted = run(c.x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert everyday(c.x, c.weight, a, b, s, None, None) is None
        fake = run(c.x)
    assert fake.device.type == "cpu" and fake.shape == wanted.shape
    for follow in (make_fx, torch.func.functionalize):
        ones = torch.ones_like(c.x)
        graph = follow(run)(ones) if follow is make_fx else follow(run)
        assert_same_bits(graph(c.x), wanted)
    with pytest.warns((DeprecationWarning, torch.jit.TracerWarning)):
        traced = torch.jit.trace(run, (ones,), check_trace=False)
    assert_same_bits(traced(c.x), wanted)


def test_leaves_a_result_that_a_transform_wraps():
    c = layer(2, 3, 4, [1], torch.bfloat16)
    given = (c.x, c.weight, *c.adapters[0], None, None)
    left = []

    def loss(scale):
        left.append(everyday(*given))
        a, b, s = c.adapters[0]
        return scale * pk.lora_linear(c.x, c.weight, a, b, scaling=s).float().sum()

    slope = torch.func.grad(loss)(torch.tensor(2.0))
    assert left == [None] and float(slope) == float(everyday(*given).float().sum())


def test_keeps_no_reference():
    c = layer(3, 8, 16, [16, 2], torch.bfloat16, grouped=True)
    given = [pk.LoRA(*f) for f in c.adapters]
    scale = torch.ones(8)
    things = [c.x, c.weight, c.bias, scale, c.index, given, given[0], given[0].A, given[0].B]
    before = [sys.getrefcount(t) for t in things]
    for _ in range(20):
        everyday(c.x, c.weight, *given[0][:3], c.bias, scale)
        everyday_grouped(c.x, c.weight, given, c.index, c.bias)
        everyday_grouped(c.x, c.weight, given, c.index - 5, None)
        everyday_grouped(c.x, c.weight, [*given, None], c.index, c.bias)
        everyday(c.x, c.weight, given[0].A, given[1].B, 1.0, None, None)
    assert [sys.getrefcount(t) for t in things] == before


def test_many_callers_at_once():
    """Skinny products are done by whichever threads come by; every caller has its own."""
    c = layer(20, 700, 300, [16, 4, 33, 8], torch.bfloat16, grouped=True)
    given = [pk.LoRA(*f) for f in c.adapters]

    def results(_=None):
        with native.use_threads(3):
            return [everyday_grouped(c.x, c.weight, given, c.index, c.bias),
                    everyday(c.x[:1], c.weight, *given[0][:3], c.bias, None)]  # fmt: skip

    wanted = results()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(results, range(60)):
            for got, want in zip(found, wanted, strict=True):
                assert_same_bits(got, want)


def test_wrong_counts_of_arguments():
    from pykernels import _C

    for function in (_C.lora_layer, _C.lora_layers, _C.lend_layers):
        with pytest.raises(TypeError, match="arguments"):
            function(1)
