"""Weight and lambda as tensors: the bits of numbers, and nobody waits for a device that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import pykernels as pk
from pykernels import backends
from pykernels.ops import coefficients, draws
from pykernels.ops.kth_statistic import KthStatistic
from tests.bounds import assert_same_bits
from tests.cases import SHORT, make

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUMEL = 4096 + 77
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter, at Inf and NaN

OPS = {
    "linear_merge": lambda b, t, w, x, **o: pk.linear_merge(t, w, **o),
    "linear_merge_sum": lambda b, t, w, x, **o: pk.linear_merge(t, w, normalize=False, **o),
    "task_arithmetic": lambda b, t, w, x, **o: pk.task_arithmetic(
        b, t, weight=w, lambda_=x, normalize=True, **o
    ),
    "ties_merge": lambda b, t, w, x, **o: pk.ties_merge(b, t, density=0.3, weight=w, lambda_=x, **o),
    "ties_merge_keep": lambda b, t, w, x, **o: pk.ties_merge(
        b, t, density=[0.3, 1, 0], weight=w, lambda_=x, tie="keep", elect="plain", normalize="count", **o
    ),
    "ties_merge_untrimmed": lambda b, t, w, x, **o: pk.ties_merge(
        b, t, density=1.0, weight=w, lambda_=x, normalize=False, **o
    ),
    "dare_merge": lambda b, t, w, x, **o: pk.dare_merge(
        b, t, density=0.3, seed=1, weight=w, lambda_=x, normalize=True, **o
    ),
    "dare_merge_l1": lambda b, t, w, x, **o: pk.dare_merge(
        b, t, density=0.3, seed=1, weight=w, lambda_=x, rescale="l1", consensus="ties", elect="plain", **o
    ),
}


def device_side() -> list[str]:
    """Backends that read numbers where the inputs are, on a device or emulated."""
    return [
        name
        for name in backends.DEVICE_SIDE
        if backends.missing(name) is None and backends._runs_on(name) == DEVICE.type
    ]


@pytest.fixture(params=["default", "ref", *device_side()])
def backend(request):
    """What a user gets, the references, and every backend that reads numbers itself.

    The norms of "l1" take the interpreter seconds a call: their numbers go where dare_merge's do, and
    test_nothing_is_read_outside_kernels compares their bits.
    """
    if request.param == "triton" and not CUDA and request.node.callspec.params.get("op") == "dare_merge_l1":
        pytest.skip("slow in the interpreter, and compared elsewhere")
    if request.param == "default":
        yield request.param
    else:
        with pk.use_backend(request.param):
            yield request.param


@pytest.fixture(params=device_side())
def reader(request):
    """Every backend that reads numbers itself."""
    with pk.use_backend(request.param):
        yield request.param


def there(base, tuned):
    """The inputs where the device is."""
    return base.to(DEVICE), [t.to(DEVICE) for t in tuned]


@contextmanager
def unread(monkeypatch) -> Iterator[None]:
    """Outside kernels no tensor may be read by the host: that would wait for the device."""
    choose, inside = backends._choose, []

    def chosen(op: str, like: torch.Tensor) -> backends.Chosen:
        backend, function = choose(op, like)

        def run(*arguments):
            inside.append(op)
            try:
                return function(*arguments)
            finally:
                inside.pop()

        return backends.Chosen(backend, function and run)

    with monkeypatch.context() as patch:
        patch.setattr(backends, "_choose", chosen)
        for name in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            real = getattr(torch.Tensor, name)

            def reads(self, *arguments, _real=real, _name=name, **options):
                assert inside, f"{_name} waits for the device"
                return _real(self, *arguments, **options)

            patch.setattr(torch.Tensor, name, reads)
        yield


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", KINDS, ids=SHORT.get)
def test_a_tensor_gives_the_bits_of_its_numbers(kind, op, backend):
    base, tuned = there(*make("gaussian", NUMEL, 3, torch.bfloat16))
    weight = torch.tensor([0.3, 0.0, -0.7], dtype=kind, device=DEVICE)
    lambda_ = torch.tensor(0.6, dtype=kind, device=DEVICE)
    wanted = OPS[op](base, tuned, weight.tolist(), lambda_.item())
    assert_same_bits(OPS[op](base, tuned, weight, lambda_), wanted)
    assert_same_bits(OPS[op](base, tuned, weight, lambda_.item()), wanted)
    assert_same_bits(OPS[op](base, tuned, weight.tolist(), lambda_), wanted)


@pytest.mark.parametrize("op", OPS)
def test_one_tensor_for_all_models(op, backend):
    base, tuned = there(*make("ties", NUMEL, 3, torch.float16))
    half, one = torch.tensor(0.5, device=DEVICE), 1.0
    assert_same_bits(OPS[op](base, tuned, half, one), OPS[op](base, tuned, 0.5, one))
    spread = torch.tensor([0.5, 9.0, 0.25, 9.0, 1.0, 9.0], device=DEVICE)[::2]  # not contiguous
    assert_same_bits(OPS[op](base, tuned, spread, one), OPS[op](base, tuned, spread.tolist(), one))


def test_float64_inputs_keep_every_bit_of_a_weight():
    base = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    weight = torch.tensor([1 + 2.0**-40], dtype=torch.float64, device=DEVICE)
    assert pk.task_arithmetic(base, [base + 1], weight=weight).tolist() == [1 + 2.0**-40] * 2


@pytest.mark.parametrize("elect", ["weighted", "plain"])
def test_elect_sign(elect, backend):
    _, deltas = there(*make("ties", NUMEL, 3, torch.bfloat16))
    weight = torch.tensor([0.5, -1.0, 0.0], device=DEVICE)
    wanted = pk.elect_sign(deltas, weight.tolist(), elect=elect)
    assert torch.equal(pk.elect_sign(deltas, weight, elect=elect), wanted)


@pytest.mark.parametrize("op", OPS)
def test_models_of_weight_0_take_no_part(op, backend):
    base, tuned = there(*make("gaussian", NUMEL, 3, torch.bfloat16))
    poison = torch.full_like(base, math.nan)
    weight = torch.tensor([0.5, 0.0, 2.0], device=DEVICE)
    got = OPS[op](base, [tuned[0], poison, tuned[2]], weight, 1.0)
    assert_same_bits(got, OPS[op](base, tuned, [0.5, 0.0, 2.0], 1.0))
    nothing = OPS[op](base, [poison] * 3, torch.zeros(3, device=DEVICE), 1.0)
    assert_same_bits(nothing, OPS[op](base, tuned, 0.0, 1.0))


@pytest.mark.parametrize("given", ["numbers", "tensors"])
@pytest.mark.parametrize("op", OPS)
def test_a_weight_that_became_0_still_takes_part(op, given, backend):
    """Its NaN counts, whether lambda is 0 or the weight is no float32; only a weight given as 0 is none."""
    base, tuned = there(*make("gaussian", NUMEL, 3, torch.float32))
    tuned = [
        t.masked_fill(torch.arange(NUMEL, device=DEVICE) % 7 == m, math.nan) for m, t in enumerate(tuned)
    ]
    for weight, lambda_ in (([0.5, -0.0, 0.25], 0.0), ([0.5, 0.0, 0.25], 1e-60), ([1e-60, 0.0, 0.5], 1.0)):
        if given == "tensors":
            weight = torch.tensor(weight, dtype=torch.float64, device=DEVICE)
            lambda_ = torch.tensor(lambda_, dtype=torch.float64, device=DEVICE)
        nan = OPS[op](base, tuned, weight, lambda_).isnan().cpu()
        wanted = torch.arange(NUMEL) % 7
        assert torch.equal(nan, (wanted == 0) | (wanted == 2))


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_read_outside_kernels(op, reader, monkeypatch):
    base, tuned = there(*make("gaussian", NUMEL, 3, torch.bfloat16))
    weight, lambda_ = torch.tensor([0.3, 0.0, -0.7], device=DEVICE), torch.tensor(0.6, device=DEVICE)
    out = base.clone()
    with unread(monkeypatch):
        results = (
            OPS[op](base, tuned, weight, lambda_),
            OPS[op](base, tuned, [0.3, 0.0, -0.7], lambda_),
            OPS[op](out, tuned, weight, 0.6, out=out),
        )
    wanted = OPS[op](base, tuned, [0.3, 0.0, -0.7], 0.6)
    assert_same_bits(results[0], OPS[op](base, tuned, weight.tolist(), lambda_.item()))
    assert_same_bits(results[1], OPS[op](base, tuned, [0.3, 0.0, -0.7], lambda_.item()))
    assert_same_bits(results[2], OPS[op](base, tuned, weight.tolist(), 0.6))
    assert_same_bits(OPS[op](base, tuned, [0.3, 0.0, -0.7], 0.6), wanted)


def test_stages_are_not_read_outside_kernels(reader, monkeypatch):
    base, tuned = there(*make("ties", NUMEL, 3, torch.bfloat16))
    density = [0.3, 0.0, 1.0]
    with unread(monkeypatch):
        results = [
            pk.kth_magnitude(base, tuned, density),
            pk.trim(tuned[0], 0.3, tie="keep"),
            pk.drop_rescale(tuned[0], 0.3, seed=1, rescale="l1"),
            pk.elect_sign(tuned, torch.tensor([0.5, -1.0, 0.0], device=DEVICE)),
        ]
    with pk.use_backend("ref"):
        wanted = [
            pk.kth_magnitude(base, tuned, density),
            pk.trim(tuned[0], 0.3, tie="keep"),
            pk.drop_rescale(tuned[0], 0.3, seed=1, rescale="l1"),
            pk.elect_sign(tuned, [0.5, -1.0, 0.0]),
        ]
    for got, want in zip(results, wanted, strict=True):
        assert torch.equal(got, want)


def test_magnitudes_of_every_kind(reader):
    special = torch.tensor([math.nan, -math.inf, 2.0, 0.0], device=DEVICE)
    kth = pk.kth_magnitude(None, [special] * 5, [0.25, 0.5, 0.75, 1.0, 0.0])
    assert kth.view(torch.int32).tolist() == [0x7FC00000, 0x7F800000, 0x40000000, 0, 0x7F800000]
    assert pk.kth_magnitude(None, [special[:0]] * 2, 0.5).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("tie", ["index", "keep"])
def test_the_statistic_of_a_whole_tensor_stays_there(tie, reader, monkeypatch):
    base, tuned = there(*make("ties", NUMEL, 3, torch.bfloat16))
    statistic = KthStatistic([0.3, 0.0, 1.0], NUMEL, tie)
    with unread(monkeypatch):
        statistic.update(base, tuned, 0)
        statistic.next_round()
        cut = statistic.finish().at(0)
    assert statistic.done and isinstance(cut.key, torch.Tensor) and cut.key.device.type == DEVICE.type
    whole = KthStatistic([0.3, 0.0, 1.0], NUMEL, tie)
    while not whole.done:  # by digits, over two chunks
        for part in (slice(0, 4096), slice(4096, NUMEL)):
            whole.update(base[part], [t[part] for t in tuned], part.start)
        whole.next_round()
    parts = whole.finish()
    assert [int(k) for k in cut.key[::2]] == parts.key[::2]
    assert [int(i) for i in cut.last] == parts.last  # the second keeps nothing, by whatever key


def test_folding_tensors_is_folding_numbers():
    g = torch.Generator().manual_seed(3)
    for n in (1, 2, 3, 10, 64):
        weight = torch.randn(n, generator=g, dtype=torch.float64)
        for w in (weight, weight - weight.mean(), weight.float().double(), weight * 1e-30):
            total = coefficients.divisor(w.tolist())
            assert coefficients.divisor(w).item() == total
            for scale in (1.0, 0.3, (1 / weight.abs()).tolist()):
                numbers = coefficients.fold(w.tolist(), scale, total, weight)
                tensors = coefficients.fold(w, scale, torch.tensor(total, dtype=torch.float64), weight)
                assert tensors.dtype == torch.float32
                assert tensors.tolist() == torch.tensor(numbers, dtype=torch.float32).tolist()


@pytest.mark.parametrize("weight", [[0.1, 0.2, -0.3], [1.0, -1.0], [0.0, 0.0], [1.0, -3.0], [0.1] * 10])
def test_divisors(weight):
    in_order = 0.0
    for w in weight:
        in_order += w
    wanted = {(0.1, 0.2, -0.3): 1.0, (1.0, -1.0): 1.0, (0.0, 0.0): 1.0}.get(tuple(weight), in_order)
    assert coefficients.divisor(weight) == wanted  # [0.1] * 10: one ulp below 1, whatever sum() does
    assert coefficients.divisor(torch.tensor(weight, dtype=torch.float64)).item() == wanted


def test_factors_on_the_device_are_those_of_the_host():
    sums = torch.tensor(
        [[3.0, 1.5], [1e-8, 1e-8], [1.0, 1e-8], [math.inf, 2.0], [math.nan, math.nan], [math.inf, math.inf]],
        dtype=torch.float64,
    )
    statistic = draws.L1Statistic(range(6), [0] * 6, 0)
    statistic._blocks[0] = sums[None]
    wanted = statistic.finish().values
    statistic._on_device = True
    got = statistic.finish().values
    assert isinstance(got, torch.Tensor) and got.tolist() == wanted == [2.0, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_device(op, reader):
    base, tuned = there(*make("gaussian", 300_007, 3, torch.bfloat16))
    weight, lambda_ = torch.tensor([0.3, 0.0, -0.7], device=DEVICE), torch.tensor(0.6, device=DEVICE)
    wanted = OPS[op](base, tuned, weight, lambda_)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = OPS[op](base, tuned, weight, lambda_)
        if "merge" in op:
            pk.kth_magnitude(base, tuned, 0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(got, wanted)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_a_graph_can_capture_it(op, reader):
    base, tuned = there(*make("gaussian", 300_007, 3, torch.bfloat16))
    weight, lambda_ = torch.tensor([0.3, 0.2, -0.7], device=DEVICE), torch.tensor(0.6, device=DEVICE)
    out = torch.empty_like(base)
    OPS[op](base, tuned, weight, lambda_, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS[op](base, tuned, weight, lambda_, out=out)
    weight.copy_(torch.tensor([0.1, 0.0, 0.9]))
    tuned[0].copy_(base)
    graph.replay()
    assert_same_bits(out, OPS[op](base, tuned, weight, lambda_))
