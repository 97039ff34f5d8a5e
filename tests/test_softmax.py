"""softmax, log_softmax and logsumexp as their callers see them: drop-ins for torch's, and the options."""

from __future__ import annotations

import itertools
import os
import re

import pytest
import torch

import pykernels as pk
from pykernels.ops import softmax_pass
from pykernels.ref import softmax as truth
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.softmax_cases import INF, KINDS, LEAST, LOG_ROOM, NAN, SPECIAL, drawn, units

ALL = (*DTYPES, torch.float64)
SHAPES = ((), (1,), (7,), (3, 0), (0, 4), (2, 3, 4), (3, 130, 5), (4, 1, 257), (2, 3, 2, 2))
FREE = pytest.mark.skipif("PYKERNELS_BACKEND" in os.environ, reason="the environment has chosen a backend")


@pytest.fixture(params=["default", "ref"])
def backend(request):
    """What a user gets, and the references forced."""
    if request.param == "default":
        yield
    else:
        with pk.use_backend(request.param):
            yield


def exact(x, dim, temperature=1.0, mask=None, softcap=None, sink=None):
    """(softmax, log_softmax, logsumexp) in float64, of logits rounded step by step as kernels round them."""
    z = truth.logits(x, temperature, softcap, None if mask is None else mask.expand(x.shape))
    row = truth.with_sink(truth.row_sum(z, dim), sink)
    return truth.softmax(z, row, False), truth.log_softmax(z, row, False), truth.logsumexp(row)


def close(got, wanted, dtype):
    """Equal but for 5 units in the last place of float32, or one rounding to 16 bits."""
    assert got.dtype == dtype and got.shape == wanted.shape and got.is_contiguous()
    if dtype == torch.float64:
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-300, equal_nan=True)
    elif got.numel():
        assert units(got, wanted).max() <= (5 if dtype == torch.float32 else 0.51)


def close_sum(got, wanted, dtype):
    """A logarithm of a sum: one rounding, and what the sum is off by."""
    assert got.dtype == dtype and got.shape == wanted.shape
    room = 1e-13 if dtype == torch.float64 else LOG_ROOM
    rounding = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=room, equal_nan=True)


@pytest.mark.usefixtures("backend")
class TestDropIn:
    """Without options: values, shapes, dtypes and special values are torch's."""

    @pytest.mark.parametrize("name", SPECIAL)
    @pytest.mark.parametrize("around", [0, 3, 5000], ids="among {} -inf".format)
    def test_special_values(self, name, around):
        row = torch.tensor(SPECIAL[name], dtype=torch.float32)
        fill = torch.full((around,), -INF)
        for x in (torch.cat([fill, row]), torch.cat([row, fill])):
            for ours, theirs in ((pk.softmax, torch.softmax), (pk.log_softmax, torch.log_softmax)):
                got, wanted = ours(x), theirs(x.double(), 0).to(torch.float32)
                room = LOG_ROOM if ours is pk.log_softmax else 2e-45
                torch.testing.assert_close(got, wanted, rtol=6e-7, atol=room, equal_nan=True)
                same = theirs(x, 0)
                assert torch.equal(got.isnan(), same.isnan()) and torch.equal(got.isinf(), same.isinf())
            got, wanted = pk.logsumexp(x), torch.logsumexp(x, 0)
            torch.testing.assert_close(got, wanted, rtol=3e-7, atol=LOG_ROOM, equal_nan=True)

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=SHORT.get)
    @pytest.mark.parametrize("name", SPECIAL)
    def test_special_values_of_16_bits(self, name, dtype):
        x = torch.tensor(SPECIAL[name], dtype=torch.float32).to(dtype)
        for ours, theirs in ((pk.softmax, torch.softmax), (pk.log_softmax, torch.log_softmax)):
            room = LOG_ROOM if ours is pk.log_softmax else 0
            torch.testing.assert_close(ours(x), theirs(x, 0), rtol=1e-2, atol=room, equal_nan=True)

    @pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_every_dimension(self, shape, dtype):
        x = drawn("3 randn", shape).to(dtype)
        for dim in range(-max(1, x.dim()), max(1, x.dim())):
            soft, log, total = exact(x if x.dim() else x.view(1), dim)
            close(pk.softmax(x, dim), soft.view(shape), dtype)
            close_sum(pk.logsumexp(x, dim), total.view(x.sum(dim).shape), dtype)
            got, room = pk.log_softmax(x, dim), 2**-22 if dtype != torch.float64 else 1e-13
            rounding = 0 if dtype == torch.float64 else torch.finfo(dtype).eps
            torch.testing.assert_close(got.double(), log.view(shape), rtol=rounding, atol=room)
            assert got.dtype == dtype and got.is_contiguous()

    @pytest.mark.parametrize("n", [1, 2, 31, 100, 257, 4096, 70_001])
    @pytest.mark.parametrize("kind", KINDS)
    def test_units_in_the_last_place(self, kind, n):
        x = drawn(kind, (3, n))
        soft, log, total = exact(x, 1)
        assert units(pk.softmax(x), soft).max() <= 5
        got, size = pk.log_softmax(x), log.abs().nan_to_num(0, 0, 0)
        assert ((got - log).abs().nan_to_num(0, 0, 0) <= 2**-22 + size * 2**-23).all()
        close_sum(pk.logsumexp(x, keepdim=True), total, torch.float32)
        assert (pk.softmax(x).double().sum(1).nan_to_num(1.0) - 1).abs().max() < 1e-6

    def test_dtype_casts_first(self):
        x = torch.tensor([[2049.0, 2048.0], [70000.0, 0.0]])
        got = pk.softmax(x, dtype=torch.float16)
        assert got.dtype == torch.float16 and got[0].tolist() == [0.5, 0.5] and bool(got[1].isnan().all())
        for a, b in itertools.product((*ALL, torch.int64, torch.bool), ALL):
            given = drawn("3 randn", (5, 40)).to(a)
            for op in (pk.softmax, pk.log_softmax):
                assert_same_bits(op(given, 0, dtype=b), op(given.to(b), 0))

    def test_integers_of_logsumexp(self):
        for x in (torch.tensor([1, 2, 3]), torch.tensor([True, False])):
            torch.testing.assert_close(pk.logsumexp(x), torch.logsumexp(x, 0))

    @pytest.mark.parametrize("dim", [0, -1, (0, 2), (2, 1), [0, 1, 2], (-1,)], ids=str)
    @pytest.mark.parametrize("keepdim", [False, True])
    def test_dimensions_of_logsumexp(self, dim, keepdim):
        x = drawn("3 randn", (4, 5, 6))
        torch.testing.assert_close(pk.logsumexp(x, dim, keepdim=keepdim), torch.logsumexp(x, dim, keepdim))

    def test_logsumexp_of_nothing(self):
        assert pk.logsumexp(torch.zeros(3, 0)).tolist() == [-INF] * 3
        assert pk.logsumexp(torch.zeros(0, 4)).shape == (0,)
        assert pk.logsumexp(torch.zeros(3, 0), 0, keepdim=True).shape == (1, 0)
        assert pk.logsumexp(torch.zeros(3, 0), (0, 1)).item() == -INF


def views(x):
    """x [6, 8, 10] by name, as a tensor of other strides with some of its values."""
    yield "transposed", x.transpose(0, 2)
    yield "permuted", x.permute(1, 2, 0)
    yield "expanded", x[:1].expand(6, 8, 10)
    yield "sliced", x[::2, 1:, ::3]
    yield "flipped", x.flip(1)[:, ::2]
    yield "negated", torch._neg_view(x)
    yield "channels last", x.view(2, 3, 8, 10).to(memory_format=torch.channels_last)


@pytest.mark.usefixtures("backend")
class TestMemory:
    """Strides, out=, results over inputs."""

    @pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
    def test_any_strides(self, dtype):
        for _, view in views(drawn("3 randn", (6, 8, 10)).to(dtype)):
            for dim, op in itertools.product(range(view.dim()), (pk.softmax, pk.log_softmax, pk.logsumexp)):
                got = op(view, dim)
                assert_same_bits(
                    got, op(view.clone(memory_format=torch.contiguous_format).resolve_neg(), dim)
                )
                assert got.is_contiguous()

    @pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
    @pytest.mark.parametrize("op", [pk.softmax, pk.log_softmax], ids=["softmax", "log_softmax"])
    def test_out_may_be_anything(self, op, dtype):
        x = drawn("3 randn", (6, 8, 10)).to(dtype)
        for dim in range(3):
            wanted = op(x, dim)
            for place in (
                torch.full((6, 8, 10), NAN, dtype=dtype),
                torch.full((10, 8, 6), NAN, dtype=dtype).permute(2, 1, 0),
                torch.full((6, 8, 20), NAN, dtype=dtype)[..., ::2],
                torch._neg_view(torch.full((6, 8, 10), NAN, dtype=dtype)),
                x.clone(),
            ):
                given = place if torch.equal(place, x) else x
                assert op(given, dim, out=place) is place
                assert torch.equal(place, wanted)

    def test_out_may_overlap(self):
        store = drawn("3 randn", (200,))
        for start in (0, 1, 50, 99, 100):
            memory = store.clone()
            wanted = pk.softmax(memory[:100])
            pk.softmax(memory[:100], out=memory[start : start + 100])
            assert torch.equal(memory[start : start + 100], wanted)
        memory = store.clone().view(10, 20)
        wanted = pk.softmax(memory.t(), 0)
        pk.softmax(memory.t(), 0, out=memory.t())
        assert torch.equal(memory.t(), wanted)
        memory = store.clone()
        wanted = pk.softmax(memory[:100], mask=memory[100:])
        pk.softmax(memory[:100], mask=memory[100:], out=memory[100:])
        assert torch.equal(memory[100:], wanted)

    def test_out_of_another_dtype_than_x(self):
        x = drawn("3 randn", (6, 50)).to(torch.bfloat16)
        out = torch.full((6, 50), NAN)
        pk.softmax(x, dtype=torch.float32, out=out)
        assert torch.equal(out, pk.softmax(x.float()))
        memory = torch.zeros(300).fill_(0.5)
        half = memory.view(torch.bfloat16)[:300]
        wanted = pk.softmax(half.float())
        pk.softmax(half, dtype=torch.float32, out=memory)
        assert torch.equal(memory, wanted)

    def test_a_written_tensor_is_known_to_have_changed(self):
        x = torch.ones(4, requires_grad=True)
        doubled = x * 2
        squared = doubled.square()
        with torch.no_grad():
            pk.softmax(doubled, out=doubled)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squared.sum().backward()


def attention(dtype=torch.float32):
    """Scores [2, 3, 40, 50]."""
    return drawn("3 randn", (2, 3, 40, 50)).to(dtype)


MASKS = {
    "one row": (50,),
    "one column": (40, 1),
    "one per batch": (2, 1, 1, 50),
    "one per head": (3, 1, 50),
    "causal": (40, 50),
    "whole": (2, 3, 40, 50),
    "number": (),
}


@pytest.mark.usefixtures("backend")
class TestOptions:
    """temperature, softcap, mask, sink and safe."""

    @pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
    @pytest.mark.parametrize("dim", range(4))
    def test_temperature(self, dim, dtype):
        x = attention(dtype)
        soft, log, total = exact(x, dim, 0.3)
        close(pk.softmax(x, dim, temperature=0.3), soft, dtype)
        close_sum(pk.logsumexp(x, dim, temperature=0.3, keepdim=True), total, dtype)
        got = pk.log_softmax(x, dim, temperature=0.3)
        room = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), log, rtol=room, atol=room)

    @pytest.mark.parametrize("piece", [1 << 16, 100], ids=["copied", "walked"])
    @pytest.mark.parametrize("kind", ["bool", *DTYPES], ids=lambda k: SHORT.get(k, k))
    @pytest.mark.parametrize("name", MASKS)
    def test_masks(self, monkeypatch, name, kind, piece):
        monkeypatch.setattr(softmax_pass, "_PIECE", piece)
        x, drawn_mask = attention(), drawn("3 randn", MASKS[name], 1)
        mask = drawn_mask > -3 if kind == "bool" else drawn_mask.to(kind)
        for dim in range(4):
            soft, log, _ = exact(x, dim, mask=mask)
            assert units(pk.softmax(x, dim, mask=mask), soft).max() <= 5
            got = pk.log_softmax(x, dim, mask=mask)
            torch.testing.assert_close(got.double(), log, rtol=2**-22, atol=2**-22, equal_nan=True)

    def test_a_mask_of_any_strides(self):
        x = attention()
        keep = (drawn("3 randn", (50, 40), 1) > 0).t()
        assert torch.equal(pk.softmax(x, mask=keep), pk.softmax(x, mask=keep.contiguous()))
        added = torch._neg_view(drawn("3 randn", (2, 1, 40, 50), 1))
        assert torch.equal(pk.softmax(x, 1, mask=added), pk.softmax(x, 1, mask=added.clone()))
        assert torch.equal(pk.softmax(x, mask=added.double()), pk.softmax(x, mask=added.clone()))

    def test_what_a_mask_takes_out_does_not_matter(self):
        x = torch.tensor([[1.0, NAN, 2.0, INF], [NAN, INF, 0.0, 0.0]])
        keep = torch.tensor([[True, False, True, False], [False, False, True, True]])
        got = pk.softmax(x, mask=keep)
        torch.testing.assert_close(got, torch.tensor([[0.2689414, 0, 0.7310586, 0], [0, 0, 0.5, 0.5]]))
        assert bool(pk.softmax(x).isnan().all())

    @pytest.mark.parametrize("c", [0.5, 30.0])
    def test_softcap(self, c):
        x = torch.cat([attention(), 1e4 * attention()])
        x[0, 0, 0, :3] = torch.tensor([INF, -INF, LEAST])
        soft, _, _ = exact(x, 3, softcap=c)
        # tanh errs by a few units of c, and e**z by as much, relatively.
        torch.testing.assert_close(
            pk.softmax(x, softcap=c).double(), soft, rtol=(6 + 6 * c) * 2**-24, atol=1e-38
        )
        soft, _, _ = exact(x, 1, 0.5, softcap=c)
        got = pk.softmax(x, 1, softcap=c, temperature=0.5).double()
        torch.testing.assert_close(got, soft, rtol=(6 + 12 * c) * 2**-24, atol=1e-38)

    @pytest.mark.parametrize("shape", [(), (3, 1, 1), (2, 1, 40, 1), (1,)], ids=str)
    @pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
    def test_sinks(self, dtype, shape):
        x, sink = attention(dtype), drawn("3 randn", shape, 1)
        extra = sink.expand(2, 3, 40, 1)
        close(pk.softmax(x, sink=sink), exact(x, 3, sink=extra)[0], dtype)
        if not shape:
            close(pk.softmax(x, 1, sink=0.5), exact(x, 1, sink=torch.full((2, 1, 40, 50), 0.5))[0], dtype)

    def test_a_sink_alone(self):
        x = torch.full((2, 3), -INF)
        assert pk.softmax(x, sink=1.0).tolist() == [[0.0] * 3] * 2
        assert bool(pk.softmax(x, sink=torch.tensor(-INF)).isnan().all())
        assert pk.softmax(x, sink=torch.tensor(-INF), safe=True).tolist() == [[0.0] * 3] * 2
        large = torch.full((1, 3), 80.0)
        assert pk.softmax(large, sink=torch.tensor(2000.0)).tolist() == [[0.0] * 3]
        assert bool(pk.softmax(large, sink=torch.tensor(INF)).isnan().all())
        assert bool(pk.softmax(large, sink=torch.tensor(NAN)).isnan().all())

    def test_safe_rows(self):
        x = torch.tensor([[-INF, -INF], [-INF, NAN], [-INF, INF], [LEAST, LEAST], [0.0, -INF]])
        wanted = torch.tensor([[0.0, 0.0], [NAN, NAN], [NAN, NAN], [0.5, 0.5], [1.0, 0.0]])
        for dim, given in ((1, x), (0, x.t())):
            y = wanted if dim else wanted.t()
            torch.testing.assert_close(pk.softmax(given, dim, safe=True), y, equal_nan=True)
            torch.testing.assert_close(pk.log_softmax(given, dim, safe=True), y.log(), equal_nan=True)
        empty = pk.softmax(torch.zeros(2, 3), mask=torch.zeros(3, dtype=torch.bool), safe=True)
        assert empty.tolist() == [[0.0] * 3] * 2
        wanted = torch.ops.aten._safe_softmax(x, 1)
        torch.testing.assert_close(pk.softmax(x, safe=True), wanted, equal_nan=True)

    def test_all_at_once(self):
        x, keep = attention(torch.bfloat16), drawn("3 randn", (2, 1, 1, 50), 1) > 0
        sink = drawn("3 randn", (3, 1, 1), 2)
        options = {"temperature": 0.7, "mask": keep, "softcap": 5.0}
        soft, log, _ = exact(x, 3, **options, sink=sink.expand(2, 3, 40, 1))
        got = pk.softmax(x, **options, sink=sink, dtype=torch.float32)
        torch.testing.assert_close(got.double(), soft, rtol=1e-5, atol=1e-38)
        log = exact(x, 3, **options)[1]
        got = pk.log_softmax(x, **options, dtype=torch.float32)
        torch.testing.assert_close(got.double(), log, rtol=1e-5, atol=1e-5)


X = torch.zeros(2, 3)
FLOATS = "float32, bfloat16, float16 or float64"
OUT_OF_RANGE = "Dimension out of range (expected to be in range of [-2, 1], but got 2)"
V, T, D, R = ValueError, TypeError, IndexError, RuntimeError
ERRORS = [
    (lambda op: op(X.int()), T, f"x must be {FLOATS}, or dtype= given, got torch.int32"),
    (lambda op: op(X.to(torch.complex64), dtype=torch.float32), T, f"x must be {FLOATS}, got torch.complex"),
    (lambda op: op([0.0]), T, "x must be a tensor, got list"),
    (lambda op: op(X, dtype=torch.int32), T, f"dtype must be {FLOATS}, got torch.int32"),
    (lambda op: op(X, 2), D, OUT_OF_RANGE),
    (lambda op: op(torch.tensor(1.0), 1), D, "Dimension out of range (expected to be in range of [-1, 0]"),
    (lambda op: op(X, 1.0), T, "dim must be an integer, got float"),
    (lambda op: op(X, None), T, "dim must be an integer, got NoneType"),
    (lambda op: op(X, True), T, "dim must be an integer, got bool"),
    (lambda op: op(X.to_sparse()), NotImplementedError, "x must be a dense tensor, got torch.sparse_coo"),
    (lambda op: op(X.to("meta")), V, "x must be a tensor with data, got one on meta"),
    (lambda op: op(X, temperature=0.0), V, "temperature must be positive and normal in float32, got 0.0"),
    (lambda op: op(X, temperature=NAN), V, "temperature must be finite in float32, got nan"),
    (lambda op: op(X, temperature="1"), T, "temperature must be a number, got str"),
    (lambda op: op(X, softcap=-1), V, "softcap must be positive and normal in float32, got -1.0"),
    (lambda op: op(X, mask=[True]), T, "mask must be a tensor, got list"),
    (lambda op: op(X, mask=X.int()), T, "mask must be bool or of a float dtype, got torch.int32"),
    (lambda op: op(X, mask=X.t()), V, "mask must broadcast to [2, 3], got [3, 2]"),
    (lambda op: op(X, mask=X[None]), V, "mask must broadcast to [2, 3], got [1, 2, 3]"),
    (lambda op: op(X, mask=X.to("meta")), V, "mask must be a dense tensor with data, got torch.strided on m"),
    (lambda op: op(X, safe=1), V, "safe must be one of True, False, got 1"),
    (lambda op: op(X, out=[0.0]), T, "out must be a tensor, got list"),
    (lambda op: op(X, out=X.half()), R, "out must have the result's dtype torch.float32, got torch.float16"),
    (lambda op: op(X, out=X.t()), V, "out must have x's shape [2, 3], got [3, 2]"),
    (lambda op: op(X, out=X.to("meta")), V, "out must be a dense tensor with data, got torch.strided on me"),
    (lambda op: op(torch.zeros(2, requires_grad=True), out=torch.zeros(2)), V,
     "out must be None where a gradient is asked for"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(
    ("call", "kind", "text"), ERRORS, ids=[f"{i}-{e[2][:40]}" for i, e in enumerate(ERRORS)]
)
def test_messages(name, call, kind, text):
    with pytest.raises(kind, match=re.escape(f"{name}: {text}")):
        call(getattr(pk, name))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: pk.softmax(X, sink=torch.zeros(2)), V, "softmax: sink must broadcast to [2, 1], got [2]"),
        (
            lambda: pk.softmax(X, sink=X[:1, :1].int()),
            T,
            "softmax: sink must be of a float dtype, got torch.",
        ),
        (lambda: pk.softmax(X, sink="0"), T, "softmax: sink must be a number, got str"),
        (lambda: pk.softmax([0.0], sink=0.0), T, "softmax: x must be a tensor, got list"),
        (lambda: pk.logsumexp(X, ()), V, "logsumexp: dim must name one dimension or several different ones"),
        (lambda: pk.logsumexp(X, (1, -1)), V, "different ones, got [1, -1]"),
        (lambda: pk.logsumexp(X, None), T, "logsumexp: dim must be an integer or several, got NoneType"),
        (lambda: pk.logsumexp(X, (0, 2)), D, f"logsumexp: {OUT_OF_RANGE}"),
        (lambda: pk.logsumexp(X, 0.5), T, "logsumexp: dim must be an integer or several, got float"),
        (lambda: pk.logsumexp(X.to(torch.complex64)), T, f"logsumexp: x must be {FLOATS}, got torch.complex"),
        (lambda: pk.logsumexp(X, keepdim=1), V, "logsumexp: keepdim must be one of True, False, got 1"),
        (lambda: pk.logsumexp(X, temperature=-1.0), V, "logsumexp: temperature must be positive and normal"),
    ],
)
def test_messages_of_one_op(call, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        call()


def test_an_error_comes_before_anything_is_written():
    out = torch.full((2, 3), 7.0)
    with pytest.raises(ValueError, match="temperature"):
        pk.softmax(X, temperature=-1.0, out=out)
    assert out.tolist() == [[7.0] * 3] * 2
