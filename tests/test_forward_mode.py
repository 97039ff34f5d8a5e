"""Forward differentiation: tangents are right where a rule exists, and refused by name where none does."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jacfwd, jvp

import pykernels as pk

torch.manual_seed(0)
DOUBLE = torch.float64
X, T, MASK, SINK = (torch.randn(s, dtype=DOUBLE) for s in ((3, 5), (3, 5), (5,), (3, 1)))
KEEP = torch.tensor([True, True, False, True, True])
W, A, B, BIAS = (torch.randn(s, dtype=DOUBLE) for s in ((4, 5), (2, 5), (4, 2), (4,)))
A3, B3, INDEX = torch.randn(3, 5, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE), torch.tensor([1, -1, 0])


def grouped(x, w, a, b, a3, b3):
    """A row each for the second adapter, none, and the first."""
    return pk.lora_linear_grouped(x, w, [pk.LoRA(a, b, 0.5), pk.LoRA(a3, b3, 2.0)], INDEX)


RULES = {
    "softmax": (pk.softmax, (X,)),
    "softmax dim": (lambda x: pk.softmax(x, 0), (X,)),
    "softmax options": (
        lambda x, m, s: pk.softmax(x, temperature=0.7, softcap=2.0, mask=m, sink=s, safe=True),
        (X, MASK, SINK),
    ),
    "softmax bool mask": (lambda x: pk.softmax(x, mask=KEEP), (X,)),
    "softmax mask alone": (lambda m: pk.softmax(X, mask=m), (MASK,)),
    "log_softmax": (pk.log_softmax, (X,)),
    "log_softmax options": (lambda x, m: pk.log_softmax(x, temperature=2.0, softcap=3.0, mask=m), (X, MASK)),
    "logsumexp": (lambda x: pk.logsumexp(x, temperature=0.5), (X,)),
    "logsumexp dims": (lambda x: pk.logsumexp(x[None], (0, 2), keepdim=True), (X,)),
    "lora_linear": (
        lambda x, w, a, b, c: pk.lora_linear(x, w, a, b, scaling=0.5, bias=c), (X, W, A, B, BIAS)
    ),
    "lora_linear dropout": (
        lambda x, a, b: pk.lora_linear(x, W, a, b, scaling=0.5, dropout=0.5, seed=3), (X, A, B)
    ),
    "lora_linear bias": (lambda c: pk.lora_linear(X, W, A, B, scaling=0.5, bias=c), (BIAS,)),
    "lora_linear_grouped": (grouped, (X, W, A, B, A3, B3)),
    "merge_lora": (
        lambda w, a, b, b3: pk.merge_lora(w, [pk.LoRA(a, b, 0.5), pk.LoRA(A3, b3, 2.0)]), (W, A, B, B3)
    ),
    "merge_lora turned": (
        lambda b: pk.merge_lora(W.t().contiguous(), [pk.LoRA(A, b, 0.5)], fan_in_fan_out=True), (B,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_tangents_are_those_of_differences(name):
    """And those of the gradient's formulas: one check does both, in float64."""
    call, given = RULES[name]
    leaves = [t.clone().requires_grad_() for t in given]
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("op", [pk.softmax, pk.log_softmax, lambda x: pk.logsumexp(x)])
def test_no_everyday_call_drops_a_tangent(op):
    """The same through dual numbers, torch.func and kernels; wider rows than a call needs threads for."""
    for x, t, close in ((X, T, 1e-12), (X.float(), T.float(), 1e-5), (X.bfloat16(), T.bfloat16(), 0.05)):
        wanted = jvp(op, (x.double(),), (t.double(),))[1]
        with forward_ad.dual_level():
            y, tangent = forward_ad.unpack_dual(op(forward_ad.make_dual(x, t)))
        assert tangent.dtype == y.dtype == x.dtype and torch.equal(y, op(x))
        assert torch.equal(jvp(op, (x,), (t,))[1], tangent)
        torch.testing.assert_close(tangent.double(), wanted, rtol=close, atol=close)


def test_no_everyday_layer_drops_a_tangent():
    given = [t.float() for t in (X, W, A, B)]
    for at, tangent in enumerate([T.float(), W.float(), A.float(), B.float()]):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(t, tangent) if i == at else t for i, t in enumerate(given)]
            y = pk.lora_linear(*dual, scaling=0.5)
            rows = pk.lora_linear_grouped(
                *dual[:2], [pk.LoRA(*dual[2:], 0.5)], torch.zeros(3, dtype=torch.int64)
            )
            both = [forward_ad.unpack_dual(t).tangent for t in (y, rows)]
        wanted = jvp(lambda *g: g[0] @ (g[1] + 0.5 * g[3] @ g[2]).t(), tuple(t.double() for t in given),
                     tuple(tangent.double() if i == at else torch.zeros_like(t).double()
                           for i, t in enumerate(given)))[1]  # fmt: skip
        for found in both:
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_no_everyday_merge_drops_a_tangent():
    given = [t.float() for t in (W, A, B)]
    for at, t in enumerate(given):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(t, 2 * t) if i == at else t for i, t in enumerate(given)]
            found = forward_ad.unpack_dual(pk.merge_lora(dual[0], [pk.LoRA(*dual[1:], 0.5)])).tangent
        torch.testing.assert_close(found, 2 * W.float() if t is given[0] else B.float() @ A.float())


def test_levels_upon_levels():
    """Jacobians of Jacobians: the inner tangent carries the outer one."""
    for ours, theirs in ((pk.softmax, torch.softmax), (pk.log_softmax, torch.log_softmax)):
        found = jacfwd(jacfwd(ours))(X[0])
        wanted = jacfwd(jacfwd(lambda x, f=theirs: f(x, -1)))(X[0])
        torch.testing.assert_close(found, wanted)


def test_rows_of_extremes():
    """Where torch's tangents are numbers ours are the same: masked rows and elements."""
    x = X.clone()
    x[0, :2], x[1] = -torch.inf, torch.tensor([0.0, 800.0, -800.0, 1.0, 2.0])
    for ours, theirs in ((pk.softmax, torch.softmax), (pk.log_softmax, torch.log_softmax)):
        assert_close = torch.testing.assert_close
        assert_close(jvp(ours, (x,), (T,))[1], jvp(lambda x, f=theirs: f(x, -1), (x,), (T,))[1])
    empty = torch.full((2, 3), -torch.inf, dtype=DOUBLE)
    for op in (pk.softmax, pk.log_softmax):
        tangent = jvp(lambda x, f=op: f(x, safe=True), (empty,), (torch.ones_like(empty),))[1]
        assert bool((tangent == 0).all())


REFUSED = {
    "linear_merge": lambda x: pk.linear_merge([W, W], x[0, :2]),
    "linear_merge ": lambda x: pk.linear_merge([x, x], 1.0),
    "task_arithmetic": lambda x: pk.task_arithmetic(W, [W], lambda_=x[0, 0]),
    "ties_merge": lambda x: pk.ties_merge(x, [x], density=0.5),
    "dare_merge": lambda x: pk.dare_merge(x, [x], density=0.5, seed=1),
    "trim": lambda x: pk.trim(x, 0.5),
    "drop_rescale": lambda x: pk.drop_rescale(x, 0.5, seed=1),
    "kth_magnitude": lambda x: pk.kth_magnitude(None, [x], 0.5),
    "elect_sign": lambda x: pk.elect_sign([x]),
    "softmax": lambda x: pk.softmax(x, out=torch.empty_like(X)),
    "merge_lora": lambda x: pk.merge_lora(W, [pk.LoRA(x[:2], B, 0.5, BIAS)]),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("learned", [False, True], ids=["", "learned"])
def test_a_tangent_is_refused_where_it_would_be_dropped(name, learned):
    call = REFUSED[name]
    said = (
        f"^{name.strip()}: (no forward derivative is defined here|.*(out must be None|must not require grad))"
    )
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, ValueError), match=said):
        call(forward_ad.make_dual(X.clone().requires_grad_(learned), T))
    if not learned:
        with pytest.raises(NotImplementedError, match=said):
            jvp(call, (X,), (T,))
        with forward_ad.dual_level():
            assert call(X) is not None
