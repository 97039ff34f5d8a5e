"""The everyday call of softmax: which tensors it takes at once, what it leaves, and that nobody can tell."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import pykernels as pk
from pykernels import backends
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.softmax_cases import drawn, without_shortcuts

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
TORCH = {"softmax": torch.softmax, "log_softmax": torch.log_softmax}
LENDS = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
pytestmark = [
    pytest.mark.skipif(not LENDS, reason="this torch does not speak DLPack's exchange protocol"),
    pytest.mark.skipif(backends._forced.get() is not None, reason="the environment has chosen a backend"),
]


@pytest.fixture(params=["library", "Python"], autouse=True)
def asked(request):
    """Who says what tensors are: torch's library by the shortcuts, or methods of Python."""
    yield from [None] if request.param == "library" else without_shortcuts()


class Subclass(torch.Tensor):
    """A tensor of another type."""


@pytest.fixture(params=TORCH)
def op(request):
    return request.param


@pytest.fixture
def everyday(op):
    return backends.everyday(op)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 70), (1, 1, 64), (40, 1000)], ids=str)
def test_takes_rows(op, everyday, shape, dtype):
    """Rows above and below what is dealt to threads, with a result of its own, given, or in place."""
    x = drawn("3 randn", shape).to(dtype)
    with pk.use_backend("cpu"):  # asks the long way
        wanted = getattr(pk, op)(x)
    for dim in (-1, len(shape) - 1):
        fresh = everyday(x, dim, None)
        assert type(fresh) is torch.Tensor and fresh.is_contiguous() and fresh.dtype == dtype
        out = torch.full_like(x, float("nan"))
        inplace = x.clone()
        assert everyday(x, dim, out) is out and everyday(inplace, dim, inplace) is inplace
        for got in (fresh, out, inplace, getattr(pk, op)(x, dim)):
            assert_same_bits(got, wanted)


def test_leaves_what_is_watched(op, everyday):
    """Somebody who follows operators would see an empty result, or write to memory that is not there."""
    x = torch.randn(4, 8)

    def run(x):
        return getattr(pk, op)(x)

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert everyday(x, -1, None) is None and run(x).shape == x.shape
    for graph in (make_fx(run)(torch.ones_like(x)), torch.func.functionalize(run)):
        assert_same_bits(graph(x), run(x))
    with pytest.warns((DeprecationWarning, torch.jit.TracerWarning)):
        traced = torch.jit.trace(run, (torch.ones_like(x),), check_trace=False)
    assert_same_bits(traced(x), run(x))


def test_counts_as_a_change_of_out(op, everyday):
    x, out = torch.randn(4, 8), torch.empty(4, 8)
    version = out._version
    everyday(x, -1, out)
    assert out._version == version + 1
    weight = torch.ones(4, 8, requires_grad=True)
    product = (weight * out).sum()
    everyday(x, -1, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


LEFT = {
    "no tensor": ([1.0, 2.0], -1),
    "subclass": (torch.randn(2, 3).as_subclass(Subclass), -1),
    "parameter": (torch.nn.Parameter(torch.randn(2, 3)), -1),
    "gradient": (torch.randn(2, 3, requires_grad=True), -1),
    "float64": (torch.randn(2, 3, dtype=torch.float64), -1),
    "int64": (torch.ones(2, 3, dtype=torch.int64), -1),
    "complex": (torch.randn(2, 3, dtype=torch.complex64), -1),
    "no dimension": (torch.tensor(1.0), -1),
    "no elements": (torch.empty(3, 0), -1),
    "transposed": (torch.randn(3, 2).t(), -1),
    "expanded": (torch.randn(1, 3).expand(2, 3), -1),
    "negated": (torch._neg_view(torch.randn(2, 3)), -1),
    "sparse": (torch.eye(3).to_sparse(), -1),
    "meta": (torch.empty(2, 3, device="meta"), -1),
    "another dimension": (torch.randn(2, 3), 0),
    "a dimension too far": (torch.randn(2, 3), 2),
    "a huge dimension": (torch.randn(2, 3), 2**64 - 1),
    "bool dimension": (torch.randn(1, 2), True),
    "pages of its own": (torch.randn(1 << 16), -1),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves_the_rest(everyday, name):
    assert everyday(*LEFT[name], None) is None


def outputs():
    """By name: x [2, 3] and an ``out`` that is left."""
    memory, x = torch.randn(40), torch.randn(2, 3)
    return {
        "no tensor": (x, [0.0]),
        "subclass": (x, torch.empty(2, 3).as_subclass(Subclass)),
        "dtype": (x, torch.empty(2, 3, dtype=torch.bfloat16)),
        "shape": (x, torch.empty(3, 2)),
        "one dimension more": (x, torch.empty(1, 2, 3)),
        "strides": (x, torch.empty(3, 2).t()),
        "negated": (x, torch._neg_view(torch.zeros(2, 3))),
        "meta": (x, torch.empty(2, 3, device="meta")),
        "one element behind": (memory[:6].view(2, 3), memory[1:7].view(2, 3)),
        "one element before": (memory[5:11].view(2, 3), memory[:6].view(2, 3)),
    }


@pytest.mark.parametrize("name", outputs())
def test_leaves_other_outputs(everyday, name):
    x, out = outputs()[name]
    before = x.clone()
    assert everyday(x, -1, out) is None
    assert torch.equal(x, before)


def test_takes_a_neighbour(op, everyday):
    memory = torch.randn(12)
    x, out = memory[:6].view(2, 3), memory[6:].view(2, 3)
    assert everyday(x, -1, out) is out
    torch.testing.assert_close(out, TORCH[op](x, -1))
    assert everyday(out, -1, x) is x


def test_leaves_a_forced_backend(everyday):
    x = torch.randn(2, 3)
    for name in ("cpu", "ref"):
        with pk.use_backend(name):
            assert everyday(x, -1, None) is None
    assert everyday(x, -1, None) is not None


def test_keeps_no_reference(everyday):
    x, out = torch.randn(4, 8), torch.empty(4, 8)
    before = sys.getrefcount(x), sys.getrefcount(out)
    for _ in range(20):
        everyday(x, -1, out)
        everyday(x, -1, None)
        everyday(x, 0, out)
        everyday(x, -1, torch.empty(3))
    assert (sys.getrefcount(x), sys.getrefcount(out)) == before


def test_wrong_counts_of_arguments():
    from pykernels import _C

    for function in (_C.softmax_rows, _C.log_softmax_rows, _C.logsumexp_rows, _C.lend_tensors):
        with pytest.raises(TypeError, match="arguments"):
            function(1)
