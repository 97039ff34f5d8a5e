"""merge_lora as an operator: gradients, opcheck, one graph without a break and few recompilations."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import pykernels as pk
from pykernels import LoRA
from tests.bounds import assert_same_bits
from tests.lora_cases import adapter, random, weight


def compiled(function, **options):
    """``function`` as one graph without a break."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("fan", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("rounding", ["once", "peft"])
def test_gradients(fan, rounding):
    def merge(w, A, B, C, D):
        return pk.merge_lora(w, [LoRA(A, B, 0.7), LoRA(C, D, -2)], fan_in_fan_out=fan, rounding=rounding)

    shapes = ((7, 5) if fan else (5, 7), (2, 7), (5, 2), (3, 7), (5, 3))
    leaves = [random(*s, seed=i).double().requires_grad_() for i, s in enumerate(shapes)]
    assert torch.autograd.gradcheck(merge, leaves)


def test_gradients_have_the_dtypes_of_what_learns():
    w, a = weight(8, 9, torch.bfloat16), adapter(8, 9, 2, 0)
    A, B = a.A.clone().requires_grad_(), a.B.clone().requires_grad_()
    out = pk.merge_lora(w, [LoRA(A, B, a.scaling)])
    assert_same_bits(out.detach(), pk.merge_lora(w, [a]))
    grad = random(8, 9, seed=3, dtype=torch.bfloat16)
    by_A, by_B = torch.autograd.grad(out, (A, B), grad)
    torch.testing.assert_close(by_A, a.scaling * (a.B.t() @ grad.float()))
    torch.testing.assert_close(by_B, a.scaling * (grad.float() @ a.A.t()))
    with torch.no_grad():
        pk.merge_lora(w, [LoRA(A, B, a.scaling, torch.ones(8))], out=w)


def test_opcheck():
    w, plain, dora = weight(6, 9, torch.bfloat16), adapter(6, 9, 2, 0), adapter(6, 9, 3, 10, dora=True)
    learned = plain.A.clone().requires_grad_()
    pk.merge_lora(w, [plain])  # an operator is there once its op has been used
    op, rules = torch.ops.pykernels.merge_lora, {"fan_in_fan_out": False, "rounding": "once"}
    half, both = torch.tensor([0.5]).double(), torch.tensor([0.5, 2.0]).double()
    one, two = ([plain.A], [plain.B], half), ([plain.A, dora.A], [plain.B, dora.B], both)
    torch.library.opcheck(op.default, (w, *two, [dora.magnitude], [1]), rules)
    torch.library.opcheck(op.default, (w, [learned], [plain.B], half, [], []), rules)
    turned = {"fan_in_fan_out": True, "rounding": "peft"}
    torch.library.opcheck(op.out, (w.t().contiguous(), *one, [], []), turned | {"out": w.t().contiguous()})


def test_one_graph_gives_the_same_bits():
    w, adapters = weight(20, 30, torch.bfloat16), [adapter(20, 30, 2, 0, dora=True), adapter(20, 30, 3, 10)]

    def merge(w, adapters):
        return pk.merge_lora(w * 1, adapters, rounding="once") + 0

    assert_same_bits(compiled(merge)(w, adapters), pk.merge_lora(w, adapters) + 0)
    out = torch.empty_like(w)
    assert compiled(lambda w, a, o: pk.merge_lora(w, a, out=o))(w, adapters, out) is out
    assert_same_bits(out, pk.merge_lora(w, adapters))


@pytest.mark.parametrize("vary", ["scaling", "rank", "rows"])
def test_what_varies_recompiles_once(vary):
    frames = CompileCounterWithBackend("aot_eager")  # "eager" leaves out what compiles numbers in
    torch._dynamo.reset()
    graph = torch.compile(
        lambda w, A, B, s: pk.merge_lora(w, [LoRA(A, B, s)]), fullgraph=True, backend=frames
    )
    for i in range(2, 7):
        rows, rank = (10 + i if vary == "rows" else 10), (i if vary == "rank" else 4)
        w, a = weight(rows, 12, torch.float32), adapter(rows, 12, rank, 0)
        s = 0.1 * i if vary == "scaling" else 0.5
        assert_same_bits(graph(w, a.A, a.B, s), pk.merge_lora(w, [a._replace(scaling=s)]))
    assert frames.frame_count <= 2


def test_a_graph_is_refused_with_the_words_of_the_door():
    w, a = weight(4, 6, torch.float32), adapter(4, 6, 2, 0)
    with pytest.raises(Exception, match=r"adapters\[0\].A must have shape \[r, 4\]"):
        compiled(lambda w, a: pk.merge_lora(w, [a], fan_in_fan_out=True))(w, a)
    with pytest.raises(Exception, match="rounding must be one of 'once', 'peft', got 'twice'"):
        compiled(lambda w, a: pk.merge_lora(w, [a], rounding="twice"))(w, a)
