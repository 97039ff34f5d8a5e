"""Triton kernels against the truth and the bits of the CPU: on a device if there is one, else interpreted."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from pykernels import grouping, native
from pykernels.backends import TABLE, _function
from pykernels.cut import KEEP_ALL_EQUALS, Cut
from pykernels.kernels import launch, table
from pykernels.ref.dot_products import dot_products
from pykernels.ref.drop_rescale import dropped
from pykernels.ref.elect_sign import elect_sign
from pykernels.ref.l1_norms import l1_norms
from pykernels.ref.rounding import NAN, round_once
from pykernels.ref.trim import trim
from tests import cases
from tests.bounds import assert_same_bits, assert_within
from tests.cases import DATA, DTYPES, EDGES, SHORT, Case, make, weights
from tests.test_kernels import edges, truth
from tests.walls import Walls

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
kernels = SimpleNamespace(**{op: _function(op, "triton") for op, row in TABLE.items() if "triton" in row})
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, at Inf and NaN


def there(value):
    """Tensors, and lists of them, where the kernels find them."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
        return [there(v) for v in value]
    return value


def nans(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """An output that shows what was not written."""
    return torch.full((numel,), math.nan, dtype=dtype, device=DEVICE)


def run(case: Case) -> torch.Tensor:
    """The result of the Triton kernel."""
    out = nans(case.numel, case.out_dtype or case.dtype)
    getattr(kernels, case.op)(out, *map(there, case.arguments()))
    return out.cpu()


def on_cpu(case: Case) -> torch.Tensor:
    """The result of the CPU kernel."""
    out = torch.full((case.numel,), math.nan, dtype=case.out_dtype or case.dtype)
    getattr(native, case.op)(out, *case.arguments())
    return out


WIDE = [Case(op, dtype=d, out_dtype=torch.float64) for op in ("ties_merge", "dare_merge") for d in DTYPES]


LARGE = [] if launch.INTERPRETED else cases.large()  # half a minute each in the interpreter


@pytest.mark.parametrize("case", cases.table() + WIDE + LARGE, ids=str)
def test_merges(case):
    out = run(case)
    assert_within(out, *truth(case))
    assert_same_bits(out, on_cpu(case))
    if out.dtype in DTYPES:
        nan = out.isnan()
        bits, canonical = NAN[out.dtype]
        assert bool((out.view(bits)[nan] == canonical).all())


def test_blocks_of_the_size_that_devices_run(monkeypatch):
    monkeypatch.setattr(launch, "TILE", 4096)
    monkeypatch.setattr(launch, "BLOCK", 1024)
    for case in (
        Case("linear_merge", numel=9001),
        Case("ties_merge", "ties", 9001),
        Case("dare_merge", numel=9001),
    ):
        assert_same_bits(run(case), on_cpu(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=SHORT.get)
def test_rounding_and_reading_of_16_bit_values(dtype):
    values = torch.cat([edges(dtype), -edges(dtype)])
    out = nans(len(values), dtype)
    kernels.linear_merge(out, None, [there(values)], [1.0])
    assert_same_bits(out.cpu(), round_once(values.double() + 0.0, dtype))
    values = torch.arange(65536).to(torch.int16).view(dtype)
    out = nans(65536, torch.float32)
    kernels.linear_merge(out, None, [there(values)], [1.0])
    assert_same_bits(out.cpu(), round_once(values.double() + 0.0, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("tie", ["index", "keep"])
def test_trim_keeps_the_same_entries(data, dtype, tie):
    case = Case("ties_merge", data, models=1, dtype=dtype, with_base=False, tie=tie, numel=4999)
    [d] = case.inputs()[1]
    out = nans(4999, dtype)
    kernels.trim(out, there(d), case.cut())
    assert torch.equal(out.cpu().nan_to_num(9), trim(d, case.cut()).to(dtype).nan_to_num(9))


@pytest.mark.parametrize("numel", EDGES)
def test_drop_keeps_the_same_entries(numel):
    dtype = DTYPES[numel % 3]
    d = torch.ones(numel, dtype=dtype)
    out = nans(numel, dtype)
    kernels.drop_rescale(out, there(d), 30000, 2**63 + 12345, 2.0, 2**36 + 4096)
    assert torch.equal(out.cpu(), 2 * dropped(d, 30000, 0, 2**63 + 12345, 2**36 + 4096))


SUMS = [Case("dare_merge", dtype=d, models=1, with_base=b) for d in DTYPES for b in (True, False)]
SUMS += [
    Case("dare_merge", data=n, models=1, dtype=d) for n, d in zip(("special", "wide"), DTYPES, strict=False)
]
SUMS += [Case("dare_merge", numel=n, models=2) for n in (0, 1, 129, 9 * 4096 + 77)]
SUMS += [
    Case("dare_merge", models=1, offset=o, density=d) for o, d in ((2**32 - 4096, 0.1), (2**36 + 8192, 1))
]


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_l1_norms_are_the_same_bits(case):
    base, tuned = case.inputs()
    masks = (*case.masks(), case.offset)
    got = kernels.l1_norms(there(base), there(tuned), *masks).cpu()
    assert got.shape == (-(-case.numel // 4096), case.models, 2)
    wanted = l1_norms(base, tuned, *masks) if case.numel else torch.empty_like(got)
    assert torch.equal(got.nan_to_num(-1), wanted.nan_to_num(-1))


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_dot_products_are_the_same_bits(case):
    base, tuned = case.inputs()
    grad = make("wide", case.numel, 1, DTYPES[case.numel % 3])[1][0]
    got = kernels.dot_products(there(grad), there(base), there(tuned)).cpu()
    assert got.shape == (-(-case.numel // 4096), case.models)
    wanted = dot_products(grad, base, tuned) if case.numel else torch.empty_like(got)
    assert torch.equal(got.nan_to_num(-1), wanted.nan_to_num(-1))


@pytest.mark.parametrize("elect", ["weighted", "plain"])
@pytest.mark.parametrize("data", DATA)
def test_elected_signs_are_equal(data, elect):
    for dtype, numel, models in zip(DTYPES, (4999, 1, 65537), (5, 64, 2), strict=True):
        base, tuned = make(data, numel, models, dtype)
        deltas = [t - base for t in tuned]
        out = torch.full((numel,), 77, dtype=torch.int8, device=DEVICE)
        kernels.elect_sign(out, there(deltas), weights(models), elect)
        assert torch.equal(out.cpu(), elect_sign(deltas, weights(models), elect).to(torch.int8))


def test_numbers_on_the_device_equal_numbers_of_the_host():
    for case in (
        Case("linear_merge"),
        Case("ties_merge"),
        Case("dare_merge", elect="plain", normalize=False),
    ):
        arguments = [there(a) for a in case.arguments()]
        numbers = [
            torch.tensor(a, device=DEVICE) if isinstance(a, list) and isinstance(a[0], float) else a
            for a in arguments
        ]
        if case.op != "linear_merge":
            [place] = [i for i, a in enumerate(numbers) if isinstance(a, float)]
            numbers[place] = torch.tensor(case.lambda_, device=DEVICE)
        out = nans(case.numel, case.dtype)
        getattr(kernels, case.op)(out, *numbers)
        assert_same_bits(out.cpu(), on_cpu(case))


def test_a_weight_of_0_on_the_device_takes_no_part():
    base, tuned = (there(x) for x in make("gaussian", 5000, 3, torch.float32))
    poison = [tuned[0], torch.full_like(base, math.nan), tuned[2]]
    weight, rest = torch.tensor([0.5, 0.0, 2.0], device=DEVICE), [tuned[0], tuned[2]]
    out, wanted = torch.empty_like(base), torch.empty_like(base)
    for elect, vote in ((None, None), ("weighted", None), ("plain", [1.0] * 3)):
        share = [1.0] * 3 if elect else None
        two = (vote and vote[:2], share and share[:2])
        kernels.ties_fused(out, base, poison, [500] * 3, "index", weight, vote, share, 1.0, elect)
        kernels.ties_fused(wanted, base, rest, [500] * 2, "index", [0.5, 2.0], *two, 1.0, elect)
        assert_same_bits(out, wanted)
        kernels.dare_merge(out, base, poison, [30000] * 3, [0, 1, 2], 7, weight, vote, share, 1.0, elect)
        kernels.dare_merge(wanted, base, rest, [30000] * 2, [0, 2], 7, [0.5, 2.0], *two, 1.0, elect)
        assert_same_bits(out, wanted)
    kernels.linear_merge(out, None, poison, weight)
    kernels.linear_merge(wanted, None, rest, [0.5, 2.0])
    assert_same_bits(out, wanted)


@pytest.mark.parametrize("op", ["linear_merge", "ties_merge", "dare_merge"])
def test_results_over_an_input(op):
    case = Case(op, dtype=torch.float32, numel=70_001)
    base, tuned, *rest = case.arguments()
    for i in (0, 2):
        inputs = [there(x).clone() for x in (base, *tuned)]
        getattr(kernels, op)(inputs[i], inputs[0], inputs[1:], *rest)
        assert_same_bits(inputs[i].cpu(), on_cpu(case))


def test_cuts_on_the_device_equal_cuts_of_the_host():
    base, tuned = make("ties", 9001, 3, torch.float16)
    for last in ([5000, -1, KEEP_ALL_EQUALS], [4095, 4096, 9000], [-5000, 8191, 8192]):
        cut = Cut([0x3C800000, 0x3D000000, 2**63 - 1], last)
        on_device = Cut(*(torch.tensor(part, device=DEVICE) for part in cut))
        rest = (weights(3), None, weights(3), 1.0, "weighted", 4096)
        wanted = torch.empty_like(base)
        native.ties_merge(wanted, base, tuned, cut, *rest)
        for one in (cut, on_device):
            out = nans(9001, torch.float16)
            kernels.ties_merge(out, there(base), there(tuned), one, *rest)
            assert_same_bits(out.cpu(), wanted)


def placed(raw: torch.Tensor, start: int, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of ``tensor`` that begins ``start`` bytes after a multiple of 16, among bytes that must stay."""
    nbytes = tensor.numel() * tensor.element_size()
    raw.fill_(0xA5)
    raw[start : start + nbytes] = there(tensor).view(torch.uint8)
    if start % tensor.element_size():  # torch offers no such view on tensors of its own
        return torch.frombuffer(raw.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return raw[start : start + nbytes].view(tensor.dtype)


@pytest.mark.parametrize("start", [1, 2, 3, 4, 8])
def test_any_alignment(start):
    for i, op in enumerate(("linear_merge", "ties_merge", "dare_merge")):
        case = Case(op, numel=4999, dtype=DTYPES[(i + start) % 3])
        base, tuned, *rest = case.arguments()
        at = start if launch.INTERPRETED else -(-start // base.element_size()) * base.element_size()
        room = [torch.empty(4999 * 4 + 64, dtype=torch.uint8, device=DEVICE) for _ in range(5)]
        out = placed(room[0], at, torch.full((4999,), math.nan, dtype=case.dtype))
        inputs = [placed(r, at, x) for r, x in zip(room[1:], (base, *tuned), strict=True)]
        getattr(kernels, op)(out, inputs[0], inputs[1:], *rest)
        assert_same_bits(out.cpu().clone(), on_cpu(case))
        end = at + 4999 * out.element_size()
        assert bool((room[0][:at] == 0xA5).all()) and bool((room[0][end:] == 0xA5).all())


def every_kernel(rows, numel, dtype, place):
    """Every function that both backends have, on inputs and outputs put where ``place`` says."""
    base, tuned = make("ties", numel, 2, dtype)
    base, tuned = place(base), [place(t) for t in tuned]
    weight, masks, k = weights(2), ([30_000] * 2, [0, 5], 99), [numel // 3, numel // 2]
    outs = [place(torch.full((numel,), math.nan, dtype=dtype)) for _ in range(4)]
    signs = place(torch.full((numel,), 77, dtype=torch.int8))
    rows.linear_merge(outs[0], base, tuned, weight)
    cut = Cut([0x3D000000] * 2, [numel // 2, -1])
    rows.ties_merge(outs[1], base, tuned, cut, weight, None, weight, 1.0, "weighted")
    rows.ties_fused(outs[2], base, tuned, k, "index", weight, [1.0, 1.0], None, 1.0, "plain")
    rows.dare_merge(outs[3], base, tuned, *masks, weight, None, weight, 1.0, "weighted", 4096)
    rows.elect_sign(signs, tuned, weight, "weighted")
    sums = rows.l1_norms(base, tuned, *masks, 4096), rows.dot_products(tuned[0], base, tuned)
    return [*outs, signs, *sums, rows.magnitude_histogram(base, tuned, 16, None)]


@pytest.mark.skipif(not launch.INTERPRETED, reason="compute-sanitizer watches the device's memory")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("numel", [1, 127, 4097])
def test_nothing_outside_is_touched(numel, at_end, monkeypatch):
    monkeypatch.setattr("pykernels.kernels.selection.SMALL", 100)  # the long way, too
    walls, dtype = Walls(), DTYPES[numel % 3]
    wanted = every_kernel(native, numel, dtype, lambda x: x.clone())
    got = every_kernel(kernels, numel, dtype, lambda x: walls.place(x, at_end=at_end))
    for one, other in zip(got, wanted, strict=True):
        assert_same_bits(one.clone(), other)


@pytest.mark.parametrize("op", ["linear_merge", "ties_merge", "dare_merge"])
def test_a_group_gives_what_single_launches_give(op, monkeypatch):
    launches = []
    real = launch.Launch.run
    monkeypatch.setattr(
        launch.Launch, "run", lambda self, *a, **k: (launches.append(self.op), real(self, *a, **k))
    )
    group = [Case(op, numel=n, dtype=torch.float16) for n in (1, 63, 4096, 4097, 0, 40_001, 300)]
    group += [replace(case, dtype=torch.float32) for case in group[:2]]
    outs = [nans(case.numel, case.dtype) for case in group]
    with grouping.grouped():
        for case, out in zip(group, outs, strict=True):
            getattr(kernels, op)(out, *map(there, case.arguments()))
        assert not launches
    assert launches == [op] * 2
    for case, out in zip(group, outs, strict=True):
        assert_same_bits(out.cpu(), on_cpu(case))


def test_a_table_that_is_packed_from_arguments():
    words = [7, -1, 2**40, 16, -(2**62), 1, 0, 2**63 - 1] * 10
    rows = torch.zeros(len(words), dtype=torch.int64, device=DEVICE)
    launch.pack(rows, words)
    assert rows.tolist() == words and len(words) == 2 * table.WORDS


def test_a_failed_launch_names_op_shapes_and_error():
    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError("CUDA: invalid argument")

    job = launch.Job(None, None, [torch.ones(3, 5, device=DEVICE)])
    with pytest.raises(
        RuntimeError, match=r"linear_merge: 1 tensors \(\[3, 5\]\) of 1 models .*: CUDA: invalid"
    ):
        launch.Launch("linear_merge", [job]).run(Kernel(), 1)
