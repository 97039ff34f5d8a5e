"""The operators of LoRA's linear layers: opcheck, whole graphs, and how often one is compiled anew."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import pykernels as pk
from tests.bounds import assert_same_bits
from tests.lora_layers import layer

pk.lora_linear  # noqa: B018  (a name's first use defines its operators)
OPS = torch.ops.pykernels


def arguments(dtype, *, grouped):
    """What the forward operator takes, with gradients wanted."""
    c = layer(5, 4, 6, [2, 3] if grouped else [2], dtype, grouped=grouped)
    a, b = (
        [t.clone().requires_grad_() for t in side] for side in zip(*(f[:2] for f in c.adapters), strict=True)
    )
    seed = None if grouped else torch.tensor(7)
    scaling = torch.tensor([f.scaling for f in c.adapters], dtype=torch.float64)
    x, weight, bias = (t.clone().requires_grad_() for t in (c.x, c.weight, c.bias))
    return c, (x, weight, a, b, scaling, c.index, bias, 65536 if grouped else 40000, seed)


@pytest.mark.parametrize("grouped", [False, True], ids=["one", "grouped"])
def test_opcheck(grouped):
    c, given = arguments(torch.bfloat16, grouped=grouped)
    opcheck(OPS.lora_linear.default, given)
    x, weight, a, b, scaling, index, _, threshold, seed = given
    h = OPS.lora_linear(*given)[1].detach()
    wants = [True, False, *[True] * (2 * len(a))]
    low = ([t.detach() for t in side] for side in (a, b))
    back = (c.grad, h, x.detach(), weight.detach(), *low, scaling, index, threshold, seed, wants)
    opcheck(OPS.lora_linear_backward.default, back)


def test_opcheck_of_the_norms():
    pk.dora_norm  # noqa: B018
    c = layer(1, 5, 6, [2], torch.bfloat16)
    opcheck(OPS.dora_norm.default, (c.weight, *c.adapters[0][:2], torch.tensor([0.5], dtype=torch.float64)))


def test_dora_in_one_graph():
    c = layer(5, 4, 6, [2], torch.float32)
    a, b = (t.clone().requires_grad_() for t in c.adapters[0][:2])
    m = torch.linspace(1, 2, 4, requires_grad=True)

    def run(x, scaling):
        scale = m / pk.dora_norm(c.weight, a, b, scaling)
        return pk.lora_linear(x, c.weight, a, b, scaling=scaling, column_scale=scale)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(run, fullgraph=True, backend=counter)
    for scaling in (0.5, 0.25, 2.0, 3.5):
        grads = [torch.autograd.grad(f(c.x, scaling), (a, b, m), c.grad) for f in (graph, run)]
        for got, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count <= 2


def test_whole_graphs_give_the_same_bits_and_gradients():
    c, (x, weight, a, b, _, index, bias, _, _) = arguments(torch.bfloat16, grouped=True)
    scale = torch.linspace(-1, 2, 4, requires_grad=True)
    leaves = [x, weight, *a, *b, bias, scale]

    def run(x, scaling):
        given = [pk.LoRA(*f, scaling) for f in zip(a, b, strict=True)]
        options = {"scaling": scaling, "bias": bias, "column_scale": scale}
        y = pk.lora_linear(x, weight, a[0], b[0], dropout=0.5, seed=9, **options)
        return y + pk.lora_linear_grouped(x, weight, given, index, bias=bias)

    torch._dynamo.reset()
    graph = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, wanted = graph(x, 0.5), run(x, 0.5)
    assert_same_bits(got, wanted)
    for one, other in zip(*(torch.autograd.grad(y, leaves, c.grad) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(one, other)


def test_one_compilation_more_per_quantity_and_one_for_size_one():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def run(x, weight, a, b, scaling):
        return pk.lora_linear(x, weight, a, b, scaling=scaling, dropout=0.1)

    def compiled(m=4, rank=3, scaling=0.5):
        c = layer(m, 6, 8, [rank], torch.float32)
        run(c.x, c.weight, *c.adapters[0][:2], scaling)
        return counter.frame_count

    assert compiled() == 1
    assert [compiled(scaling=s) for s in (0.25, 2.0, 3.5, 0.125)][-1] <= 2
    assert [compiled(rank=r) for r in (5, 8, 16, 7)][-1] <= 3
    assert [compiled(m=m) for m in (5, 8, 16, 7)][-1] <= 4
    assert compiled(m=1) <= 5 and compiled(rank=1) <= 6
