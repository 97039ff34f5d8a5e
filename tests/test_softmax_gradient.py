"""Derivatives of softmax, log_softmax and logsumexp against float64; their operators; compilation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.library import opcheck

import pykernels as pk
from tests.bounds import assert_same_bits, half_ulp
from tests.cases import DTYPES, SHORT
from tests.softmax_cases import INF, NAN, drawn

NAMES = ("softmax", "log_softmax", "logsumexp")
FUNCTIONS = {name: getattr(pk, name) for name in NAMES}
"""A name's first use defines its operators."""
OPS = torch.ops.pykernels
U = 2.0**-24
SHAPES = ((3, 1000), (4, 33, 5), (1, 70_001), (2, 4096, 1), (1, 2, 300), (5, 1))


def within(got, truth, size):
    """Six float32 roundings of terms of ``size``, and the last one."""
    room = 6 * U * size + 2**-149
    assert bool(((got.double() - truth).abs() <= room + half_ulp(truth.abs() + room, got.dtype)).all())


@pytest.mark.parametrize(
    "dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda d: "->".join(map(SHORT.get, d))
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_against_float64(shape, dtypes):
    kind, result = dtypes
    g = drawn("3 randn", shape, 1).to(kind)
    for dim in range(len(shape)):
        y = drawn("3 randn", shape).softmax(dim).to(kind)
        wide, p = g.double(), y.double()
        dot = (wide * p).sum(dim, keepdim=True)
        size = 0.7 * p * (wide.abs() + (wide * p).abs().sum(dim, keepdim=True))
        within(OPS.softmax_backward(g, y, dim, 0.7, result), 0.7 * p * (wide - dot), size)
        y = drawn("3 randn", shape).log_softmax(dim).to(kind)
        p, total = y.double().exp(), wide.sum(dim, keepdim=True)
        size = 0.7 * (wide.abs() + (2 + y.double().abs()) * p * wide.abs().sum(dim, keepdim=True))
        within(OPS.log_softmax_backward(g, y, dim, 0.7, result), 0.7 * (wide - p * total), size)


@pytest.mark.parametrize("size", [1e-20, 1e-28])
def test_tiny_gradients_lose_no_digits(size):
    y, g = drawn("3 randn", (2, 50, 1)).log_softmax(1), size * drawn("3 randn", (2, 50, 1), 1)
    p, wide = y.double().exp(), g.double()
    terms = wide.abs() + (2 + y.double().abs()) * p * wide.abs().sum(1, keepdim=True)
    within(OPS.log_softmax_backward(g, y, 1, 1.0, torch.float32), wide - p * wide.sum(1, keepdim=True), terms)


def plain(name, x, dim, options):
    """The same in torch expressions."""
    z, o = x, dict(options)
    if c := o.get("softcap"):
        z = c * (z / c).tanh()
    z = z / o.get("temperature", 1.0)
    if (mask := o.get("mask")) is not None:
        z = z.masked_fill(~mask, -INF) if mask.dtype == torch.bool else z + mask
    if name == "logsumexp":
        return z.logsumexp(dim)
    if (sink := o.get("sink")) is not None:
        shape = [1 if d == dim % x.dim() else n for d, n in enumerate(x.shape)]
        return torch.cat([z, sink.expand(shape)], dim).softmax(dim).narrow(dim, 0, x.shape[dim])
    return getattr(z, name)(dim)


def options(name, dtype):
    """Sets of options, leaves among them."""
    g = torch.Generator().manual_seed(3)
    leaf = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    keep = torch.rand(5, 7, generator=g) > 0.3
    keep[:, 0] = keep[0] = True
    yield {}
    yield {"temperature": 0.7}
    if name == "logsumexp":
        return
    yield {"mask": keep}
    yield {"softcap": 2.0, "temperature": 1.5}
    yield {"mask": leaf(5, 1), "softcap": 3.0}
    yield {"mask": leaf(), "temperature": 0.3}
    if name == "softmax":
        yield {"sink": leaf(1)}
        yield {"sink": leaf(5, 1), "mask": keep, "softcap": 2.0, "temperature": 0.5}
        yield {"sink": leaf(4, 1, 1), "mask": leaf(4, 5, 7)}


CASES = [(name, i) for name in NAMES for i in range(len(list(options(name, torch.float32))))]


def leaves(x, chosen):
    """All that have a gradient."""
    return [x, *(o for o in chosen.values() if isinstance(o, torch.Tensor) and o.requires_grad)]


def dims(chosen):
    """A sink's shape fits the last dimension only, and a mask takes whole rows of the first."""
    return (-1,) if "sink" in chosen else (1, -1) if "mask" in chosen else (0, 1, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize(("name", "number"), CASES)
def test_gradients_are_those_of_torch_in_float64(name, number, dtype):
    chosen = list(options(name, dtype))[number]
    for dim in dims(chosen):
        x = drawn("3 randn", (4, 5, 7)).to(dtype).requires_grad_()
        y = FUNCTIONS[name](x, dim, **chosen)
        g = drawn("3 randn", y.shape, 1).to(dtype)
        got = grad(y, leaves(x, chosen), g)
        floats = {k: v for k, v in chosen.items() if isinstance(v, torch.Tensor) and v.requires_grad}
        exact = {k: v.detach().double().requires_grad_() for k, v in floats.items()}
        wide = x.detach().double().requires_grad_()
        wanted = grad(plain(name, wide, dim, chosen | exact), leaves(wide, exact), g.double())
        for a, b, like in zip(got, wanted, leaves(x, chosen), strict=True):
            assert a.dtype == like.dtype and a.shape == like.shape
            room = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                a.double(), b, rtol=room, atol=room * float(b.abs().max().clamp(min=1))
            )


@pytest.mark.parametrize(("name", "number"), CASES)
def test_gradcheck_on_the_reference(name, number):
    chosen = list(options(name, torch.float64))[number]
    extra = [k for k, v in chosen.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    for dim in dims(chosen):
        x = drawn("3 randn", (4, 5, 7)).double().mul(0.3).requires_grad_()

        def call(x, *others, dim=dim):
            y = FUNCTIONS[name](x, dim, **chosen | dict(zip(extra, others, strict=True)))
            return y.where(y.isfinite(), 0.0)  # the logarithm of what a mask took out has no difference

        inputs = (x, *(chosen[k] for k in extra))
        assert gradcheck(call, inputs, fast_mode=True)
        assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_in_float32(name):
    def twice(op, x):
        [first] = grad(op(x, 1).square().sum(), [x], create_graph=True)
        return grad(first.square().sum(), [x])[0]

    x = drawn("3 randn", (5, 40)).requires_grad_()
    wide = x.detach().double().requires_grad_()
    torch.testing.assert_close(
        twice(FUNCTIONS[name], x).double(), twice(getattr(torch, name), wide), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dim", [(0, 2), [2, 1], (0, 1, 2)], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
def test_logsumexp_over_dimensions(dim, keepdim):
    x = drawn("3 randn", (3, 4, 5)).double().requires_grad_()

    def call(x):
        return pk.logsumexp(x, dim, keepdim=keepdim, temperature=0.7)

    assert gradcheck(call, (x,)) and gradgradcheck(call, (x,))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "row",
    [[-INF, -INF], [1, -INF, 2], [1, INF, 2], [1, NAN, 2], [INF, NAN], [3.4e38, 0], [1e-40, 0]],
    ids=str,
)
def test_gradients_at_special_values_are_torchs(name, row):
    x = torch.tensor(row, requires_grad=True)
    ours, theirs = FUNCTIONS[name](x, 0), getattr(torch, name)(x, 0)
    g = torch.full_like(ours, 0.5)
    torch.testing.assert_close(grad(ours, [x], g)[0], grad(theirs, [x], g)[0], equal_nan=True)


def test_masked_elements_and_safe_rows_get_no_gradient():
    x = torch.tensor([[1.0, NAN, 2.0], [1.0, 2.0, 3.0], [-INF, -INF, -INF]], requires_grad=True)
    keep = torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    for op in (pk.softmax, pk.log_softmax):
        [got] = grad(op(x, mask=keep, safe=True), [x], torch.tensor([[1.0, 1.0, 0.5]] * 3))
        assert bool(got.isfinite().all()) and got[0, 1] == 0 and got[0, 0] != 0
        assert not got[1:].any()
        [got] = grad(op(x[1], mask=keep[1]), [x], torch.ones(3))
        assert not got[1].any()  # the row is NaN, and so is torch's gradient but for the masked elements


def test_gradients_come_in_the_dtype_of_the_input():
    for given, result in itertools.product((*DTYPES, torch.float64), repeat=2):
        x = drawn("3 randn", (3, 50)).to(given).requires_grad_()
        for op, theirs in ((pk.softmax, torch.softmax), (pk.log_softmax, torch.log_softmax)):
            g = drawn("3 randn", (3, 50), 1).to(result)
            [got] = grad(op(x, 0, dtype=result), [x], g)
            wide = x.detach().to(result).double().requires_grad_()
            [wanted] = grad(theirs(wide, 0), [wide], g.double())
            room = 16 * max(torch.finfo(given).eps, torch.finfo(result).eps)
            assert got.dtype == given
            torch.testing.assert_close(got.double(), wanted, rtol=room, atol=room)


def test_gradients_that_are_views_are_read_right():
    x = drawn("3 randn", (4, 6)).requires_grad_()
    for g in (torch.ones(1).expand(4, 6), drawn("small", (6, 4)).t(), torch._neg_view(drawn("far", (4, 6)))):
        for op in (pk.softmax, pk.log_softmax):
            assert_same_bits(grad(op(x), [x], g)[0], grad(op(x), [x], g.clone().contiguous())[0])


def test_no_elements():
    for shape in ((3, 0), (0, 4)):
        x = torch.zeros(shape, requires_grad=True)
        for op in (pk.softmax, pk.log_softmax, pk.logsumexp):
            assert grad(op(x).sum(), [x])[0].shape == shape


def test_no_graph_without_a_gradient():
    x = torch.ones(4, requires_grad=True)
    with torch.no_grad():
        assert not pk.softmax(x).requires_grad
        out = torch.empty(4)
        assert pk.log_softmax(x, out=out) is out
    assert not pk.softmax(x.detach(), mask=torch.zeros(4)).requires_grad
    assert pk.softmax(x.detach(), mask=torch.zeros(4, requires_grad=True)).requires_grad
    assert pk.softmax(x.detach(), sink=torch.zeros(1, requires_grad=True)).requires_grad


def of(*shape, grad=True):
    """A tensor for an operator."""
    return drawn("3 randn", shape).requires_grad_(grad)


OPERATORS = {
    "softmax": (OPS.softmax.default, (of(3, 4), 1, None, 1.0, None, None, None, False)),
    "softmax of options": (
        OPS.softmax.default, (of(3, 4), -2, torch.float16, 1.5, of(4), 2.0, of(1, 4), True)
    ),
    "softmax of a bool mask": (
        OPS.softmax.default, (of(3, 4), 1, None, 1.5, of(4, grad=False) > 0, None, None, True)
    ),
    "log_softmax": (OPS.log_softmax.default, (of(3, 4), 0, None, 1.5, of(3, 4), 2.0, True)),
    "logsumexp": (OPS.logsumexp.default, (of(3, 4, 2), [0, -1], False, 1.5)),
    "softmax_backward": (OPS.softmax_backward.default, (of(3, 4), of(3, 4), 1, 0.5, torch.float32)),
    "log_softmax_backward": (
        OPS.log_softmax_backward.default, (of(3, 4), of(3, 4), 0, 0.5, torch.bfloat16)
    ),
    "logsumexp_backward": (OPS.logsumexp_backward.default, (of(3, 1), of(3, 4), [1], 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_sound(name):
    opcheck(*OPERATORS[name])


def test_operators_that_fill_are_sound():
    opcheck(
        OPS.softmax.out,
        (of(3, 4, grad=False), 1, None, 1.0, None, None, None, False),
        {"out": torch.empty(3, 4)},
    )
    opcheck(
        OPS.log_softmax.out,
        (of(3, 4, grad=False), 1, None, 1.0, None, None, False),
        {"out": torch.empty(3, 4)},
    )


def together(x, mask, sink):
    """Every op and option."""
    return (
        pk.softmax(2 * x, mask=mask, softcap=3.0, temperature=0.5, sink=sink).sum(0)
        + pk.softmax(x, 0, mask=x > 0, sink=0.25, safe=True, dtype=torch.float32).sum(0)
        + pk.log_softmax(x, 0, temperature=2.0, softcap=5.0).sum(0)
        + pk.logsumexp(x, (0, 1))
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic):
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        inputs = [of(rows, 4), of(4), of(rows, 1)]
        results = []
        for call in (together, compiled):
            y = call(*inputs)
            results.append((y, *grad(y.square().sum(), inputs)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_into_out():
    def call(x, out):
        return pk.softmax(x, 0, out=out) + 1

    x, out = of(3, 4, grad=False), torch.full((3, 4), NAN)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(x, out)
    assert torch.equal(got, pk.softmax(x, 0) + 1) and torch.equal(out, pk.softmax(x, 0))
