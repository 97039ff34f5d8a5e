"""CUDA's kernels of LoRA's linear layers: the CPU kernels' cases, with clusters of blocks and without.

Without a device they run emulated, where a block's share can be made small, so that clusters form,
and where blocks and threads run in reverse.
"""

from __future__ import annotations

import math
import re

import pytest
import torch

import pykernels as pk
from pykernels import backends
from pykernels.ref import lora_linear as ref
from pykernels.ref.lora_linear import Factors
from tests.bounds import assert_same_bits, assert_same_specials
from tests.cases import DTYPES, SHORT
from tests.cuda_layers import (
    ALL,
    DEALS,
    KEY,
    assert_near,
    backward,
    check,
    check_backward,
    check_forward,
    cuda,
    dealt,
    forward,
    nans,
    put,
)  # fmt: skip
from tests.lora_layers import kept_of, layer, spiked
from tests.walls import Walls
from tests.where import EMULATED

if backends.missing("cuda"):
    pytest.skip("no device, and no emulated kernels", allow_module_level=True)

HALF = round(0.4 * 65536)
SHAPES = [
    (1, 1, 1, "default"), (1, 129, 257, "clusters"), (16, 33, 31, "default"), (17, 8, 128, "no clusters"),
    (31, 32, 33, "clusters"), (33, 130, 65, "clusters"), (65, 24, 129, "default"), (5, 513, 24, "default"),
]  # fmt: skip
if not EMULATED:
    SHAPES += [(1, 4100, 4200, "default"), (8, 1024, 4096, "default"), (40, 2049, 24, "default")]
"""Sides of: tiles of products (8, 16), a chunk of columns (32), a tile of rows (32), draws (128), a block's
columns (512 in the gradients), staged rows (64); on a device clusters of eight, two and four blocks."""


@pytest.fixture(autouse=True)
def deal(request):
    """How work is dealt in a test that says so, put back afterwards."""
    if not EMULATED:
        yield
        return
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    dealt(given.get("where") or (given["shape"][3] if "shape" in given else "default"))
    yield
    dealt("default")
    cuda._cuda.reverse(False)
    cuda._cuda.warps(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_bound(shape, dtype):
    check(layer(*shape[:3], [1], dtype, bias=False))
    check(layer(*shape[:3], [17], dtype, low=torch.float32), HALF)


@pytest.mark.parametrize("rank", [2, 8, 16, 33, 64, 65, 129, 257, 512])
def test_any_rank(rank):
    check(layer(3 if rank < 257 else 18, 12, 20, [rank], torch.bfloat16), HALF)


@pytest.mark.parametrize("where", ["clusters"])
@pytest.mark.parametrize("rank", [256, 512])
def test_the_most_shared_memory_that_is_asked_for(rank, where):
    """Clusters of two: the fewer blocks, the more of the sum has each."""
    check(layer(2, 40, 60, [rank], torch.float32))


@pytest.mark.parametrize("ranks", [(33, 32), (80, 32)], ids=str)
def test_a_smaller_rank_has_room_for_the_sums_of_more_warps(ranks):
    c = layer(3, 20, 24, ranks, torch.bfloat16, grouped=True)
    check(c._replace(index=torch.tensor([1, 0, 1])))


def test_beyond_the_largest_rank_torch_serves():
    c = layer(3, 12, 20, [513], torch.bfloat16)
    out, h = forward(c, HALF)
    found = backward(c, h, HALF)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "lora_linear", cuda.lora_linear_torch.lora_linear)
        patch.setattr(cuda, "lora_linear_backward", cuda.lora_linear_torch.lora_linear_backward)
        wanted, low = forward(c, HALF)
        truth = backward(c, low, HALF)
    assert_same_bits(out, wanted)
    for got, want in zip(found, truth, strict=True):
        assert_same_bits(got.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("m", [1030, 2050])
def test_many_rows(m):
    """Tiles of 64 rows, chunks of 128; rows of x that begin anywhere among the draws."""
    check(layer(m, 9, 11, [3], torch.bfloat16), HALF)


@pytest.mark.parametrize("where", DEALS)
@pytest.mark.parametrize(
    ("m", "dtype"),
    [(1, DTYPES[1]), (2, DTYPES[0]), (32, DTYPES[1]), (33, DTYPES[2]), (150, DTYPES[1])],
    ids=str,
)
def test_each_row_its_adapter(m, dtype, where):
    check(layer(m, 50, 70, [4, 1, 33, 7], dtype, grouped=True, seed=m))


def test_more_adapters_than_travel_with_a_launch():
    for m in (20, 90):
        check(layer(m, 10, 30, [1, 3] * 20, torch.bfloat16, grouped=True))


def test_a_large_rank_leaves_no_room_for_many_rows():
    c = layer(20, 12, 20, [300, 2], torch.bfloat16, grouped=True)
    check(c._replace(index=torch.tensor([0] * 17 + [1, -1, 0])))


def test_adapters_without_rows_and_rows_without_adapters():
    c = layer(40, 20, 30, [3, 5, 2], torch.bfloat16, grouped=True)
    for m in (9, 40):
        few = c._replace(x=c.x[:m], grad=c.grad[:m])
        for index in ([-1] * m, [1] * m, [2, -1, 2, 2] + [0] * (m - 4)):
            check(few._replace(index=torch.tensor(index)))
        check(few._replace(adapters=[], index=torch.full((m,), -1)))


@pytest.mark.parametrize("m", [9, 40])
def test_what_names_no_adapter_becomes_nan(m):
    c = layer(m, 20, 30, [3, 5], torch.bfloat16, grouped=True)
    c.index[:4] = torch.tensor([2, -2, 2**40, -(2**62)])
    out, h = forward(c)
    by_x, _, *low = backward(c, h)
    rest = c._replace(x=c.x[4:], index=c.index[4:], grad=c.grad[4:])
    assert out[:4].isnan().all() and by_x[:4].isnan().all()
    check_forward(out[4:], rest, None)
    check_backward([by_x[4:], None, *low], rest, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize(("m", "ranks"), [(3, [5, 3]), (40, [17, 3])], ids=str)
@pytest.mark.skipif(not EMULATED, reason="only the emulation runs backwards or without clusters")
def test_bits_depend_neither_on_the_order_of_threads_nor_on_clusters(m, ranks, dtype):
    """Of few ranks every block of a cluster adds up all of low by itself."""
    c = layer(m, 70, 140, ranks, dtype, grouped=True)
    everything = []
    orders = (("clusters", False, False), ("clusters", True, True), ("no clusters", True, False))
    for where, reverse, warps in orders:
        dealt(where)
        cuda._cuda.reverse(reverse)
        cuda._cuda.warps(warps)  # one ahead of the others, so that a missing barrier shows
        out, h = forward(c, HALF)
        everything.append([out, *backward(c, h, HALF)])
    for other in everything[1:]:
        for i, (got, wanted) in enumerate(zip(other, everything[0], strict=True)):
            if i != 2:
                assert_same_bits(got, wanted)


@pytest.mark.parametrize("k", [128, 77])
def test_what_is_dropped_is_gone_and_only_that(k):
    c = layer(5, 30, k, [3], torch.bfloat16)
    kept = kept_of(c.x, HALF, KEY)
    x = torch.where(kept, c.x, math.nan)
    low = forward(c._replace(x=x), HALF)[1]
    assert_same_bits(low, forward(c, HALF)[1])
    zero = c._replace(weight=torch.zeros_like(c.weight))
    by_x, _, by_a, _ = backward(zero._replace(x=x), low, HALF)
    assert torch.equal(by_x.cpu() != 0, kept) and by_a.isfinite().all()
    assert bool((forward(c, 0)[1] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_what_is_not_finite_comes_out_as_in_float32_arithmetic(dtype):
    """Though numbers are multiplied in parts, and infinity times a part that is 0 is none of its products."""
    c = spiked(dtype, torch.float32)
    out, h = forward(c)
    assert_same_specials(h.cpu(), c.x.double() @ c.adapters[0].A.double().t())
    assert_same_specials(out.cpu(), ref.lora_linear(*c[:5], None))
    x, _, A, B = backward(c, h, ALL)
    truth = ref.lora_linear_backward(c.grad, *c[:4], None)
    for got, wanted in ((x, truth.x), (A, truth.A[0]), (B, truth.B[0])):
        assert_same_specials(got.cpu(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_any_strides(dtype):
    for m in (2, 20):
        c = layer(m, 30, 40, [5], dtype)
        h = forward(c, HALF)[1]
        wanted = backward(c, h, HALF)
        wide = nans(m, 80, dtype=dtype).cpu()
        wide[:, ::2] = c.x
        a, b, s = c.adapters[0]
        for x, turn in ((c.x.t().contiguous().t(), True), (wide[:, ::2], False)):
            low = [Factors(a.t().contiguous().t(), b.t().contiguous().t(), s)] if turn else c.adapters
            grad = c.grad.t().contiguous().t() if turn else c.grad
            other = c._replace(x=x, adapters=low, grad=grad, weight=c.weight.t().contiguous().t())
            got, other_h = forward(other, HALF)
            check_forward(got, c, kept_of(c.x, HALF, KEY))
            assert_same_bits(other_h, h)
            for one, truth in zip(backward(other, h, HALF)[2:], wanted[2:], strict=True):
                assert_same_bits(one, truth)


def test_special_values_come_through():
    c = layer(6, 40, 50, [3], torch.bfloat16)
    c.x[1, 7], c.x[2, 3], c.bias[5] = math.nan, math.inf, -math.inf
    out = forward(c)[0].cpu()
    assert out[1].isnan().all() and not out[2].isfinite().any()
    for row in (0, 3, 4, 5):
        assert out[row, 5] == -math.inf and out[row, :5].isfinite().all()


@pytest.mark.memory
@pytest.mark.skipif(not EMULATED, reason="walls stand in the host's memory")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("where", DEALS)
def test_nothing_outside_is_read_or_written(where, at_end):
    walls = Walls()

    def place(tensor):
        return walls.place(tensor.reshape(-1), at_end=at_end).view(tensor.shape)

    for m, n, k, dtype in (
        (2, 33, 41, torch.float16),
        (40, 33, 41, torch.bfloat16),
        (7, 64, 128, torch.bfloat16),
        (3, 44, 36, torch.float32),
    ):
        c = layer(m, n, k, [5, 3], dtype, grouped=True)
        inside = c._replace(
            x=place(c.x), bias=place(c.bias), grad=place(c.grad), index=place(c.index),
            adapters=[Factors(place(a.A), place(a.B), a.scaling) for a in c.adapters],
        )  # fmt: skip
        wanted, h = forward(c, HALF)
        out, low_out = place(nans(*wanted.shape, dtype=dtype)), place(torch.zeros_like(h))
        cuda.lora_linear(out, low_out, *inside[:5], HALF, KEY)
        assert_same_bits(out.clone(), wanted)
        found = [
            place(nans(*t.shape, dtype=dtype))
            for t in (c.x, *(a.A for a in c.adapters), *(a.B for a in c.adapters))
        ]
        given = (inside.grad, low_out, inside.x, inside.weight, inside.adapters, inside.index, HALF, KEY)
        cuda.lora_linear_backward(found[0], None, found[1:3], found[3:], *given)
        by_x, _, *low = backward(c, h, HALF)
        for got, want in zip(found, [by_x, *low], strict=True):
            assert_same_bits(got.clone(), want)


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.skipif(not EMULATED, reason="torch's own products want whole elements on a device")
def test_any_byte_alignment(shift):
    def moved(tensor):
        memory = torch.zeros(tensor.nbytes + 128, dtype=torch.uint8)
        start = -memory.data_ptr() % 64 + shift
        memory[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
        view = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start)
        return view.view(tensor.shape)

    for dtype in (torch.bfloat16, torch.float32):
        c = layer(3, 40, 136, [4], dtype)
        a, b, s = c.adapters[0]
        h = forward(c)[1]
        other = c._replace(
            x=moved(c.x), adapters=[Factors(moved(a), moved(b), s)], bias=moved(c.bias), grad=moved(c.grad)
        )
        got, low = forward(other)
        assert_same_bits(low, h)
        check_forward(got, c, None)
        for one, truth in zip(backward(other, h)[2:], backward(c, h)[2:], strict=True):
            assert_same_bits(one, truth)


@pytest.mark.parametrize("grouped", [False, True], ids=["one", "grouped"])
def test_through_the_ops(grouped):
    """Values, gradients, what is asked for alone, and any number of dimensions."""
    c = layer(6, 40, 60, [3, 8] if grouped else [8], torch.bfloat16, grouped=grouped)
    on = put(c)
    x, weight, bias = (t.clone().requires_grad_() for t in (on.x, on.weight, on.bias))
    low = [
        pk.LoRA(a.A.clone().requires_grad_(), a.B.clone().requires_grad_(), a.scaling) for a in on.adapters
    ]

    def call(x):
        if grouped:
            return pk.lora_linear_grouped(x, weight, low, on.index.view(x.shape[:-1]), bias=bias)
        return pk.lora_linear(x, weight, low[0].A, low[0].B, scaling=low[0].scaling, bias=bias)

    with pk.use_backend("cuda"):
        y = call(x)
        leaves = [x, weight, *(a.A for a in low), *(a.B for a in low)]
        found = torch.autograd.grad(y, leaves, on.grad, retain_graph=True)
        only = torch.autograd.grad(y, [low[0].A], on.grad, retain_graph=True)[0]
        with torch.no_grad():
            assert_same_bits(call(on.x.view(2, 3, 60)), y.detach().view(2, 3, 40))
    check_forward(y.detach(), c, None)
    check_backward(found, c, None)
    assert_near(found[1], c.grad.double().T @ c.x.double(), c.grad.double().abs().T @ c.x.double().abs(), 6)
    assert_same_bits(only, found[2])


@pytest.mark.skipif(EMULATED, reason="graphs are a device's")
@pytest.mark.parametrize("m", [32, 90])
def test_a_graph_replays_with_another_index(m):
    c = layer(m, 40, 64, [3, 8], torch.bfloat16, grouped=True)
    on = put(c)
    given = [pk.LoRA(*a) for a in on.adapters]

    def call():
        return pk.lora_linear_grouped(on.x, on.weight, given, on.index, bias=on.bias)

    with torch.cuda.stream(torch.cuda.Stream()):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    on.index.copy_(c.index.roll(5))
    graph.replay()
    check_forward(y, c._replace(index=c.index.roll(5)), None)


def test_a_failed_launch_names_op_shape_and_error(monkeypatch):
    class Refuses:
        def __init__(self, *given):
            pass

        def scratch(self, device):
            return 0

        def run(self, *given):
            raise RuntimeError("cudaErrorLaunchFailure: unspecified launch failure")

    monkeypatch.setattr(cuda._cuda, "LoraRows", Refuses)
    text = r"lora_linear: launch on .* torch.bfloat16 tensor of shape [3, 20] failed: cudaErrorLaunch"
    with pytest.raises(RuntimeError, match=re.escape(text).replace(r"\.\*", ".*")):
        forward(layer(3, 8, 20, [2], torch.bfloat16))
