"""lora_linear and lora_linear_grouped: values and gradients on every backend, PEFT's layers, messages."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import linear

import pykernels as pk
from pykernels import backends
from pykernels.ref import lora_linear as ref
from pykernels.ref.philox import draws
from tests.bounds import assert_same_bits, assert_within_sum
from tests.cases import DTYPES, SHORT
from tests.lora_layers import Layer, assert_backward, assert_forward, kept_of, layer

SHAPES = ((5, 40, 60), (1, 70, 300), (33, 20, 24))
SEED = 2**64 - 3
V, T = ValueError, TypeError


@pytest.fixture(params=["default", "ref"])
def backend(request):
    """The kernels, and the references in their place."""
    if request.param == "default":
        yield
    else:
        with pk.use_backend(request.param):
            yield


def call(c: Layer, x=None, **options):
    """The public op on a case: grouped where it has an index."""
    x = c.x if x is None else x
    if c.index is None:
        a, b, s = c.adapters[0]
        return pk.lora_linear(x, c.weight, a, b, scaling=s, bias=c.bias, **options)
    given = [pk.LoRA(*a) for a in c.adapters]
    return pk.lora_linear_grouped(x, c.weight, given, c.index.view(x.shape[:-1]), bias=c.bias)


def learning(c: Layer) -> tuple[Layer, list[torch.Tensor]]:
    """The case with leaves that want gradients, and these: x, weight, every A, every B, bias."""
    x, weight, bias = (t.clone().requires_grad_() for t in (c.x, c.weight, c.bias))
    low = [
        ref.Factors(a.A.clone().requires_grad_(), a.B.clone().requires_grad_(), a.scaling) for a in c.adapters
    ]
    leaves = [x, weight, *(a.A for a in low), *(a.B for a in low), bias]
    return c._replace(x=x, weight=weight, adapters=low, bias=bias), leaves


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("grouped", [False, True], ids=["one", "grouped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, grouped, dtype):
    c, leaves = learning(layer(*shape, [3, 8, 1] if grouped else [8], dtype, grouped=grouped))
    y = call(c)
    with torch.no_grad():
        assert_same_bits(call(c), y)
    plain = Layer(*(t.detach() if isinstance(t, torch.Tensor) else t for t in c))
    assert_forward(y, plain, None, ours=False)
    *found, by_bias = torch.autograd.grad(y, leaves, c.grad)
    assert_backward(found, plain, None, ours=False)
    assert_within_sum(by_bias, c.grad.double().sum(0), c.grad.double().abs().sum(0), shape[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=SHORT.get)
def test_the_references_as_a_backend(dtype):
    c, leaves = learning(layer(6, 8, 10, [3, 1], dtype, grouped=True))
    with pk.use_backend("ref"):
        y = call(c)
        *found, _ = torch.autograd.grad(y, leaves, c.grad)
    plain = Layer(*(t.detach() if isinstance(t, torch.Tensor) else t for t in c))
    assert_forward(y, plain, None)
    assert_backward(found, plain, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_dropout_is_the_same_everywhere(dtype, backend):
    c, leaves = learning(layer(7, 30, 50, [4], dtype))
    dropped = c._replace(adapters=[c.adapters[0]._replace(scaling=c.adapters[0].scaling / 0.75)])
    y = call(c, dropout=0.25, seed=SEED)
    kept = kept_of(c.x, 49152, SEED)
    plain = Layer(*(t.detach() if isinstance(t, torch.Tensor) else t for t in dropped))
    assert_forward(y, plain, kept, ours=False)
    assert_backward(torch.autograd.grad(y, leaves[:-1], c.grad), plain, kept, ours=False)


def test_composed_of_torch():
    """Where no kernel serves: roundings to the inputs' dtype in between, and the same mask."""
    half, wide = torch.bfloat16, torch.float32
    kinds = [
        (half, None, True, 0.0),
        (half, wide, False, 0.5),
        (wide, None, False, 0.5),
        (half, wide, True, 0.0),
    ]
    for dtype, low, grouped, p in kinds:
        c, leaves = learning(layer(9, 30, 50, [4, 2] if grouped else [4], dtype, low=low, grouped=grouped))
        options = {"dropout": p, "seed": 3} if p else {}
        with pk.use_backend("torch"):
            got = [y := call(c, **options), *torch.autograd.grad(y, leaves, c.grad)]
        with pk.use_backend("ref"):
            truth = [y := call(c, **options), *torch.autograd.grad(y, leaves, c.grad)]
        for a, b in zip(got, truth, strict=True):
            room = 4 * torch.finfo(dtype).eps * float(b.detach().abs().max())
            torch.testing.assert_close(a, b, rtol=0, atol=room)


def test_nothing_is_drawn_without_dropout_and_a_seed_is_drawn_with_it():
    c = layer(4, 8, 300, [2], torch.bfloat16)
    state = torch.get_rng_state()
    call(c)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    first, second = call(c, dropout=0.5), call(c, dropout=0.5)
    torch.manual_seed(1)
    assert_same_bits(call(c, dropout=0.5), first)
    assert not torch.equal(first, second)
    assert_same_bits(call(c, dropout=1.0), pk.lora_linear(c.x, c.weight, *(0 * t for t in c.adapters[0][:2]),
                                                          scaling=1, bias=c.bias))  # fmt: skip


def test_dropout_keeps_no_copy_of_x():
    c, _ = learning(layer(64, 8, 512, [4], torch.bfloat16))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(c, dropout=0.5, seed=1)
    large = [t for t in saved if t.numel() >= c.x.numel()]
    assert len(large) == 1 and large[0].data_ptr() == c.x.data_ptr()


def test_the_chance_to_be_kept():
    kept = draws(5, 0, 0, 1 << 18) < round(0.9 * 65536)
    assert abs(float(kept.double().mean()) - 0.9) < 4 * (0.9 * 0.1 / (1 << 18)) ** 0.5


def test_gradcheck_of_the_reference():
    c, leaves = learning(layer(3, 4, 5, [2], torch.float64))
    a, b, s = c.adapters[0]

    def one(x, weight, a, b, bias):
        return pk.lora_linear(x, weight, a, b, scaling=s, bias=bias, dropout=0.4, seed=3)

    assert gradcheck(one, leaves)
    g, more = learning(layer(5, 3, 4, [2, 1], torch.float64, grouped=True))

    def each(x, weight, a0, a1, b0, b1, bias):
        given = [pk.LoRA(a0, b0, 0.5), pk.LoRA(a1, b1, 2.0)]
        return pk.lora_linear_grouped(x, weight, given, g.index, bias=bias)

    assert gradcheck(each, more)
    truth = linear(c.x, c.weight, c.bias) + s * (c.x @ a.T @ b.T)
    torch.testing.assert_close(pk.lora_linear(c.x, c.weight, a, b, scaling=s, bias=c.bias), truth)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (2, 3, 6), (6,), (2, 3, 0)], ids=str)
def test_any_number_of_dimensions(shape, backend):
    c, leaves = learning(layer(6, 5, shape[-1], [2], torch.bfloat16))
    x = torch.randn(shape).bfloat16().requires_grad_()
    for extra in (c, c._replace(index=torch.zeros(shape[:-1], dtype=torch.int64))):
        y = call(extra, x)
        assert y.shape == (*shape[:-1], 5)
        found = torch.autograd.grad(y.sum(), [x, *leaves[1:]])
        assert [f.shape for f in found] == [x.shape, *(t.shape for t in leaves[1:])]
        assert all(f.isfinite().all() for f in found)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, one of two elements apart in both directions."""
    wide = torch.full([2 * n for n in t.shape], torch.nan, dtype=t.dtype)
    part = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    part.copy_(t)
    return part


def negated(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, as a view of their negatives."""
    return torch._neg_view(-t)


@pytest.mark.parametrize("stored", [strided, negated])
@pytest.mark.parametrize("grouped", [False, True], ids=["one", "grouped"])
def test_any_strides_and_negated_views(stored, grouped):
    c, leaves = learning(layer(5, 40, 60, [3, 8] if grouped else [8], torch.bfloat16, grouped=grouped))
    wanted = call(c)
    grads = torch.autograd.grad(wanted, leaves, c.grad)
    low = [ref.Factors(stored(a.A), stored(a.B), a.scaling) for a in c.adapters]
    other = c._replace(x=stored(c.x), weight=stored(c.weight), adapters=low, bias=stored(c.bias))
    found = call(other)
    assert_same_bits(found, wanted)
    for one, truth in zip(torch.autograd.grad(found, leaves, stored(c.grad)), grads, strict=True):
        assert_same_bits(one, truth)
    with torch.no_grad():
        assert_same_bits(call(other), wanted)


def test_only_what_is_asked_for():
    c, leaves = learning(layer(4, 6, 8, [2], torch.bfloat16))
    whole = torch.autograd.grad(call(c), leaves, c.grad)
    for i, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        assert_same_bits(torch.autograd.grad(call(c), leaf, c.grad)[0], whole[i])


def test_peft_layers_forward_and_gradients():
    peft = pytest.importorskip("peft")
    for dtype, dora in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"q": torch.nn.Linear(48, 32)})
        kind = {"r": 8, "lora_alpha": 12, "init_lora_weights": False, "use_dora": dora}
        config = peft.LoraConfig(target_modules=["q"], **kind)
        module = peft.inject_adapter_in_model(config, model).to(dtype)["q"]
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        x = torch.randn(3, 5, 48, dtype=dtype, requires_grad=True)
        grad = torch.randn(3, 5, 32, dtype=dtype)
        s, leaves, given = module.scaling["default"], [x, a, b], {}
        if dora:
            leaves.append(m := module.lora_magnitude_vector["default"].weight)
            m.data *= torch.linspace(0.5, 1.5, 32)
            given = {"column_scale": m / pk.dora_norm(module.weight, a, b, s)}
        theirs = module(x)
        y = pk.lora_linear(x, module.weight, a, b, scaling=s, bias=module.bias, **given)
        wanted, found = (torch.autograd.grad(t, leaves, grad) for t in (theirs, y))
        for got, want in zip([y, *found], [theirs, *wanted], strict=True):
            room = 8 * torch.finfo(dtype).eps * float(want.detach().abs().max())
            torch.testing.assert_close(got, want, rtol=0, atol=room)


def test_dora_norm_and_inference():
    for dtype, s in ((torch.float32, 0.5), (torch.bfloat16, -2.0), (torch.float64, 3.0)):
        c = layer(4, 60, 70, [6], dtype)
        a, b, _ = c.adapters[0]
        norm, truth = pk.dora_norm(c.weight, a, b, s), ref.dora_norm(c.weight, a, b, s)
        size = ref.dora_norm(c.weight.abs(), a.abs(), b.abs(), abs(s))  # no cancellation
        eps = torch.finfo(norm.dtype).eps
        assert norm.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert bool(((norm.double() - truth).abs() <= 70 * eps * size**2 / truth).all())
        m = truth.to(norm.dtype) * 1.5
        y = pk.lora_linear(c.x, c.weight, a, b, scaling=s, column_scale=m / norm)
        adapted = c.weight.double() + s * b.double() @ a.double()
        wanted = c.x.double() @ (1.5 * adapted).T
        assert float((y - wanted).abs().max() / wanted.abs().max()) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_scaled_columns(dtype, backend):
    """Values and gradients, of the scale too; and the same values where no gradient is recorded."""
    c, leaves = learning(layer(5, 7, 40, [3], dtype))
    leaves = [*leaves, torch.linspace(-2, 3, 7, requires_grad=True)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    x, weight, a, b, bias, scale = wide
    truth = scale * (x @ weight.T + c.adapters[0].scaling * (x @ a.T @ b.T)) + bias
    y = call(c, column_scale=leaves[-1])
    wanted = [truth, *torch.autograd.grad(truth, wide, c.grad.double())]
    for got, want in zip([y, *torch.autograd.grad(y, leaves, c.grad)], wanted, strict=True):
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        room = 4 * eps * float(want.detach().abs().max())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=room)
    for bare in (c, c._replace(bias=None)):
        y = call(bare, column_scale=leaves[-1])
        with torch.no_grad(), pk.use_backend(backends.chosen("lora_linear", c.x)):
            assert_same_bits(call(bare, column_scale=leaves[-1]), y)
    with torch.no_grad():
        dropped = call(c._replace(bias=None), dropout=0.5, seed=1)
        got = call(c._replace(bias=None), dropout=0.5, seed=1, column_scale=torch.full((7,), 4.0))
        assert_same_bits(got, 4 * dropped)


X, W, A, B = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(4, 2)
HALF, META, SPARSE = torch.float16, torch.zeros(4, 3, device="meta"), torch.zeros(4, 3).to_sparse()
ERRORS = [
    ((1.0, W, A, B), {}, T, "x must be a tensor, got float"),
    ((X.int(), W, A, B), {}, T, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
    ((X[0, 0], W, A, B), {}, V, "x must have at least one dimension, got shape []"),
    ((X, None, A, B), {}, T, "weight must be a tensor, got NoneType"),
    ((X, W.t(), A, B), {}, V, "weight must have shape [out, 3], got [3, 4]"),
    ((X, W[0], A, B), {}, V, "weight must have shape [out, 3], got [3]"),
    ((X, W.half(), A, B), {}, T, "weight must have x's dtype torch.float32, got torch.float16"),
    ((X, META, A, B), {}, V, "weight must be a dense tensor with data, got torch.strided on meta"),
    ((X, SPARSE, A, B), {}, V, "weight must be a dense tensor with data, got torch.sparse_coo on cpu"),
    ((X, W, A[:, :2], B), {}, V, "lora_A must have shape [r, 3], got [2, 2]"),
    ((X, W, A[:0], B[:, :0]), {}, V, "lora_A must have a rank of at least 1, got shape [0, 3]"),
    ((X, W, A, B[:3]), {}, V, "lora_B must have shape [4, 2], got [3, 2]"),
    ((X, W, A.half(), B), {}, T, "lora_A must have x's dtype torch.float32, got torch.float16"),
    ((X.half(), W.half(), A.double(), B), {}, T, "lora_A must have x's dtype torch.float16 or float32, got"),
    ((X.half(), W.half(), A, B.half()), {}, T, "lora_B must have lora_A's dtype torch.float32, got torch.f"),
    ((X, W, A, B), {"bias": torch.zeros(3)}, V, "bias must have shape [4], got [3]"),
    ((X, W, A, B), {"bias": torch.zeros(4).half()}, T, "bias must have x's dtype torch.float32, got torch.f"),
    ((X, W, A, B), {"column_scale": 2.0}, T, "column_scale must be a tensor, got float"),
    ((X, W, A, B), {"column_scale": torch.zeros(3)}, V, "column_scale must have shape [4], got [3]"),
    ((X.half(), W.half(), A, B), {"column_scale": torch.zeros(4).double()}, T,
     "column_scale must have x's dtype torch.float16 or float32, got torch.float64"),
    ((X, W, A, B), {"scaling": "1"}, T, "scaling must be a number, got str"),
    ((X, W, A, B), {"scaling": float("nan")}, V, "scaling must be finite in float32, got nan"),
    ((X, W, A, B), {"dropout": 1.5}, V, "dropout must lie in [0, 1], got 1.5"),
    ((X, W, A, B), {"dropout": 0.5, "seed": -1}, V, "seed must lie in [0, 2**64), got -1"),
    ((X, W, A, B), {"dropout": 0.5, "seed": 1.0}, T, "seed must be an integer, got float"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "options", "kind", "text"), ERRORS, ids=[e[3][:48] for e in ERRORS])
def test_messages(given, options, kind, text):
    with pytest.raises(kind, match=re.escape(f"lora_linear: {text}")):
        pk.lora_linear(*given, **{"scaling": 1.0, **options})


LORA, ROWS = pk.LoRA(A, B, 1.0), torch.tensor([0, -1])
GROUPED = [
    ((LORA, ROWS), T, "adapters must be a sequence of LoRA, got LoRA"),
    (((A, B), ROWS), T, "adapters[0] must be a LoRA, got Tensor"),
    (([LORA, LORA._replace(B=B[:3])], ROWS), V, "adapters[1].B must have shape [4, 2], got [3, 2]"),
    (([LORA._replace(scaling="1")], ROWS), T, "adapters[0].scaling must be a number, got str"),
    (([LORA._replace(magnitude=B[:, 0])], ROWS), V, "adapters[0].magnitude must be None, as rows of DoRA"),
    (([LORA], [0, -1]), T, "index must be a tensor, got list"),
    (([LORA], ROWS.int()), T, "index must be int64, got torch.int32"),
    (([LORA], ROWS[:1]), V, "index must have shape [2], got [1]"),
    (([LORA], ROWS.to("meta")), V, "index must be on x's device cpu, got meta"),
    (([LORA], ROWS + 1), V, "index must lie in [-1, 1), got 1"),
    (([LORA], ROWS - 1), V, "index must lie in [-1, 1), got -2"),
]


@pytest.mark.parametrize(("given", "kind", "text"), GROUPED, ids=[e[2][:48] for e in GROUPED])
def test_messages_of_groups(given, kind, text):
    with pytest.raises(kind, match=re.escape(f"lora_linear_grouped: {text}")):
        pk.lora_linear_grouped(X, W, *given)
