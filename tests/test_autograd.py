"""Gradients of linear_merge and task_arithmetic in weight and lambda, against float64 autograd."""

from __future__ import annotations

import math

import pytest
import torch

import pykernels as pk
from pykernels.ops import gradient
from tests.cases import DTYPES, SHORT, weights
from tests.where import DEVICE, make

ALL = (*DTYPES, torch.float64)
NUMEL = 3 * 4096 + 77
U = 2.0**-53


def formula(base, tuned, weight, lambda_, normalize):
    """base + lambda * sum(weight * delta) / divisor in float64, on deltas as the kernels have them."""
    wide = torch.float64 if tuned[0].dtype == torch.float64 else torch.float32
    deltas = [t.to(wide) if base is None else t.to(wide) - base.to(wide) for t in tuned]
    total = sum(w * d.double() for w, d in zip(weight.double(), deltas, strict=True))
    merged = lambda_.double() * total / (weight.double().sum() if normalize else 1.0)
    return merged if base is None else base.double() + merged


def allowed(base, tuned, weight, lambda_, normalize, grad):
    """What rounding may do to (the gradient of weight, of lambda) in float64.

    A dot product of m terms errs by at most m U A, A the sum of their magnitudes, in whatever order it is
    added up, here as in the truth; the chain rule adds a few roundings per term of n-term sums.
    """
    d = [t.double() if base is None else t.double() - base.double() for t in tuned]
    size = torch.stack([(grad.double() * x).abs().sum() for x in d])
    w, total = weight.double().abs(), abs(weight.double().sum().item()) if normalize else 1.0
    summed = (w * size).sum()
    roundings = 2 * (NUMEL + 8 * len(tuned) + 16) * U
    by_weight = lambda_.double().abs() / total * (size + (summed / total if normalize else 0.0))
    return roundings * by_weight, roundings * summed / total


def within(got, wanted, room):
    """Whether ``got`` is ``wanted``, give or take ``room`` and a last rounding: half of eps at the most."""
    wanted, half = wanted.double(), torch.finfo(got.dtype).eps / 2
    return bool(((got.double() - wanted).abs() <= room + half * (wanted.abs() + room)).all())


def coefficients(models, dtype):
    """Leaves for weight and lambda."""
    return (
        torch.tensor(weights(models), dtype=dtype, requires_grad=True, device=DEVICE),
        torch.tensor(0.7, dtype=dtype, requires_grad=True, device=DEVICE),
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "deltas"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64], ids=SHORT.get)
@pytest.mark.parametrize("dtype", ALL, ids=SHORT.get)
def test_gradients_of_task_arithmetic(dtype, kind, with_base, normalize):
    base, tuned = make("gaussian", NUMEL, 4, dtype)
    base = base if with_base else None
    weight, lambda_ = coefficients(4, kind)
    grad = torch.randn(NUMEL, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    merged = pk.task_arithmetic(base, tuned, weight=weight, lambda_=lambda_, normalize=normalize)
    assert merged.dtype == dtype
    got = torch.autograd.grad(merged, [weight, lambda_], grad)
    leaves = [x.detach().double().requires_grad_() for x in (weight, lambda_)]
    wanted = torch.autograd.grad(formula(base, tuned, *leaves, normalize), leaves, grad.double())
    slack = allowed(base, tuned, weight.detach(), lambda_.detach(), normalize, grad)
    for g, want, room in zip(got, wanted, slack, strict=True):
        assert g.dtype == kind and g.shape == want.shape
        assert within(g, want, room)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float64])
def test_gradients_of_linear_merge(out_dtype, normalize):
    _, tuned = make("gaussian", NUMEL, 3, torch.bfloat16)
    weight, one = coefficients(3, torch.float32)[0], torch.tensor(1.0, device=DEVICE)
    merged = pk.linear_merge(tuned, weight, normalize=normalize, out_dtype=out_dtype)
    grad = torch.randn(NUMEL, generator=torch.Generator().manual_seed(2)).to(DEVICE, merged.dtype)
    [got] = torch.autograd.grad(merged, [weight], grad)
    leaf = weight.detach().double().requires_grad_()
    [wanted] = torch.autograd.grad(formula(None, tuned, leaf, one, normalize), [leaf], grad.double())
    assert within(got, wanted, allowed(None, tuned, weight.detach(), one, normalize, grad)[0])


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize):
    base, tuned = make("gaussian", 33, 3, torch.float64)
    weight, lambda_ = coefficients(3, torch.float64)
    every = torch.tensor(0.4, dtype=torch.float64, requires_grad=True, device=DEVICE)
    for call, inputs in (
        (lambda w: pk.linear_merge(tuned, w, normalize=normalize), (weight,)),
        (lambda w: pk.linear_merge(tuned, w, normalize=normalize), (every,)),
        (
            lambda w, x: pk.task_arithmetic(base, tuned, weight=w, lambda_=x, normalize=normalize),
            (weight, lambda_),
        ),
        (lambda x: pk.task_arithmetic(base, tuned, weight=[1.0, -2.0, 3.0], lambda_=x), (lambda_,)),
        (lambda x: pk.task_arithmetic(None, tuned, weight=0.5, lambda_=x, normalize=normalize), (lambda_,)),
    ):
        assert torch.autograd.gradcheck(call, inputs)


def test_one_pass_gives_every_gradient(monkeypatch):
    base, tuned = make("gaussian", NUMEL, 3, torch.bfloat16)
    weight, lambda_ = coefficients(3, torch.float32)
    merged = pk.task_arithmetic(base, tuned, weight=weight, lambda_=lambda_, normalize=True)
    asked, find = [], gradient.backends.call
    monkeypatch.setattr(gradient.backends, "call", lambda op, like: asked.append(op) or find(op, like))
    merged.backward(merged.detach())
    assert asked == ["dot_products"]


def test_gradients_are_the_same_bits_every_time():
    base, tuned = make("wide", NUMEL, 3, torch.float32)
    grads = []
    for _ in range(3):
        weight, lambda_ = coefficients(3, torch.float64)
        pk.task_arithmetic(base, tuned, weight=weight, lambda_=lambda_, normalize=True).sum().backward()
        grads.append(torch.cat([weight.grad, lambda_.grad[None]]))
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_a_model_of_weight_0_has_a_gradient_and_no_part():
    x, y = torch.tensor([3.0, 1.0], device=DEVICE), torch.tensor([5.0, math.nan], device=DEVICE)
    weight = torch.tensor([1.0, 0.0], requires_grad=True, device=DEVICE)
    merged = pk.linear_merge([x, y[:1].expand(2).contiguous()], weight, normalize=False)
    assert merged.tolist() == [3.0, 1.0]
    assert torch.autograd.grad(merged.sum(), [weight])[0].tolist() == [4.0, 10.0]
    lambda_ = torch.tensor(2.0, requires_grad=True, device=DEVICE)
    merged = pk.task_arithmetic(None, [x, y], weight=weight, lambda_=lambda_)
    by_weight, by_lambda = torch.autograd.grad(merged.sum(), [weight, lambda_])
    assert by_weight[0] == 8.0 and bool(by_weight[1].isnan()) and by_lambda == 4.0


def test_a_divisor_of_exactly_0_is_a_constant():
    x, y = torch.tensor([3.0], device=DEVICE), torch.tensor([5.0], device=DEVICE)
    weight = torch.tensor([1.0, -1.0], requires_grad=True, device=DEVICE)
    merged = pk.linear_merge([x, y], weight)
    assert merged.tolist() == [-2.0]
    assert torch.autograd.grad(merged.sum(), [weight])[0].tolist() == [3.0, 5.0]


def test_one_weight_for_all_has_one_gradient():
    base, tuned = make("integers", 100, 3, torch.float32)
    weight = torch.tensor(0.5, requires_grad=True, device=DEVICE)
    pk.task_arithmetic(base, tuned, weight=weight).sum().backward()
    assert weight.grad == sum((t - base).sum() for t in tuned)
    weight.grad = None
    pk.linear_merge(tuned, weight).sum().backward()  # an average does not change with the scale of weights
    assert abs(weight.grad) < 1e-4


def test_gradients_that_are_views_are_read_right():
    base, tuned = make("integers", 64, 2, torch.float32)
    weight = torch.tensor([1.0, 2.0], requires_grad=True, device=DEVICE)
    for grad in (
        torch.ones(1, device=DEVICE).expand(64),
        torch.arange(128.0, device=DEVICE)[::2],
        torch._neg_view(torch.arange(64.0, device=DEVICE)),
    ):
        merged = pk.task_arithmetic(base, tuned, weight=weight)
        [got] = torch.autograd.grad(merged, [weight], grad)
        assert got.tolist() == [float((grad.clone() * (t - base)).sum()) for t in tuned]


def test_inputs_get_no_gradient_and_no_graph_without_one():
    x = torch.ones(8, requires_grad=True, device=DEVICE)
    weight = torch.nn.Parameter(torch.ones(2, device=DEVICE))
    merged = pk.task_arithmetic(x, [x * 2, x * 3], weight=weight)
    assert merged.requires_grad
    assert torch.autograd.grad(merged.sum(), [x, weight], allow_unused=True)[0] is None
    with torch.no_grad():
        assert not pk.task_arithmetic(x, [x, x], weight=weight).requires_grad
        assert not pk.ties_merge(x, [x, x], density=0.5, weight=weight).requires_grad
        out = torch.empty(8, device=DEVICE)
        assert pk.linear_merge([x, x], weight, out=out) is out
    assert not pk.task_arithmetic(x, [x, x], weight=weight.detach()).requires_grad


def test_there_is_no_second_derivative():
    base, tuned = make("gaussian", 64, 2, torch.float32)
    weight = torch.tensor([1.0, 2.0], requires_grad=True, device=DEVICE)
    merged = pk.task_arithmetic(base, tuned, weight=weight)
    [grad] = torch.autograd.grad(merged.square().sum(), [weight], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative is defined"):
        grad.sum().backward()


def test_no_elements():
    empty = [torch.zeros(0, 3, device=DEVICE)] * 2
    weight = torch.tensor([1.0, 2.0], requires_grad=True, device=DEVICE)
    pk.linear_merge(empty, weight).sum().backward()
    assert weight.grad.tolist() == [0.0, 0.0]
