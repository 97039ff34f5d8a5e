"""merge_lora and the norms of adapted weights on CUDA: the CPU's table of tests, beside edges of its tiles.

Without a device the kernels run emulated. There blocks can be given little shared memory, so that factors go
in chunks, and many multiprocessors, so that a block has one tile and no second.
"""

from __future__ import annotations

import math

import pytest
import torch

import pykernels as pk
from pykernels import LoRA, backends, grouping
from pykernels.ref.rounding import NAN, round_once
from tests.bounds import U, assert_same_bits, assert_same_specials
from tests.cases import DTYPES, SHORT
from tests.lora_cases import adapter, assert_merged, cut_of, random, split, truth, weight
from tests.lora_layers import spiked
from tests.test_merge_lora import several
from tests.walls import Walls
from tests.where import DEVICE, EMULATED, there

merge_lora_cuda = pytest.importorskip("pykernels.merge_lora_cuda", exc_type=ImportError)
if why := backends.missing("cuda"):
    pytest.skip(why, allow_module_level=True)

ROOMS = {"least": (27 << 10, 1), "many": (227 << 10, 1000)}
"""Bytes of shared memory that a block may have, for 3 slots of factors or 36, and multiprocessors."""
DEFAULT = (227 << 10, 1)

SHAPES = [
    (1, 1, (1,)), (31, 7, (15,)), (32, 8, (16,)), (33, 9, (17,)), (63, 31, (2, 1)), (64, 33, (32,)),
    (65, 127, (33,)), (129, 128, (8, 16)), (40, 129, (5,)), (130, 137, (7, 9)), (5, 257, (4, 1, 3)),
    (9, 16, (512,)), (70, 24, (300, 290)),
]  # fmt: skip
"""Rows and columns beside what lanes (8), warps (32) and tiles (64, 128) take, ranks beside 16; the last two
lie in shared memory at once in bf16, and in chunks."""


@pytest.fixture(autouse=True)
def room(request):
    """The device that a test names, put back afterwards."""
    name = request.node.callspec.params.get("where", "") if hasattr(request.node, "callspec") else ""
    if EMULATED:
        merge_lora_cuda._cuda.lora_room(*ROOMS.get(name, DEFAULT))
    yield
    if EMULATED:
        merge_lora_cuda._cuda.lora_room(*DEFAULT)


def on_device(adapters: list[LoRA]) -> list[LoRA]:
    return [LoRA(there(a.A), there(a.B), a.scaling, there(a.magnitude)) for a in adapters]


def run(w: torch.Tensor, adapters: list[LoRA], fan_in_fan_out: bool = False, dtype=None) -> torch.Tensor:
    """The kernel's result; ``out`` starts as NaN."""
    out = torch.full(w.shape, math.nan, dtype=dtype or w.dtype, device=DEVICE)
    merge_lora_cuda.merge_lora(out, there(w), *split(on_device(adapters)), fan_in_fan_out)
    return out.cpu()


def assert_right(w: torch.Tensor, adapters: list[LoRA], fan_in_fan_out: bool = False) -> torch.Tensor:
    out = run(w, adapters, fan_in_fan_out)
    assert_merged(out, w, adapters, fan_in_fan_out, cut_of(adapters))
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}-r{'+'.join(map(str, s[2]))}")
def test_merges_within_the_bound(shape):
    """Every dtype of weights and factors and both orientations, in turn."""
    rows, cols, ranks = shape
    for i, dtype in enumerate(DTYPES):
        fan, kind = (i + rows) % 2 == 1, DTYPES[(i + cols) % 3]
        out, into = (cols, rows) if fan else (rows, cols)
        assert_right(weight(out, into, dtype, fan_in_fan_out=fan), several(out, into, ranks, dtype=kind), fan)


@pytest.mark.parametrize("b", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("a", DTYPES, ids=SHORT.get)
def test_factors_of_any_dtypes(a, b):
    for dtype in (torch.float32, torch.bfloat16):
        adapters = [x._replace(A=x.A.to(a), B=x.B.to(b)) for x in several(35, 40, (3, 18))]
        assert_right(weight(35, 40, dtype), [*adapters, *several(35, 40, (2,))])


@pytest.mark.skipif(not EMULATED, reason="a device's rooms are its own")
@pytest.mark.parametrize("where", ROOMS)
def test_no_bit_depends_on_the_device(where):
    """Chunks or not, one tile to a block or several."""
    w, adapters = weight(130, 140, torch.bfloat16), several(130, 140, (20, 5), dora=True)
    got = assert_right(w, adapters)
    merge_lora_cuda._cuda.lora_room(*DEFAULT)
    assert_same_bits(run(w, adapters), got)


@pytest.mark.skipif(not EMULATED, reason="racecheck is the sanitizer's (bench/device.sh)")
@pytest.mark.parametrize("order", ["warps", "reverse"])
@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
def test_no_bit_depends_on_which_warp_or_block_is_ahead(order, by_column):
    """Without any of the barriers a warp that is ahead reads too early, or writes over what others read."""
    out, into = (140, 200) if by_column else (200, 140)
    w = weight(out, into, torch.bfloat16, fan_in_fan_out=by_column)
    adapters = several(out, into, (20, 5), dtype=torch.bfloat16, dora=True)
    got = assert_right(w, adapters, by_column)
    try:
        getattr(merge_lora_cuda._cuda, order)(True)
        assert_same_bits(run(w, adapters, by_column), got)
    finally:
        getattr(merge_lora_cuda._cuda, order)(False)


@pytest.mark.parametrize("fan", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("order", ["D", "DL", "LD", "LDLD"])
def test_magnitudes(order, fan):
    dtype = DTYPES[len(order) % 3]
    rows, cols = (70, 140) if order == "LD" else (35, 40)
    out, into = (cols, rows) if fan else (rows, cols)
    adapters = [adapter(out, into, 3 + i, 10 * i, dora=kind == "D") for i, kind in enumerate(order)]
    assert_right(weight(out, into, dtype, fan_in_fan_out=fan), adapters, fan)


@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", [(1, 1), (65, 129), (130, 257)], ids=str)
def test_norms(shape, by_column):
    for dtype in DTYPES:
        out, into = shape[::-1] if by_column else shape
        w, [a] = weight(out, into, dtype, fan_in_fan_out=by_column), several(out, into, (5,))
        got = merge_lora_cuda.norms(there(w), there(a.A), there(a.B), a.scaling, by_column).cpu()
        start = (w.t() if by_column else w).double()
        exact = (start + a.scaling * (a.B.double() @ a.A.double())).norm(dim=1)
        most = (start.abs() + abs(a.scaling) * (a.B.double().abs() @ a.A.double().abs())).norm(dim=1)
        assert bool(((got - exact).abs() <= (8 * U + cut_of([a])) * most).all())


def test_empty_weights_and_norms():
    for shape in ((0, 4), (4, 0)):
        w, [a] = torch.empty(shape), [LoRA(torch.ones(1, shape[1]), torch.ones(shape[0], 1), 1.0)]
        assert run(w, [a]).shape == shape
        for by_column in (False, True):
            turned = LoRA(a.B.t(), a.A.t(), 1.0) if by_column else a
            norms = merge_lora_cuda.norms(there(w), there(turned.A), there(turned.B), 1.0, by_column)
            assert norms.shape == (shape[by_column],) and not norms.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=SHORT.get)
@pytest.mark.parametrize("count", [1, 8])
def test_nearly_all_elements_are_rounded_right_whatever_the_number_of_adapters(count, dtype):
    w, sigma = weight(128, 512, dtype), 0.02
    adapters = [
        LoRA(random(16, 512, seed=i, size=sigma), random(128, 16, seed=i + 50, size=sigma), 2.0)
        for i in range(count)
    ]
    merged, exact = run(w, adapters), truth(w, adapters)
    best = round_once(exact, dtype)
    assert float((merged != best).double().mean()) <= 1e-4 * (8 if dtype == torch.float16 else 1)
    ratio = (merged.double() - exact).abs().mean() / (best.double() - exact).abs().mean()
    assert float(ratio) < 1.00001


def placed(tensor: torch.Tensor, start: int) -> torch.Tensor:
    """A copy that begins ``start`` bytes after a multiple of 16."""
    room = torch.empty(tensor.numel() * tensor.element_size() + 16, dtype=torch.uint8)
    copy = torch.frombuffer(room.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return copy.view(tensor.shape).copy_(tensor)


@pytest.mark.skipif(not EMULATED, reason="torch has no such views on a device")
@pytest.mark.parametrize("start", [1, 2, 4, 8])
def test_any_alignment(start):
    for dtype in DTYPES:
        w, adapters = weight(34, 48, dtype), several(34, 48, (16, 3), dtype=dtype)
        wanted = run(w, adapters)
        moved = [a._replace(A=placed(a.A, start), B=placed(a.B, start)) for a in adapters]
        in_place = placed(w, start)
        merge_lora_cuda.merge_lora(in_place, in_place, *split(moved), False)
        assert_same_bits(in_place, wanted)


def test_rows_of_a_weight_and_strided_factors_are_taken_as_they_are():
    w, [a] = weight(70, 50, torch.bfloat16), several(70, 50, (20,), dtype=torch.bfloat16)
    strided = LoRA(a.A.t().contiguous().t(), torch.stack([a.B, a.B], -1)[..., 0], a.scaling)
    whole = run(w, [a])
    assert_same_bits(run(w, [strided]), whole)
    for rows in (slice(0, 3), slice(3, 70)):
        assert_same_bits(run(w[rows], [a._replace(B=a.B[rows])]), whole[rows])


@pytest.mark.memory
@pytest.mark.skipif(not EMULATED, reason="compute-sanitizer watches the device's memory (bench/device.sh)")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_nothing_outside_is_touched(at_end):
    for rows, cols, ranks, dtype in (
        (1, 3, (1,), torch.bfloat16), (65, 129, (17,), torch.float32), (33, 40, (16, 5), torch.float16)
    ):  # fmt: skip
        for fan in (False, True):
            walls, (out, into) = Walls(), (cols, rows) if fan else (rows, cols)
            w, adapters = weight(out, into, dtype, fan_in_fan_out=fan), several(out, into, ranks, dtype=dtype)
            adapters += several(out, into, (3,), dora=True)
            wanted = run(w, adapters, fan)

            def put(x, walls=walls):
                return None if x is None else walls.place(x, at_end=at_end)

            got, inside = put(torch.full(w.shape, math.nan, dtype=dtype).view(-1)), put(w.view(-1))
            moved = [LoRA(put(a.A.view(-1)).view(a.A.shape), put(a.B.view(-1)).view(a.B.shape), a.scaling,
                          put(a.magnitude)) for a in adapters]  # fmt: skip
            merge_lora_cuda.merge_lora(got.view(w.shape), inside.view(w.shape), *split(moved), fan)
            assert_same_bits(got.view(w.shape).clone(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_special_values(dtype):
    w = weight(8, 20, dtype)
    w[1, 2], w[3, 4], w[5, 6] = math.nan, math.inf, -math.inf
    a = adapter(8, 20, 2, 0)
    out = run(w, [a])
    bits, canonical = NAN[dtype]
    assert int(out.isnan().sum()) == 1 and int(out.view(bits)[1, 2]) == canonical
    assert out[3, 4] == math.inf and out[5, 6] == -math.inf
    a.A[1, 7] = math.inf
    assert not bool(run(w, [a])[:, 7].isfinite().any())
    zero = LoRA(torch.ones(2, 20), a.B * 0, 1.0, torch.ones(8))
    assert bool(run(w * 0, [zero]).isnan().any())


@pytest.mark.parametrize("low", DTYPES, ids=SHORT.get)
def test_what_is_not_finite_comes_out_as_in_float32_arithmetic(low):
    """Beside factors of each dtype, whose remainders are 0 here."""
    c = spiked(torch.bfloat16, low)
    [f] = c.adapters
    for other in DTYPES:
        adapters = [LoRA(f.A, f.B.to(other), 0.5)]
        assert_same_specials(run(c.weight, adapters), truth(c.weight, adapters))
        turned = [LoRA(f.B.t(), f.A.t().to(other), 0.5)]
        assert_same_specials(run(c.weight, turned, True), truth(c.weight, turned, True))


def test_out_of_another_dtype():
    w, adapters = weight(30, 50, torch.bfloat16), several(30, 50, (3,))
    wide = run(w, adapters, dtype=torch.float32)
    assert_same_bits(run(w, adapters, dtype=torch.float64), wide.double())
    assert_same_bits(run(w, adapters), wide.to(torch.bfloat16))
    assert_same_bits(run(w, adapters, dtype=torch.float16), wide.to(torch.float16))


@pytest.mark.parametrize("count", [2, 33])
def test_a_group_is_one_launch_and_gives_what_single_ones_give(count, monkeypatch):
    """More layers than a warp looks at at once; the first has more ranks than travel with a launch."""
    shapes = [(9, 12, (512, 300)), *((3 + i % 4, 5 + i, (1 + i % 18,)) for i in range(count - 1))]
    layers = [(weight(o, i, torch.bfloat16), several(o, i, r, dtype=torch.bfloat16)) for o, i, r in shapes]
    wanted = [run(w, adapters) for w, adapters in layers]
    launches, launch = [], merge_lora_cuda._cuda.merge_lora
    monkeypatch.setattr(merge_lora_cuda._cuda, "merge_lora", lambda *a: (launches.append(a), launch(*a)))
    outs = [torch.full_like(there(w), math.nan) for w, _ in layers]
    with pk.use_backend("cuda"), grouping.grouped():
        for (w, adapters), out in zip(layers, outs, strict=True):
            pk.merge_lora(there(w), on_device(adapters), out=out)
        assert not launches and all(bool(out.isnan().all()) for out in outs)
    assert len(launches) == 1
    for out, want in zip(outs, wanted, strict=True):
        assert_same_bits(out.cpu(), want)


def test_the_op_and_the_norm_choose_the_backend():
    w, adapters = weight(40, 60, torch.bfloat16), several(40, 60, (4, 2), dora=True)
    a = on_device(adapters)[0]
    with pk.use_backend("cuda"):
        assert_same_bits(pk.merge_lora(there(w), on_device(adapters)).cpu(), run(w, adapters))
        norm = pk.dora_norm(there(w), a.A, a.B, a.scaling)
        assert_same_bits(pk.dora_norm(torch._neg_view(there(-w)), a.A, a.B, a.scaling), norm)
    assert_same_bits(norm, merge_lora_cuda.norms(there(w), a.A, a.B, a.scaling).float())
    torch.testing.assert_close(norm.cpu(), pk.dora_norm(w, *adapters[0][:3]))


def test_a_launch_that_fails_says_what_it_was_for(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("out of patience")

    monkeypatch.setattr(merge_lora_cuda._cuda, "merge_lora", refuse)
    with pytest.raises(
        RuntimeError, match=r"merge_lora: launch on .* weights of shape \[3, 4\] failed: out of"
    ):
        run(weight(3, 4, torch.float32), several(3, 4, (1,)))
