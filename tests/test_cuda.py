"""CUDA kernels against the truth and the CPU's bits: on a device where there is one, else emulated."""

from __future__ import annotations

import math

import pytest
import torch

import pykernels as pk
from pykernels import cuda, grouping, native
from pykernels.cut import KEEP_ALL_EQUALS, Cut
from pykernels.ref.dot_products import dot_products
from pykernels.ref.drop_rescale import dropped
from pykernels.ref.elect_sign import elect_sign
from pykernels.ref.l1_norms import l1_norms
from pykernels.ref.magnitude_histogram import magnitude_histogram
from pykernels.ref.rounding import NAN, round_once
from pykernels.ref.trim import trim
from tests import cases
from tests.bounds import assert_same_bits, assert_within
from tests.cases import DATA, DTYPES, EDGES, SHORT, Case, make, one_nan, weights
from tests.test_kernels import edges, truth
from tests.walls import Walls

DEVICE = torch.device(cuda._cuda.memory())
EMULATED = DEVICE.type == "cpu"


def there(value):
    """Tensors, and lists of them, where the kernels find them."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
        return [there(v) for v in value]
    return value


def run(case: Case) -> torch.Tensor:
    """The result of the CUDA kernel; ``out`` starts as NaN."""
    out = torch.full((case.numel,), math.nan, dtype=case.out_dtype or case.dtype, device=DEVICE)
    getattr(cuda, case.op)(out, *map(there, case.arguments()))
    return out.cpu()


def on_cpu(case: Case) -> torch.Tensor:
    """The result of the CPU kernel."""
    out = torch.full((case.numel,), math.nan, dtype=case.out_dtype or case.dtype)
    getattr(native, case.op)(out, *case.arguments())
    return out


@pytest.mark.parametrize("case", cases.table() + cases.large(), ids=str)
def test_merges(case):
    out = run(case)
    assert_within(out, *truth(case))
    assert_same_bits(out, on_cpu(case))
    if out.dtype in DTYPES:
        nan = out.isnan()
        bits, canonical = NAN[out.dtype]
        assert bool((out.view(bits)[nan] == canonical).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=SHORT.get)
def test_rounding_and_reading_of_16_bit_values(dtype):
    values = torch.cat([edges(dtype), -edges(dtype)])
    out = torch.zeros(len(values), dtype=dtype, device=DEVICE)
    cuda.linear_merge(out, None, [there(values)], [1.0])
    assert_same_bits(out.cpu(), round_once(values.double() + 0.0, dtype))
    values = torch.arange(65536).to(torch.int16).view(dtype)
    out = torch.zeros(65536, device=DEVICE)
    cuda.linear_merge(out, None, [there(values)], [1.0])
    assert_same_bits(out.cpu(), round_once(values.double() + 0.0, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("tie", ["index", "keep"])
def test_trim_keeps_the_same_entries(data, dtype, tie):
    case = Case("ties_merge", data, models=1, dtype=dtype, with_base=False, tie=tie, numel=4999)
    [d] = case.inputs()[1]
    out = there(torch.full_like(d, math.nan))
    cuda.trim(out, there(d), case.cut())
    assert torch.equal(out.cpu().nan_to_num(9), trim(d, case.cut()).to(dtype).nan_to_num(9))


@pytest.mark.parametrize("numel", EDGES)
def test_drop_keeps_the_same_entries(numel):
    dtype = DTYPES[numel % 3]
    d = torch.ones(numel, dtype=dtype)
    out = there(torch.full_like(d, math.nan))
    cuda.drop_rescale(out, there(d), 30000, 2**63 + 12345, 2.0, 2**36 + 4096)
    assert torch.equal(out.cpu(), 2 * dropped(d, 30000, 0, 2**63 + 12345, 2**36 + 4096))


@pytest.mark.parametrize("case", [c for c in cases.table() if c.op == "dare_merge"], ids=str)
def test_l1_norms_are_the_same_bits(case):
    base, tuned = case.inputs()
    masks = case.masks()
    got = cuda.l1_norms(there(base), there(tuned), *masks, case.offset).cpu()
    wanted = l1_norms(base, tuned, *masks, case.offset)
    assert torch.equal(got.nan_to_num(-1), wanted.nan_to_num(-1)) and got.shape == wanted.shape


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", [c for c in cases.table() if c.op == "linear_merge"], ids=str)
def test_dot_products_are_the_same_bits(case, grad_dtype):
    base, tuned = case.inputs()
    grad = make("wide", case.numel, 1, grad_dtype)[1][0]
    got = cuda.dot_products(there(grad), there(base), there(tuned)).cpu()
    wanted = dot_products(grad, base, tuned)
    assert torch.equal(got.nan_to_num(-1), wanted.nan_to_num(-1)) and got.shape == wanted.shape


@pytest.mark.parametrize("elect", ["weighted", "plain"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_elected_signs_are_equal(dtype, data, elect):
    base, tuned = make(data, 4999, 5, dtype)
    deltas = [t - base for t in tuned]
    out = torch.zeros(4999, dtype=torch.int8, device=DEVICE)
    cuda.elect_sign(out, there(deltas), weights(5), elect)
    assert torch.equal(out.cpu(), elect_sign(deltas, weights(5), elect).to(torch.int8))


@pytest.mark.parametrize(("shift", "known"), [(16, False), (0, True)])
@pytest.mark.parametrize("data", ["gaussian", "ties", "special", "zeros"])
def test_histograms_are_equal(data, shift, known):
    base, tuned = one_nan(*make(data, 4999, 3, torch.bfloat16))
    prefix = [0x3A00, 0, 0x3C80] if known else None
    got = cuda.magnitude_histogram(there(base), there(tuned), shift, prefix)
    assert torch.equal(got.cpu(), magnitude_histogram(base, tuned, shift, prefix))


def test_numbers_on_the_device_equal_numbers_of_the_host():
    for case in (
        Case("linear_merge"),
        Case("ties_merge"),
        Case("dare_merge", elect="plain", normalize=False),
    ):
        arguments = [there(a) for a in case.arguments()]
        lists = [
            torch.tensor(a, device=DEVICE) if isinstance(a, list) and isinstance(a[0], float) else a
            for a in arguments
        ]
        if case.op != "linear_merge":
            [place] = [i for i, a in enumerate(lists) if isinstance(a, float)]
            lists[place] = torch.tensor(case.lambda_, device=DEVICE)
        out, wanted = (torch.full((case.numel,), math.nan, dtype=case.dtype, device=DEVICE) for _ in "ab")
        getattr(cuda, case.op)(wanted, *arguments)
        getattr(cuda, case.op)(out, *lists)
        assert_same_bits(out.cpu(), wanted.cpu())


def test_a_weight_of_0_on_the_device_takes_no_part():
    base, tuned = (there(x) for x in make("gaussian", 5000, 3, torch.float32))
    poison = [tuned[0], torch.full_like(base, math.nan), tuned[2]]
    weight, rest = torch.tensor([0.5, 0.0, 2.0], device=DEVICE), [tuned[0], tuned[2]]
    out, wanted = torch.empty_like(base), torch.empty_like(base)
    for elect, vote in ((None, None), ("weighted", None), ("plain", [1.0] * 3)):
        share = [1.0] * 3 if elect else None
        two = (vote and vote[:2], share and share[:2])
        cuda.ties_fused(out, base, poison, [500] * 3, "index", weight, vote, share, 1.0, elect)
        cuda.ties_fused(wanted, base, rest, [500] * 2, "index", [0.5, 2.0], *two, 1.0, elect)
        assert_same_bits(out.cpu(), wanted.cpu())
        cuda.dare_merge(out, base, poison, [30000] * 3, [0, 1, 2], 7, weight, vote, share, 1.0, elect)
        cuda.dare_merge(wanted, base, rest, [30000] * 2, [0, 2], 7, [0.5, 2.0], *two, 1.0, elect)
        assert_same_bits(out.cpu(), wanted.cpu())
    cuda.linear_merge(out, None, poison, weight)
    cuda.linear_merge(wanted, None, rest, [0.5, 2.0])
    assert_same_bits(out.cpu(), wanted.cpu())


@pytest.mark.parametrize("op", ["linear_merge", "ties_merge", "dare_merge"])
def test_results_over_an_input(op):
    case = Case(op, dtype=torch.float32, numel=70_001)
    arguments = [there(a) for a in case.arguments()]
    for place in (arguments[0], arguments[1][1]):
        fresh = [[t.clone() for t in a] if isinstance(a, list) and isinstance(a[0], torch.Tensor) else a
                 for a in arguments]  # fmt: skip
        fresh[0] = arguments[0].clone()
        out = fresh[0] if place is arguments[0] else fresh[1][1]
        getattr(cuda, op)(out, *fresh)
        assert_same_bits(out.cpu(), on_cpu(case))


def test_a_trimmed_nan_still_reaches_the_result():
    for dtype in DTYPES:
        base, nan = torch.zeros(300, dtype=dtype), torch.arange(300) % 7 == 0
        tuned = [torch.full((300,), float(m + 1), dtype=dtype).masked_fill(nan & (m == 1), math.nan)
                 for m in range(3)]  # fmt: skip
        out = there(base.clone())
        for elect, vote in (("weighted", None), ("plain", [1.0] * 3), (None, None)):
            rest = ([1.0] * 3, vote, None, 1.0, elect)
            cuda.ties_merge(out, there(base), there(tuned), Cut([0xFFFFFFFF] * 3, [-1] * 3), *rest)
            assert bool((out.cpu().isnan() == nan).all()) and not out.cpu()[~nan].any()
            cuda.dare_merge(out, there(base), there(tuned), [0] * 3, [0, 1, 2], 5, *rest)
            assert bool((out.cpu().isnan() == nan).all()) and not out.cpu()[~nan].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("start", [1, 2, 4, 6, 8])
def test_any_alignment(start, dtype):
    """Tensors that begin ``start`` bytes into 16, down to bytes: the same bits."""

    room = [torch.zeros(8323 * 4 + 64, dtype=torch.uint8, device=DEVICE) for _ in range(5)]

    def place(x: torch.Tensor, i: int) -> torch.Tensor:
        nbytes = x.numel() * x.element_size()
        at = start if start % x.element_size() == 0 or EMULATED else x.element_size()
        raw = room[i][at : at + nbytes]
        raw.copy_(there(x).view(torch.uint8))
        if at % x.element_size():  # torch offers no such view on tensors of its own
            return torch.frombuffer(room[i].numpy(), dtype=x.dtype, count=x.numel(), offset=at)
        return raw.view(x.dtype)

    for op in ("linear_merge", "ties_merge", "dare_merge"):
        case = Case(op, numel=8323, dtype=dtype)
        base, tuned, *rest = case.arguments()
        out = place(torch.full((8323,), math.nan, dtype=dtype), 4)
        getattr(cuda, op)(out, place(base, 0), [place(t, i + 1) for i, t in enumerate(tuned)], *rest)
        assert_same_bits(out.cpu().clone(), on_cpu(case))


def every_kernel(kernels, numel, dtype, place):
    """Every function that both modules have, on inputs and outputs put where ``place`` says."""
    base, tuned = make("ties", numel, 2, dtype)
    base, tuned = place(base), [place(t) for t in tuned]
    weight, masks, k = weights(2), ([30_000] * 2, [0, 5], 99), [numel // 3, numel // 2]
    outs = [place(torch.full((numel,), math.nan, dtype=dtype)) for _ in range(4)]
    signs = place(torch.full((numel,), 77, dtype=torch.int8))
    kernels.linear_merge(outs[0], base, tuned, weight)
    cut = Cut([0x3D000000] * 2, [numel // 2, -1])
    kernels.ties_merge(outs[1], base, tuned, cut, weight, None, weight, 1.0, "weighted")
    kernels.ties_fused(outs[2], base, tuned, k, "index", weight, [1.0, 1.0], None, 1.0, "plain")
    kernels.dare_merge(outs[3], base, tuned, *masks, weight, None, weight, 1.0, "weighted", 4096)
    kernels.elect_sign(signs, tuned, weight, "weighted")
    sums = kernels.l1_norms(base, tuned, *masks, 4096), kernels.dot_products(tuned[0], base, tuned)
    return [*outs, signs, *sums, kernels.magnitude_histogram(base, tuned, 16, None)]


@pytest.mark.skipif(not EMULATED, reason="compute-sanitizer watches the device's memory (bench/device.sh)")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("numel", [n for n in EDGES if 0 < n <= 4097])
def test_nothing_outside_is_touched(numel, at_end):
    walls, dtype = Walls(), DTYPES[numel % 3]
    wanted = every_kernel(native, numel, dtype, lambda x: x.clone())
    got = every_kernel(cuda, numel, dtype, lambda x: walls.place(x, at_end=at_end))
    for one, other in zip(got, wanted, strict=True):
        assert_same_bits(one.clone(), other)


def test_a_group_gives_what_single_launches_give():
    sizes = (1, 63, 4096, 4097, 0, 20_001, 300)
    for op in ("linear_merge", "ties_merge", "dare_merge"):
        group = [Case(op, numel=n) for n in sizes]
        outs = [torch.full((n,), math.nan, dtype=torch.bfloat16, device=DEVICE) for n in sizes]
        with grouping.grouped():
            for case, out in zip(group, outs, strict=True):
                getattr(cuda, op)(out, *map(there, case.arguments()))
            assert all(bool(out.isnan().all()) for out in outs)  # they wait for each other
        for case, out in zip(group, outs, strict=True):
            assert_same_bits(out.cpu(), on_cpu(case))


def test_a_group_of_selections_gives_what_single_launches_give():
    sizes = (1, 63, 4096, 4097, 40_001, 17_000, 300)
    groups = [(make("gaussian", n, 3, torch.bfloat16), [max(1, n // 5), n, 0]) for n in sizes]
    outs = [torch.full((n,), math.nan, dtype=torch.bfloat16, device=DEVICE) for n in sizes]
    rest = (weights(3), None, weights(3), 1.0, "weighted")
    for tie in ("index", "keep"):
        with grouping.grouped():
            for ((base, tuned), k), out in zip(groups, outs, strict=True):
                cuda.ties_fused(out, there(base), there(tuned), k, tie, *rest)
        for ((base, tuned), k), out in zip(groups, outs, strict=True):
            wanted = torch.empty_like(base)
            native.ties_fused(wanted, base, tuned, k, tie, *rest)
            assert_same_bits(out.cpu(), wanted)


def test_state_dicts_in_a_few_launches(monkeypatch):
    launches = []
    real = cuda._run
    monkeypatch.setattr(
        cuda, "_run", lambda f, op, jobs: (launches.append((op, len(jobs))), real(f, op, jobs))
    )
    g = torch.Generator().manual_seed(1)
    base = {f"layer.{i}": torch.randn(100 + i, generator=g).bfloat16() for i in range(40)}
    tuned = [
        {k: v + 0.1 * torch.randn(v.shape, generator=g).bfloat16() for k, v in base.items()} for _ in "ab"
    ]
    wanted = pk.merge_state_dicts(base, tuned, method="ties", density=0.5, weight=1.0)
    with pk.use_backend("cuda"):
        got = pk.merge_state_dicts(
            {k: there(v) for k, v in base.items()}, [{k: there(v) for k, v in t.items()} for t in tuned],
            method="ties", density=0.5, weight=1.0,
        )  # fmt: skip
    assert launches == [("ties_merge", 40)]
    for name, value in got.items():
        assert_same_bits(value.cpu(), wanted[name])


@pytest.mark.parametrize("tie", ["index", "keep"])
def test_ops_choose_the_backend(tie):
    base, tuned = make("student", 20_011, 3, torch.bfloat16)
    options = {"density": [0.3, 1.0, 0.01], "weight": [1.0, 0.0, -0.5], "tie": tie}
    l1 = {"density": 0.3, "seed": 3, "rescale": "l1", "consensus": "ties"}
    wanted = pk.ties_merge(base, tuned, **options)
    with pk.use_backend("cuda"):
        assert_same_bits(pk.ties_merge(there(base), there(tuned), **options).cpu(), wanted)
        dare = pk.dare_merge(there(base), there(tuned), **l1)
        kth = pk.kth_magnitude(there(base), there(tuned), [0.3, 1.0, 0.0])
    assert_same_bits(
        dare.cpu(), pk.dare_merge(base, tuned, density=0.3, seed=3, rescale="l1", consensus="ties")
    )
    assert_same_bits(kth.cpu(), pk.kth_magnitude(base, tuned, [0.3, 1.0, 0.0]))


def test_a_failed_launch_names_op_shapes_and_error(monkeypatch):
    def refuse(*args: object) -> None:
        raise RuntimeError("cudaErrorLaunchFailure: unspecified launch failure")

    monkeypatch.setattr(cuda._cuda, "linear_merge", refuse)
    x = torch.ones(3, 5, device=DEVICE)
    with pytest.raises(
        RuntimeError, match=r"linear_merge: launch on .* shape \[3, 5\] failed: cudaErrorLaunch"
    ):
        cuda.linear_merge(x.clone(), None, [x], [1.0])


def test_cuts_on_the_device_equal_cuts_of_the_host():
    base, tuned = make("ties", 9001, 3, torch.float16)
    for last in ([5000, -1, KEEP_ALL_EQUALS], [4095, 4096, 9000], [-5000, 8191, 8192]):
        cut = Cut([0x3C800000, 0x3D000000, 0xFFFFFFFF], last)
        on_device = Cut(*(torch.tensor(part, device=DEVICE) for part in cut))
        for offset in (0, 4096):
            out, wanted = there(torch.empty_like(base)), torch.empty_like(base)
            rest = (weights(3), None, weights(3), 1.0, "weighted", offset)
            native.ties_merge(wanted, base, tuned, cut, *rest)
            cuda.ties_merge(out, there(base), there(tuned), on_device, *rest)
            assert_same_bits(out.cpu(), wanted)
