"""The everyday merge of adapters: what it takes at once, what it leaves, and that nobody can tell."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import pykernels as pk
from pykernels import LoRA, backends
from pykernels.ops.lora_pass import everyday_merge
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.lora_cases import adapter, weight
from tests.softmax_cases import without_shortcuts
from tests.test_memory import freed, freed_view, shrunk

native = pytest.importorskip("pykernels.native", exc_type=ImportError)
LENDS = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
pytestmark = [
    pytest.mark.skipif(not LENDS, reason="this torch does not speak DLPack's exchange protocol"),
    pytest.mark.skipif(backends._forced.get() is not None, reason="the environment has chosen a backend"),
]
W, ONE = torch.linspace(-1, 1, 12).view(4, 3), adapter(4, 3, 2, 0)


@pytest.fixture(params=["library", "Python"], autouse=True)
def asked(request):
    """Who says what tensors are: torch's library by the shortcuts, or methods of Python."""
    yield from [None] if request.param == "library" else without_shortcuts()


class Subclass(torch.Tensor):
    """A tensor of another type."""


def everyday(weight, adapters, out=None, fan_in_fan_out=False, rounding="once"):
    """The compiled call alone."""
    return everyday_merge(weight, adapters, fan_in_fan_out, out, rounding)


def the_long_way(weight, adapters, **options):
    """The same where a backend is forced, which the compiled call leaves."""
    with pk.use_backend("cpu"):
        return pk.merge_lora(weight, adapters, **options)


def strided(a: LoRA) -> LoRA:
    """The same values, no two side by side."""
    apart = [torch.stack([t, t], -1).transpose(0, 1).contiguous()[..., 0].t() for t in a[:2]]
    assert not any(t.is_contiguous() or t.stride(1) == 1 for t in apart)
    return LoRA(*apart, a.scaling)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (60, 70), (130, 600), (1030, 1024)], ids=str)
def test_takes_weights(shape, dtype):
    """Below and above what goes to threads (2**17 multiplications) and what asks for huge pages (2**20)."""
    w = weight(*shape, dtype)
    wide, narrow = adapter(*shape, 5, 0), adapter(*shape, 3, 10, dtype=dtype)
    for given in ([wide], (narrow,), [narrow, wide, narrow], [strided(adapter(*shape, 4, 20))]):
        wanted = the_long_way(w, given)
        fresh = everyday(w, given)
        assert type(fresh) is torch.Tensor and fresh.is_contiguous() and fresh.dtype == dtype
        out, inplace = torch.full_like(w, math.nan), w.clone()
        assert everyday(w, given, out) is out and everyday(inplace, given, inplace) is inplace
        for got in (fresh, out, inplace, pk.merge_lora(w, given)):
            assert_same_bits(got, wanted)


@pytest.mark.parametrize("to", DTYPES, ids=SHORT.get)
def test_fills_other_dtypes(to):
    w, out = weight(50, 70, torch.bfloat16), torch.full((50, 70), math.nan, dtype=to)
    assert everyday(w, [adapter(50, 70, 3, 0)], out) is out
    assert_same_bits(out, the_long_way(w, [adapter(50, 70, 3, 0)], out=torch.empty_like(out)))


def test_takes_parameters_where_nothing_is_recorded():
    w, a = weight(40, 60, torch.bfloat16), adapter(40, 60, 4, 0)
    wanted = the_long_way(w, [a])
    for at in range(3):
        some = [torch.nn.Parameter(t) if i == at else t for i, t in enumerate((w, a.A, a.B))]
        given = some[0], [LoRA(*some[1:], a.scaling)]
        assert everyday(*given) is None and pk.merge_lora(*given).requires_grad
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert_same_bits(everyday(*given), wanted)
    frozen = torch.nn.Parameter(w.clone(), requires_grad=False)
    got = everyday(frozen, [a])
    assert type(got) is torch.Tensor and not got.requires_grad
    assert_same_bits(got, wanted)
    assert everyday(frozen, [a], frozen) is frozen
    assert_same_bits(frozen.data, wanted)


def test_counts_as_a_change_of_out():
    out, kept = torch.empty(4, 3), W._version
    version = out._version
    everyday(W, [ONE], out)
    assert out._version == version + 1 and W._version == kept
    left = everyday(W, [ONE._replace(scaling=math.nan)], out)
    assert left is None and out._version == version + 1
    learned = torch.ones(4, 3, requires_grad=True)
    product = (learned * out).sum()
    everyday(W, [ONE], out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def outcome(call):
    """The result, or the error's type and words."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def test_tensors_of_inference_mode_fare_as_they_do_the_long_way():
    with torch.inference_mode():
        w, out = W.clone(), torch.empty(4, 3)
    for call in (pk.merge_lora, the_long_way):
        assert_same_bits(outcome(lambda c=call: c(w, [ONE])), the_long_way(W, [ONE]))
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            found, wanted = (
                outcome(lambda c=call: c(W, [ONE], out=out)) for call in (pk.merge_lora, the_long_way)
            )
        assert found == wanted if isinstance(wanted, tuple) else found is wanted is out


def left():
    """By name: arguments (weight, adapters) and options that are left."""
    a, b, s = ONE[:3]
    several = torch.randn(4, 6)
    weights = {
        "no tensor": 1.0,
        "subclass": W.as_subclass(Subclass),
        "float64": W.double(),
        "int64": W.long(),
        "one dimension": W[0],
        "three dimensions": W[None],
        "no elements": W[:0],
        "transposed": torch.ones(3, 4).t(),
        "columns apart": several[:, ::2],
        "rows apart": several[:, :3],
        "negated": torch._neg_view(W),
        "sparse": W.to_sparse(),
        "meta": W.to("meta"),
        "another height": torch.ones(5, 3),
        "another width": torch.ones(4, 2),
        "freed": freed(W),
        "freed, a view": freed_view(W),
        "shrunk": shrunk(W),
    }
    adapters = {
        "none": [],
        "no list": None,
        "one adapter": ONE,
        "another sequence": {1: ONE}.values(),
        "tuples": [tuple(ONE)],
        "one of two no adapter": [ONE, None],
        "short": [tuple.__new__(LoRA, (a, b, s))],
        "magnitude": [ONE._replace(magnitude=torch.ones(4))],
        "A: no tensor": [ONE._replace(A=[[1.0]])],
        "A: subclass": [ONE._replace(A=a.as_subclass(Subclass))],
        "A: another width": [ONE._replace(A=a[:, :2])],
        "A: one dimension": [ONE._replace(A=a[0])],
        "A: no rank": [ONE._replace(A=a[:0], B=b[:, :0])],
        "A: negated": [ONE._replace(A=torch._neg_view(a))],
        "A: float64": [ONE._replace(A=a.double(), B=b.double())],
        "A: another dtype": [ONE._replace(A=a.bfloat16())],
        "A: freed": [ONE._replace(A=freed(a))],
        "A: freed, a view": [ONE._replace(A=freed_view(a))],
        "B: another height": [ONE._replace(B=b[:3])],
        "B: another rank": [ONE._replace(B=b[:, :1])],
        "B: shrunk": [ONE, ONE._replace(B=shrunk(b))],
        "B: meta": [ONE._replace(B=b.to("meta"))],
        "scaling: an integer": [ONE._replace(scaling=1)],
        "scaling: a tensor": [ONE._replace(scaling=torch.tensor(1.0))],
        "scaling: infinite": [ONE._replace(scaling=math.inf)],
        "scaling: not a number": [ONE._replace(scaling=math.nan)],
        "scaling: huge": [ONE._replace(scaling=-(2.0**100))],
    }
    options = {
        "turned": (W.t().contiguous(), {"fan_in_fan_out": True}),
        "turned: an integer": (W, {"fan_in_fan_out": 0}),
        "rounding: peft": (W, {"rounding": "peft"}),
        "rounding: another": (W, {"rounding": "twice"}),
        "rounding: no text": (W, {"rounding": None}),
        "rounding: a kind of text": (W, {"rounding": type("Text", (str,), {})("once")}),
    }
    made = {f"weight: {name}": (w, [ONE], {}) for name, w in weights.items()}
    made |= {f"adapters: {name}": (W, given, {}) for name, given in adapters.items()}
    return made | {name: (w, [ONE], chosen) for name, (w, chosen) in options.items()}


@pytest.mark.parametrize("name", left())
def test_leaves_the_rest(name):
    """To Python, whose words and results these are."""
    w, given, options = left()[name]
    assert everyday(w, given, **options) is None
    found, wanted = (outcome(lambda c=call: c(w, given, **options)) for call in (pk.merge_lora, the_long_way))
    if isinstance(wanted, tuple):
        assert found == wanted
    else:
        assert_same_bits(found, wanted)


def memory():
    """(a weight [4, 3], an adapter, and the memory that they are parts of): the weight's elements are
    [0, 12) of it, A's [24, 30), and B's, two apart, [60, 75).
    """
    whole = torch.randn(96)
    return whole[:12].view(4, 3), LoRA(whole[24:30].view(2, 3), whole[60:76].view(4, 4)[:, ::2], 0.5), whole


def outputs():
    """By name: tensors that are left as ``out``, made of the memory."""
    part = {
        f"{i}..{i + 12} of the memory": lambda m, i=i: m[i : i + 12].view(4, 3)
        for i in (1, 11, 13, 29, 49, 74)
    }
    return part | {
        "no tensor": lambda m: [0.0],
        "subclass": lambda m: torch.empty(4, 3).as_subclass(Subclass),
        "float64": lambda m: torch.empty(4, 3, dtype=torch.float64),
        "int64": lambda m: torch.empty(4, 3, dtype=torch.int64),
        "turned": lambda m: torch.empty(3, 4),
        "one dimension more": lambda m: torch.empty(1, 4, 3),
        "strides": lambda m: torch.empty(3, 4).t(),
        "negated": lambda m: torch._neg_view(torch.zeros(4, 3)),
        "meta": lambda m: torch.empty(4, 3, device="meta"),
        "gradient": lambda m: torch.zeros(4, 3, requires_grad=True),
        "freed": lambda m: freed(W),
        "shrunk": lambda m: shrunk(W),
        "the weight's memory in another dtype": lambda m: m.view(torch.bfloat16)[:12].view(4, 3),
    }


@pytest.mark.parametrize("name", outputs())
def test_leaves_other_outputs(name):
    w, one, whole = memory()
    out, before = outputs()[name](whole), whole.clone()
    assert everyday(w, [one], out) is None and torch.equal(whole, before)
    found, wanted = (outcome(lambda c=call: c(w, [one], out=out)) for call in (pk.merge_lora, the_long_way))
    assert found == wanted if isinstance(wanted, tuple) else found is wanted is out


@pytest.mark.parametrize("start", [0, 12, 30, 48, 75])
def test_fills_what_touches_nothing_or_is_the_weight(start):
    w, one, whole = memory()
    out = whole[start : start + 12].view(4, 3)
    wanted = the_long_way(w, [one])
    assert everyday(w, [one], out) is out
    assert_same_bits(out, wanted)


def test_leaves_a_forced_backend():
    for name in ("cpu", "ref"):
        with pk.use_backend(name):
            assert everyday(W, [ONE]) is None
    assert everyday(W, [ONE]) is not None


def test_leaves_what_is_watched():
    """Somebody who follows operators would see an empty result, or write to memory that is not there."""

    def run(w):
        return pk.merge_lora(w, [ONE])

    wanted = run(W)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert everyday(W, [ONE]) is None and run(W).shape == W.shape
    for graph in (make_fx(run)(torch.ones_like(W)), torch.func.functionalize(run)):
        assert_same_bits(graph(W), wanted)
    with pytest.warns((DeprecationWarning, torch.jit.TracerWarning)):
        traced = torch.jit.trace(run, (torch.ones_like(W),), check_trace=False)
    assert_same_bits(traced(W), wanted)


def test_leaves_a_result_that_a_transform_wraps():
    left = []

    def loss(scale):
        left.append(everyday(W, [ONE]))
        return scale * pk.merge_lora(W, [ONE]).sum()

    slope = torch.func.grad(loss)(torch.tensor(2.0))
    assert left == [None] and float(slope) == float(everyday(W, [ONE]).sum())


def test_keeps_no_reference():
    out, given = torch.empty(4, 3), [ONE, adapter(4, 3, 1, 10)]
    things = [W, out, given, *given, given[0].A, given[0].B]
    before = [sys.getrefcount(t) for t in things]
    for _ in range(20):
        everyday(W, given)
        everyday(W, given, out)
        everyday(W, [*given, None], out)
        everyday(W, given, out[:2])
        everyday(W[:2], given)
    assert [sys.getrefcount(t) for t in things] == before


def test_many_callers_at_once():
    w, given = weight(200, 300, torch.bfloat16), [adapter(200, 300, 8, 0), adapter(200, 300, 3, 10)]
    wanted = the_long_way(w, given)

    def result(_):
        with native.use_threads(3):
            return everyday(w, given)

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(result, range(60)):
            assert_same_bits(got, wanted)


def test_wrong_counts_of_arguments():
    from pykernels import _C

    with pytest.raises(TypeError, match="takes 5 arguments, got 1"):
        _C.lora_merge(1)
