"""temperature, softcap, mask, sink and safe of softmax and its kin."""

from __future__ import annotations

import pytest
import torch

import pykernels as pk
from pykernels.ops import softmax_pass
from tests.cases import DTYPES, SHORT
from tests.softmax_cases import INF, LEAST, NAN, close, close_sum, drawn, exact, units

ALL = (*DTYPES, torch.float64)


@pytest.fixture(params=["default", "ref"])
def backend(request):
    """What a user gets, and the references forced."""
    if request.param == "default":
        yield
    else:
        with pk.use_backend(request.param):
            yield


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
