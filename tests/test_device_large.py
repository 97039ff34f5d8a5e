"""More elements than an int32 counts, once per kernel of a device: nothing wraps around."""

from __future__ import annotations

import pytest
import torch

import pykernels as pk
from pykernels import backends
from pykernels.cut import Cut

NUMEL = 2**31 + 4096 + 7
pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 25 GB of a CUDA device"),
]


@pytest.fixture(params=["cuda", "triton"])
def call(request):
    """The rows of a backend, forced."""
    if why := backends.missing(request.param):
        pytest.skip(why)
    with pk.use_backend(request.param):
        yield lambda op: backends.call(op, torch.empty(1, device="cuda"))


@pytest.fixture
def tuned():
    """Ones, with five elements of -3 at the end."""
    x = torch.ones(NUMEL, dtype=torch.bfloat16, device="cuda")
    x[-5:] = -3
    return x


def test_merges(call, tuned):
    out, base = torch.empty_like(tuned), torch.zeros_like(tuned)
    call("linear_merge")(out, base, [tuned], [0.5])
    assert bool((out[-5:] == -1.5).all()) and bool((out[-4200:-5] == 0.5).all()) and float(out[0]) == 0.5
    call("ties_fused")(out, base, [tuned], [2**31], "index", [1.0], None, [1.0], 1.0, "weighted")
    dropped = NUMEL - 2**31  # of the ones, the last in the order of indices
    assert bool((out[-5:] == -3).all()) and not out[-dropped - 5 : -5].any() and float(out[2**31 - 6]) == 1
    call("dare_merge")(out, base, [tuned], [65536], [0], 7, [2.0], None, None, 1.0, None)
    assert bool((out[-5:] == -6).all()) and bool((out[-4200:-5] == 2).all())
    call("drop_rescale")(out, tuned, 0, 1, 1.0)
    assert not out[-(2**20) :].any()
    call("trim")(out, tuned, Cut([0x3F800000], [2**31 + 1]))
    assert float(out[2**31 + 1]) == 1 and not out[2**31 + 2 : -5].any() and bool((out[-5:] == -3).all())


def test_selections(call, tuned):
    cut = call("kth_magnitude")(None, [tuned], [6])
    assert (cut.key.tolist(), cut.last.tolist()) == ([0x3F800000], [0])
    cut = call("kth_magnitude")(None, [tuned], [NUMEL - 1])
    assert (cut.key.tolist(), cut.last.tolist()) == ([0x3F800000], [NUMEL - 7])
    bins = call("magnitude_histogram")(None, [tuned], 16, None)
    assert int(bins[0, 0x3F80]) == NUMEL - 5 and int(bins[0, 0x4040]) == 5


def test_sums_and_signs(call, tuned):
    norms = call("l1_norms")(None, [tuned], [65536], [0], 7)
    assert norms.shape[0] == -(-NUMEL // 4096) and norms[:, 0].sum(0).tolist() == [NUMEL + 10.0] * 2
    dots = call("dot_products")(tuned, None, [tuned])
    assert float(dots.sum()) == NUMEL - 5 + 45
    signs = torch.zeros(NUMEL, dtype=torch.int8, device="cuda")
    call("elect_sign")(signs, [tuned], [1.0], "plain")
    assert bool((signs[-5:] == -1).all()) and bool((signs[-4200:-5] == 1).all())


def test_softmax_of_one_row_and_of_columns(call, tuned):
    """One row of 2^31 elements and more, in chunks; then two columns of half as many."""
    out = torch.empty_like(tuned)
    wide = float(torch.exp(torch.tensor(-4.0)))
    call("softmax")(out.view(1, -1, 1), tuned.view(1, -1, 1), 1.0, None, None, None, False)
    assert float(out[0]) == pytest.approx(1 / NUMEL, rel=0.004) and bool((out[:-5] == out[0]).all())
    assert float(out[-1]) == pytest.approx(wide / NUMEL, rel=0.004) and bool((out[-5:] == out[-1]).all())
    sums = torch.empty(1, 1, dtype=torch.bfloat16, device="cuda")
    call("logsumexp")(sums, tuned.view(1, -1, 1), 1.0)
    assert float(sums) == pytest.approx(1 + 21.4876, rel=0.004)
    even = NUMEL // 2 * 2
    x, y = (t[-even:].view(1, -1, 2) for t in (tuned, out))
    call("softmax")(y, x, 1.0, None, None, None, False)
    assert bool((y[0, :-3] == y[0, 0]).all()) and float(y[0, 0, 0]) == pytest.approx(2 / NUMEL, rel=0.004)
    call("softmax_backward")(x, torch.ones_like(x), y, 1.0)
    assert float(x.abs().max()) < 1e-10
