"""softmax, log_softmax and logsumexp as their callers see them: drop-ins for torch's, and memory."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

import pykernels as pk
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.softmax_cases import INF, KINDS, NAN, SPECIAL, close, close_sum, drawn, exact, units

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
                least = 2e-45 if ours is pk.softmax else 1e-37
                torch.testing.assert_close(got, wanted, rtol=6e-7, atol=least, equal_nan=True)
                same = theirs(x, 0)
                assert torch.equal(got.isnan(), same.isnan()) and torch.equal(got.isinf(), same.isinf())
            got, wanted = pk.logsumexp(x), torch.logsumexp(x, 0)
            torch.testing.assert_close(got, wanted, rtol=3e-7, atol=0, equal_nan=True)

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=SHORT.get)
    @pytest.mark.parametrize("name", SPECIAL)
    def test_special_values_of_16_bits(self, name, dtype):
        x = torch.tensor(SPECIAL[name], dtype=torch.float32).to(dtype)
        for ours, theirs in ((pk.softmax, torch.softmax), (pk.log_softmax, torch.log_softmax)):
            torch.testing.assert_close(ours(x), theirs(x, 0), rtol=1e-2, atol=0, equal_nan=True)

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

    def test_a_logarithm_keeps_its_digits_where_one_element_is_all_that_counts(self):
        for n, largest in itertools.product((2, 100, 70_001), (10.0, 30.0, 90.0)):
            x = drawn("3 randn", (1, n)).clamp(max=8)
            x[0, n // 2] = largest
            wanted = exact(x, 1)[1][0, n // 2]
            got = pk.log_softmax(x)[0, n // 2].double()
            # What shares a float lane with the largest element, one term in 500 here, is lost on it.
            assert got <= 0 and abs(got - wanted) <= 1e-2 * abs(wanted) + 1e-16

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
