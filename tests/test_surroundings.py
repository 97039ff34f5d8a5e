"""What is set around a call (default device and dtype, autocast, inference mode) changes none of its bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.func import grad, jacrev, vmap

import pykernels as pk
from tests.bounds import assert_same_bits

W, A, B, X = (torch.linspace(-1, 1, a * b).view(a, b).sin() for a, b in ((48, 64), (4, 64), (48, 4), (8, 64)))
BIAS, INDEX = W[:, 0].clone(), torch.tensor([0, -1, 1, 0, 1, 1, -1, 0])
LORAS = [pk.LoRA(A, B, 0.5), pk.LoRA(A[:2] * 2, B[:, :2], -0.3)]
DORA = [LORAS[0]._replace(magnitude=BIAS)]


def composed(method, **options):
    """A function of x that gives both factors of what two adapters make, x standing among them."""

    def run(x):
        first = LORAS[0]._replace(A=x[:4])
        made = pk.compose_lora([first, LORAS[0]], [0.7, 0.2], method=method, **options)
        return torch.cat([made.A.t(), made.B])

    return run


def learned(x):
    """The gradients of a merge."""
    with torch.inference_mode(False), torch.enable_grad():
        a = x[:4].clone().requires_grad_()
        return torch.autograd.grad(pk.merge_lora(W, [LORAS[0]._replace(A=a)]), a, W)[0]


OPS = {
    "softmax": pk.softmax,
    "softmax_sink": lambda x: pk.softmax(x, sink=1.0),
    "log_softmax": lambda x: pk.log_softmax(x, temperature=2.0),
    "logsumexp": pk.logsumexp,
    "linear_merge": lambda x: pk.linear_merge([x, -x], [0.3, 0.4]),
    "task_arithmetic": lambda x: pk.task_arithmetic(x, [x.sin()], lambda_=0.7),
    "ties_merge": lambda x: pk.ties_merge(x, [x.sin(), x.cos()], density=0.3),
    "dare_merge": lambda x: pk.dare_merge(x, [x.sin()], density=0.3, seed=1),
    "dare_merge_l1": lambda x: pk.dare_merge(x, [x.sin()], density=0.3, seed=1, rescale="l1"),
    "kth_magnitude": lambda x: pk.kth_magnitude(None, [x], 0.3),
    "kth_magnitude_all": lambda x: pk.kth_magnitude(None, [x], 1.0),
    "elect_sign": lambda x: pk.elect_sign([x, x.cos()]),
    "trim": lambda x: pk.trim(x, 0.3),
    "drop_rescale": lambda x: pk.drop_rescale(x, 0.3, seed=1, rescale="l1"),
    "lora_linear": lambda x: pk.lora_linear(x, W, A, B, scaling=0.5, bias=BIAS),
    "lora_linear_dropout": lambda x: pk.lora_linear(x, W, A, B, scaling=0.5, dropout=0.5, seed=3),
    "lora_linear_column_scale": lambda x: pk.lora_linear(x, W, A, B, scaling=0.5, column_scale=BIAS),
    "lora_linear_grouped": lambda x: pk.lora_linear_grouped(x, W, LORAS, INDEX, bias=BIAS),
    "merge_lora": lambda x: pk.merge_lora(W, [LORAS[0]._replace(A=x[:4])]),
    "merge_lora_dora": lambda x: pk.merge_lora(W, [DORA[0]._replace(A=x[:4])]),
    "dora_norm": lambda x: pk.dora_norm(W, x[:4], B, 0.5),
    "lora_xs": lambda x: pk.LoRA.xs(A, x[:4, :4], B).B,
}
HOST = {
    "merge_lora_peft": lambda x: pk.merge_lora(W, [LORAS[0]._replace(A=x[:4])], rounding="peft"),
    "merge_lora_gradient": learned,
    "cat": composed("cat"),
    "svd": composed("svd"),
    "ties": composed("ties", density=0.5),
    "peft_linear": composed("peft_linear"),
    "merge_state_dicts": lambda x: pk.merge_state_dicts(
        {"w": x}, [{"w": x.sin()}], method="ties", density=0.3, weight=0.7
    )["w"],
}
"""Those that ask their numbers on the host, so that no slice of a vmap can pass."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch.set_default_dtype for a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "device": lambda: torch.device("meta"),
    "dtype": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("op", [*OPS, *HOST])
def test_nothing_around_a_call_changes_its_bits(op, around):
    call = {**OPS, **HOST}[op]
    wanted = call(X)
    with AROUND[around]():
        got = call(X)
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("backend", ["torch", "ref"])
def test_autocast_reaches_no_backend_of_torchs_products(backend):
    x, index = X.repeat(16, 1), INDEX.repeat(16)
    a = A.clone().requires_grad_()
    for call in (
        lambda: pk.lora_linear(x, W, a, B, scaling=0.5, bias=BIAS),
        lambda: pk.lora_linear_grouped(x, W, [pk.LoRA(a, B, 0.5), LORAS[1]], index),
    ):
        found = []
        for enabled in (False, True):
            with pk.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = call()
                found.append((y.detach(), *torch.autograd.grad(y, a, torch.ones_like(y))))
        for got, wanted in zip(found[1], found[0], strict=True):
            assert_same_bits(got, wanted)


@pytest.mark.parametrize("op", OPS)
def test_vmap_calls_an_op_for_every_slice(op):
    batch = torch.stack([X, X.cos(), X.flip(0)])
    assert_same_bits(vmap(OPS[op])(batch), torch.stack([OPS[op](x) for x in batch]))


def test_vmap_of_a_gradient_and_over_nothing():
    batch = torch.stack([X, X.cos()])
    grads = []
    for run in (vmap(pk.softmax), pk.softmax):
        x = batch.clone().requires_grad_()
        grads += torch.autograd.grad(run(x).square().sum(), x)
    assert_same_bits(grads[0], grads[1])
    layer = OPS["lora_linear_dropout"]
    seeds = vmap(lambda x: pk.lora_linear(x, W, A, B, scaling=0.5, dropout=0.5), randomness="different")
    assert not torch.equal(*seeds(torch.stack([X, X]))) and torch.equal(*vmap(layer)(torch.stack([X, X])))
    with pytest.raises(NotImplementedError, match="softmax: vmap must go over at least one slice"):
        vmap(pk.softmax)(batch[:0])


@pytest.mark.parametrize("op", ["softmax", "logsumexp", "lora_linear", "lora_linear_grouped", "merge_lora"])
@pytest.mark.parametrize("transform", [grad, jacrev], ids=["grad", "jacrev"])
def test_gradients_of_torch_func_are_refused_by_name(op, transform):
    said = f"^{op.removesuffix('_grouped')}: torch.func.grad, vjp and jacrev are not supported"
    with pytest.raises(NotImplementedError, match=said):
        transform(lambda x: OPS[op](x).sum())(X)
    constant = grad(lambda s: (s * OPS[op](X)).sum())(torch.tensor(1.0))  # nothing of ours to derive
    torch.testing.assert_close(constant, OPS[op](X).sum())


def test_the_package_names_what_it_has():
    assert set(pk.__all__) <= set(dir(pk)) and all(callable(getattr(pk, name)) for name in pk.__all__)
    with pytest.raises(AttributeError, match="module 'pykernels' has no attribute 'slerp'"):
        pk.slerp  # noqa: B018
